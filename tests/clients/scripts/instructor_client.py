"""instructor in its modes for JSON and for functions, and without a type: prints what it got as JSON."""

import json
import sys

import instructor
import openai
from common_questions import TEXT, asked_in_common
from pydantic import BaseModel

url, image = sys.argv[1:]


class Finding(BaseModel):
    is_nodule: bool
    sides: list[bool]


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)


def ask(*content, mode=instructor.Mode.TOOLS, **more):
    messages = [{"role": "user", "content": list(content)}]
    given = {"model": "tiny", "messages": messages, "response_model": None, "max_tokens": 8}
    return client(mode).chat.completions.create(**given | more)


found = asked_in_common(ask, image, Exception)
found["structured"] = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    picture = {"type": "image_url", "image_url": {"url": image}}
    typed = {"response_model": Finding, "max_retries": 0, "max_tokens": 200, "temperature": 1, "seed": 3}
    found["structured"][mode.value] = isinstance(ask(picture, TEXT, mode=mode, **typed), Finding)
print(json.dumps(found))
