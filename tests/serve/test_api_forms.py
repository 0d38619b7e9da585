"""JSON answers, functions, /v1/completions and /v1/responses: a real model behind OpenAI's own client."""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image
from pydantic import BaseModel

from llava.conversation import get_template
from llava.model.tokenizer import load_tokenizer

ASK = [{"role": "user", "content": "What is shown?"}]
FINDING = {
    "type": "object",
    "properties": {"finding": {"enum": ["nodule", "none"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["finding", "size"],
    "additionalProperties": False,
}
SIDE = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}
SIDE |= {"additionalProperties": False}


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "description": "…", "parameters": parameters}}


TOOLS = [tool("report", FINDING), tool("point", SIDE)]


def data_url():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(client, **given):
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 120} | given)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "finding", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_json_of_the_schema(tiny_client, temperature):
    given = {"response_format": schema_format(FINDING), "temperature": temperature, "seed": 3}
    reply = chat(tiny_client, **given)
    value = json.loads(reply.choices[0].message.content)
    assert set(value) == {"finding", "size"} and value["finding"] in ("nodule", "none") and 0 <= value["size"] <= 99
    assert reply.choices[0].finish_reason == "stop"
    with chat(tiny_client, stream=True, **given) as stream:
        text = "".join(chunk.choices[0].delta.content for chunk in stream)
    assert text == reply.choices[0].message.content
    free = chat(tiny_client).choices[0].message.content
    with pytest.raises(ValueError):  # what the model says by itself is no JSON
        json.loads(free)


def test_any_object(tiny_client):
    # It may grow without end; what is cut off is said, and is the beginning of an object.
    reply = chat(tiny_client, response_format={"type": "json_object"}, temperature=1, seed=1, max_tokens=400)
    text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert text.startswith("{") and reason in ("stop", "length")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_the_clients_own_parsing(tiny_client):
    class Finding(BaseModel):
        finding: bool
        sides: list[bool]

    answer = tiny_client.chat.completions.parse(
        model="tiny", messages=ASK, response_format=Finding, max_tokens=200, temperature=1, seed=4
    )
    assert isinstance(answer.choices[0].message.parsed, Finding)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nonsense"}, "json_schema: Invalid type: nonsense"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "retrieving it failed"),
        ({"type": "string", "pattern": "(("}, "json_schema: "),
        ({"enum": ["x" * 70_000]}, "65536"),
    ],
)
def test_schemas_that_are_none_are_refused(tiny_client, schema, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(tiny_client, response_format=schema_format(schema))


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ("required", {"report", "point"}, "tool_calls"),
        ({"type": "function", "function": {"name": "point"}}, {"point"}, "stop"),
    ],
)
def test_a_function_is_called(tiny_client, choice, names, reason, is_streamed):
    given = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": 5}
    if is_streamed:
        name, arguments, ends = "", "", []
        with chat(tiny_client, stream=True, **given) as stream:
            for chunk in stream:
                (call,) = chunk.choices[0].delta.tool_calls
                name += call.function.name or ""
                arguments += call.function.arguments
                ends.append(chunk.choices[0].finish_reason)
        assert ends[-1] == reason and set(ends[:-1]) <= {None}
    else:
        answer = chat(tiny_client, **given).choices[0]
        (call,) = answer.message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert answer.message.content is None and answer.finish_reason == reason and call.id.startswith("call_")
    assert name in names
    assert set(json.loads(arguments)) == ({"side"} if name == "point" else {"finding", "size"})


def test_a_stream_of_a_call_has_the_logprobs_of_all_its_tokens(tiny_client):
    given = {"tools": TOOLS, "tool_choice": "required", "logprobs": True}
    whole = chat(tiny_client, **given).choices[0].logprobs.content
    with chat(tiny_client, stream=True, **given) as stream:
        parts = [entry for chunk in stream for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in parts] == [entry.token for entry in whole]


def test_functions_may_define_parts_of_their_schemas_or_take_nothing(tiny_client):
    inner = {"type": "object", "properties": {"side": {"$ref": "#/$defs/Side"}}, "required": ["side"]}
    inner |= {"additionalProperties": False}
    tools = [
        tool("left", inner | {"$defs": {"Side": {"enum": ["left"]}}}),
        tool("right", inner | {"$defs": {"Side": {"enum": ["right"]}}}),
    ]
    older = inner | {"properties": {"side": {"$ref": "#/definitions/Side"}}}  # as pydantic 1 writes it
    within = inner | {"properties": {"side": {"$ref": "#/properties/other"}, "other": {"const": "both"}}}
    tools += [tool("middle", older | {"definitions": {"Side": {"enum": ["middle"]}}}), tool("both", within)]
    for seed, given in enumerate((tools, tools, tools, tools[2:], tools[2:], tools[2:])):
        reply = chat(tiny_client, tools=given, tool_choice="required", temperature=1, seed=seed, max_tokens=300)
        (call,) = reply.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["side"] == call.function.name
    own = {"type": "object", "properties": {"side": {"$ref": "#/$defs/None"}}}
    with pytest.raises(openai.BadRequestError, match="defs/None' does not exist"):
        chat(tiny_client, tools=[tool("own", own), *tools], tool_choice="required")
    (call,) = chat(tiny_client, tools=[tool("stop", {})], tool_choice="required").choices[0].message.tool_calls
    assert call.function.name == "stop" and call.function.arguments.startswith("{")


def test_a_conversation_with_a_call_and_its_result_goes_on(tiny_client):
    call = {"id": "call_1", "type": "function", "function": {"name": "point", "arguments": '{"side":"left"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "seen"},
    ]
    assert chat(tiny_client, messages=messages).choices[0].message.content
    told = [*ASK, {"role": "assistant", "content": '{"name":"point","arguments":{"side":"left"}}'}]
    told.append({"role": "user", "content": "seen"})
    assert chat(tiny_client, messages=messages).choices[0] == chat(tiny_client, messages=told).choices[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tools": TOOLS}, "tool_choice: auto is not supported here"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "tool_choice: auto"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "there is no tool 'no'"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": schema_format(FINDING)}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: not supported here"),
        ({"extra_body": {"guided_regex": "a+"}}, "guided_regex: not supported here"),
        ({"extra_body": {"made_up": 1}}, "made_up: unknown field"),
        ({"response_format": {"type": "json_schema"}}, "json_schema needs a schema"),
    ],
)
def test_what_cannot_be_honoured_is_named(tiny_client, given, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(tiny_client, **given)


def test_what_says_nothing_is_taken(tiny_client):
    expected = chat(tiny_client).choices[0].message.content
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1, "seed": None}
    extra = {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0, "best_of": 1, "reasoning_effort": "low", "user": "x"}
    extra |= {"parallel_tool_calls": True, "chat_template_kwargs": {}, "stop_token_ids": [], "logit_bias": {}}
    assert chat(tiny_client, **neutral, extra_body=extra).choices[0].message.content == expected
    assert chat(tiny_client, tools=TOOLS, tool_choice="none").choices[0].message.content == expected


def test_an_unknown_model_is_not_found(tiny_client, tiny_serving):
    with pytest.raises(openai.NotFoundError) as refused:
        chat(tiny_client, model="big")
    assert refused.value.code == "model_not_found" and "Known: tiny" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        tiny_client.models.retrieve("big")
    url = tiny_serving[2].url
    for reply in (httpx.get(f"{url}/v1/none"), httpx.get(f"{url}/v1/responses"), httpx.post(f"{url}/v1/models")):
        error = reply.json()["error"]
        assert reply.status_code in (404, 405) and {"message", "type", "param", "code"} <= set(error)


def test_completions(tiny_client, tiny_serving):
    conversation = get_template("vicuna_v1")
    conversation.append_message(conversation.roles[0], "What is shown?")
    conversation.append_message(conversation.roles[1])
    prompt = conversation.get_prompt()
    expected = chat(tiny_client, max_tokens=8).choices[0].message.content
    given = {"model": "tiny", "prompt": prompt, "max_tokens": 8}
    reply = tiny_client.completions.create(**given, logprobs=2)
    assert reply.object == "text_completion" and reply.choices[0].text.strip() == expected
    assert reply.usage.completion_tokens == 8 and reply.choices[0].finish_reason == "length"
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.text_offset) == 8 and len(logprobs.top_logprobs[0]) == 2
    with tiny_client.completions.create(**given, stream=True, n=2, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    for index in range(2):
        parts = [choice.text for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(parts) == reply.choices[0].text
    assert chunks[-1].usage.completion_tokens == 16
    with_image = given | {"prompt": prompt.replace("What", "<image>\nWhat")}
    seen = tiny_client.completions.create(**with_image, extra_body={"images": [data_url()]})
    content = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": "What is shown?"}]
    asked = chat(tiny_client, messages=[{"role": "user", "content": content}], max_tokens=8)
    assert seen.choices[0].text.strip() == asked.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="images: the prompt has 1 <image> for 0 images"):
        tiny_client.completions.create(**with_image)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        tiny_client.completions.create(**given | {"prompt": ["a", "b"]})
    with pytest.raises(openai.BadRequestError, match="echo: not supported here"):
        tiny_client.completions.create(**given, echo=True)


@pytest.mark.parametrize(("token", "text"), [("▁chest", " chest chest"), ("▁", "  ")])
def test_a_completion_keeps_the_blanks_around_it(tiny_client, checkpoint, token, text):
    forced = {load_tokenizer(checkpoint).convert_tokens_to_ids(token): 100}
    given = {"model": "tiny", "prompt": "The left", "max_tokens": 2, "logit_bias": forced}
    assert tiny_client.completions.create(**given).choices[0].text == text
    with tiny_client.completions.create(**given, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_bytes_of_tokens_make_the_text(tiny_client):
    """The model has no token for these characters: it says them byte by byte."""
    only = {"const": "日本 é"}
    reply = chat(tiny_client, response_format=schema_format(only), logprobs=True, top_logprobs=1).choices[0]
    content = reply.logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == reply.message.content == '"日本 é"'
    first = next(entry for entry in content if entry.bytes == [0xE6])
    assert first.top_logprobs[0].bytes and "\ufffd" in first.token
    given = {"model": "tiny", "prompt": "Hi", "max_tokens": 60, "logprobs": 1, "extra_body": {"json_schema": only}}
    told = tiny_client.completions.create(**given).choices[0].logprobs
    assert "bytes:\\xe6" in told.tokens and told.text_offset[-1] == len('"日本 é')


def test_responses(tiny_client):
    expected = chat(tiny_client, max_tokens=8).choices[0].message.content
    given = {"model": "tiny", "input": "What is shown?", "max_output_tokens": 8}
    reply = tiny_client.responses.create(**given)
    assert reply.output_text == expected and reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens" and reply.usage.output_tokens == 8
    assert reply.usage.input_tokens_details.cached_tokens >= 0
    with tiny_client.responses.stream(**given) as stream:
        events = list(stream)
    whole = events[-1].response
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert whole.output_text == expected and events[-1].type == "response.incomplete"
    kinds = [event.type for event in events if "delta" not in event.type]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def test_responses_with_images_turns_and_instructions(tiny_client):
    parts = [{"type": "input_image", "image_url": data_url()}, {"type": "input_text", "text": "What is shown?"}]
    turns = [
        {"role": "user", "content": parts},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A lung."}]},
        {"role": "user", "content": "Which side?"},
    ]
    reply = tiny_client.responses.create(model="tiny", input=turns, instructions="Be brief.", max_output_tokens=8)
    content = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": "What is shown?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A lung."},
        {"role": "user", "content": "Which side?"},
    ]
    assert reply.output_text == chat(tiny_client, messages=messages, max_tokens=8).choices[0].message.content


def test_responses_that_are_json_or_calls(tiny_client):
    shape = {"format": {"type": "json_schema", "name": "finding", "schema": FINDING, "strict": True}}
    reply = tiny_client.responses.create(model="tiny", input="What?", text=shape, max_output_tokens=100)
    assert set(json.loads(reply.output_text)) == {"finding", "size"} and reply.status == "completed"
    assert reply.text.format.to_dict() == shape["format"]
    tools = [{"type": "function", "name": each["function"]["name"], "parameters": each["function"]["parameters"],
              "strict": True} for each in TOOLS]  # fmt: skip
    given = {"model": "tiny", "input": "What?", "tools": tools, "max_output_tokens": 100}
    for choice in ("required", {"type": "function", "name": "report"}):
        (call,) = tiny_client.responses.create(**given, tool_choice=choice).output
        assert call.type == "function_call" and call.name in ("report", "point") and json.loads(call.arguments)
        with tiny_client.responses.stream(**given, tool_choice=choice) as stream:
            (streamed,) = stream.get_final_response().output
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
        told = [
            {"role": "user", "content": "What?"},
            {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
            {"type": "function_call_output", "call_id": call.call_id, "output": "seen"},
        ]
        assert tiny_client.responses.create(model="tiny", input=told, max_output_tokens=8).output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id: not supported here"):
        tiny_client.responses.create(model="tiny", input="What?", previous_response_id="resp_1")
