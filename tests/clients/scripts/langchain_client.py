"""LangChain's ChatOpenAI: prints what it got as JSON."""

import json
import sys

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, image = sys.argv[1:]


class Side(BaseModel):
    is_left: bool


def model(**more):
    return ChatOpenAI(**{"model": "tiny", "base_url": url, "api_key": "none", "max_tokens": 8, "max_retries": 0} | more)


def ask(*content):
    return [HumanMessage(content=list(content))]


text = {"type": "text", "text": "What is shown?"}
picture = {"type": "image_url", "image_url": {"url": image}}
greedy = model(temperature=0)
found = {"text": greedy.invoke(ask(text)).content}
found["image"] = greedy.invoke(ask(picture, text)).content
found["images"] = greedy.invoke(ask(picture, picture, text)).content
chunks = list(model(temperature=0, stream_usage=True).stream(ask(picture, text)))
found["stream"] = "".join(chunk.content for chunk in chunks)
found["usage"] = max(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
hot = model(temperature=1, seed=7, n=2)
found["several"] = [one.text for one in hot.generate([ask(text)]).generations[0]]
found["again"] = [one.text for one in hot.generate([ask(text)]).generations[0]]
found["stopped"] = greedy.invoke(ask(text), stop=[found["text"].strip()[2]]).content
whole = model(temperature=0, logprobs=True, top_logprobs=2).invoke(ask(text))
found["logprobs"] = len(whole.response_metadata["logprobs"]["content"])
structured = {}
for method in ("json_schema", "function_calling"):
    answer = model(temperature=0, max_tokens=60).with_structured_output(Side, method=method).invoke(ask(text))
    structured[method] = isinstance(answer, Side)
found["structured"] = structured
try:
    model(frequency_penalty=1).invoke(ask(text))
except openai.BadRequestError as error:
    found["refused"] = str(error)
print(json.dumps(found))
