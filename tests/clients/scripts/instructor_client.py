"""instructor in its modes for JSON and for functions: prints what it got as JSON."""

import json
import sys

import instructor
import openai
from pydantic import BaseModel

url, image = sys.argv[1:]


class Finding(BaseModel):
    is_nodule: bool
    sides: list[bool]


found = {}
picture = {"type": "image_url", "image_url": {"url": image}}
content = [picture, {"type": "text", "text": "What is shown?"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        response_model=Finding,
        max_retries=0,
        max_tokens=200,
        temperature=1,
        seed=3,
    )
    found[mode.value] = isinstance(answer, Finding)
print(json.dumps(found))
