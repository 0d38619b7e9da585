"""Reading a worker's requests: what is taken, and in which words the rest is refused."""

import json

import pytest

from llava.conversation import get_template
from llava.sampling_params import SamplingFields, SamplingParams, sliders
from llava.serve.api.chat import ChatRequest
from llava.serve.api.responses import InputItem
from llava.serve.job import Message, read_job, to_conversation
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import MAX_TEXT, GenerateRequest

PNG = "data:image/png;base64,AAAA"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}
OTHER_VALUES = {
    "top_p": 0.5,
    "seed": 2,
    "stop": ["###"],
    "stop_token_ids": [3],
    "logit_bias": {"7": 1.5},
    "json_schema": {"type": "object"},
    "ignore_eos": True,
}
"""Of parameters that have no slider, or whose default is its end."""


def read_turns(*messages):
    return read_job({"messages": list(messages)}).messages


def test_the_old_protocol():
    job = read_job(
        {"model": "m", "prompt": "USER: <image>\nWhat?", "images": ["AAAA"], "temperature": 0.2, "stop": "###"}
    )
    assert (job.prompt, job.messages, job.images) == ("USER: <image>\nWhat?", None, ("AAAA",))
    assert job.sampling == SamplingParams(temperature=0.2, max_new_tokens=256, stop=("###",)) and job.stream


def test_every_parameter_of_a_request_reaches_the_engine():
    """Each by its declaration alone: a new one needs no line here nor in the servers."""
    given = {name: OTHER_VALUES.get(name) or sliders()[name][1].high for name in SamplingFields.model_fields}
    for model, more in ((GenerateRequest, {}), (ChatRequest, {"model": "m"})):
        body = {"messages": [USER], **given, **more}
        request = model.model_validate(body)
        body = body if model is GenerateRequest else request.worker_bodies("req-0123456789abcdef")[0]
        sampling = read_job(json.loads(json.dumps(body))).sampling
        assert sampling == SamplingParams(**given, max_new_tokens=256)
        assert sampling.common().keys() == given.keys()


def test_neutral_values_of_other_servers_say_nothing():
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "seed": None, "stop": None, "logit_bias": {}, "logprobs": None}
    job = read_job({"messages": [USER], **neutral, "temperature": None, "stream": None, "max_new_tokens": None})
    assert job.sampling == SamplingParams(max_new_tokens=256) and job.stream
    more = {"frequency_penalty": 0, "min_tokens": 0, "use_beam_search": False, "skip_special_tokens": True}
    ChatRequest.model_validate({"model": "m", "messages": [USER], **neutral, **more, "n": None}).check()


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
    messages = read_turns({"role": "developer", "content": "Be brief."}, USER, USER, ANSWER, USER)
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
        ({"prompt": "<image> a"}, "1 <image> for 0 images"),
        ({"prompt": "a", "images": ["x"]}, "0 <image> for 1 image"),
        ({"prompt": "a", "images": "x"}, "images: Input should be a valid list"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"prompt": "a", "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "top_p": "1"}, "top_p"),
        ({"prompt": "a", "stop": ["x"] * 9}, "stop"),
        ({"prompt": "a", "stop": ["x" * 257]}, "stop.0: String should have at most 256"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "temperature": True}, "temperature: Input should be a number"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"prompt": "a", "logit_bias": {"1": float("inf")}}, "logit_bias.1: Input should be a finite number"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * (MAX_TEXT + 1)}, "prompt: String should have at most"),
        ({"prompt": "a", "model": "m\nforged line"}, "model"),
        ({"messages": [USER] * 1025}, "messages: List should have at most 1024"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_TEXT // 2)}] * 3}, "messages: The texts have 6291456"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]}, "A call needs"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            r"messages.0.content.0.type: Input should be 'text'",
        ),
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
    messages = read_turns(USER, {"role": "assistant", "content": "I see <image>."}, USER)
    assert messages[1].text == "I see < image>."


@pytest.mark.parametrize("content", ["I look.", [{"type": "text", "text": "I look."}], "", None, []])
def test_what_is_said_beside_a_call_is_kept(content):
    call = {"function": {"name": "point", "arguments": "{}"}}
    _, said, _ = read_turns(USER, {"role": "assistant", "content": content, "tool_calls": [call]}, USER)
    assert said.text == ("I look.\n" if content else "") + '{"name":"point","arguments":{}}'


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("7 mm", "7 mm"),
        ([{"type": "input_text", "text": "7 mm"}, {"type": "input_image", "image_url": PNG}], "7 mm\n<image>"),
    ],
    ids=["a text", "parts"],
)
def test_what_a_function_gave_back_is_read_whole(output, text):
    item = InputItem.model_validate({"type": "function_call_output", "call_id": "c", "output": output})
    (turn,) = read_turns(item.message(0))
    assert turn.text == text and len(turn.images) == text.count("<image>")


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "https://h/x", "file:///etc/passwd", "/etc/passwd"])
def test_images_are_never_fetched(url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(ServeError) as caught:
        read_job({"messages": [{"role": "user", "content": content}]})
    assert caught.value.error_type is ErrorType.BAD_IMAGE


def test_as_many_turns_as_are_allowed_are_joined_in_no_time():
    """Joining them one by one copied 51 MB a thousand times."""
    (turn,) = read_turns(*[{"role": "user", "content": "x" * 4000}] * 1024)
    assert len(turn.text) == 1024 * 4001 - 1
