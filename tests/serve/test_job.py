"""Reading a worker's requests: what is taken, and in which words the rest is refused."""

import pytest

from llava.conversation import get_template
from llava.serve.job import Message, read_job, read_messages, to_conversation
from llava.serve.protocol import ErrorType, ServeError

PNG = "data:image/png;base64,AAAA"
USER = {"role": "user", "content": "Hi"}


def test_the_old_protocol():
    job = read_job(
        {"model": "m", "prompt": "USER: <image>\nWhat?", "images": ["AAAA"], "temperature": 0.2, "stop": "###"}
    )
    assert (job.prompt, job.messages, job.images) == ("USER: <image>\nWhat?", None, ("AAAA",))
    assert (job.temperature, job.top_p, job.max_new_tokens, job.stop, job.stream) == (0.2, 1.0, 256, ("###",), True)


def test_messages_with_images_keep_their_places():
    content = [
        {"type": "text", "text": "First"},
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "text", "text": "second"},
        {"type": "image"},
    ]
    job = read_job({"model": "m", "messages": [{"role": "user", "content": content}], "images": ["BBBB"]})
    assert job.messages == (Message("user", "First\n<image>\nsecond\n<image>", (PNG, "BBBB")),)
    assert job.images == (PNG, "BBBB")


def test_neighbouring_turns_are_joined_and_system_goes_into_the_template():
    messages = read_messages(
        [{"role": "developer", "content": "Be brief."}, USER, USER, {"role": "assistant", "content": "Yes"}, USER]
    )
    conversation = to_conversation(messages, get_template("vicuna_v1"))
    conversation.append_message(conversation.roles[1])
    assert conversation.get_prompt() == "Be brief. USER: Hi\nHi ASSISTANT: Yes</s>USER: Hi ASSISTANT:"
    chatml = to_conversation(messages, get_template("mistral_direct")).get_prompt()
    assert chatml.startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi\nHi<|im_end|>")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": [USER]}, "either prompt or messages"),
        ({"prompt": "<image> a"}, "1 <image> but 0 image"),
        ({"prompt": "a", "images": ["x"]}, "0 <image> but 1 image"),
        ({"prompt": "a", "images": "x"}, "images has to be a list"),
        ({"prompt": 5}, "prompt has to be text"),
        ({"prompt": "a", "temperature": -1}, "temperature has to be a number from 0 to 10"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "top_p": "1"}, "top_p"),
        ({"prompt": "a", "stop": ["x"] * 9}, "stop"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type text or image_url"),
        ({"messages": [{"role": "user", "content": "see <image>"}]}, "can't hold <image>"),
        ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "come first"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "the user's"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}, USER]}, "begin"),
        ({"messages": [USER], "images": ["x"]}, "no place"),
        ({"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": PNG}]}, USER]}, "only the"),
    ],
)
def test_what_is_no_request_is_refused_in_words(body, words):
    with pytest.raises(ServeError, match=words) as caught:
        read_job(body)
    assert caught.value.error_type is ErrorType.BAD_REQUEST


def test_what_a_model_said_is_no_place_for_a_image():
    messages = read_messages([USER, {"role": "assistant", "content": "I see <image>."}, USER])
    assert messages[1].text == "I see < image>."


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "https://h/x", "file:///etc/passwd", "/etc/passwd", 7, None])
def test_images_are_never_fetched(url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(ServeError) as caught:
        read_job({"messages": [{"role": "user", "content": content}]})
    assert caught.value.error_type is ErrorType.BAD_IMAGE
