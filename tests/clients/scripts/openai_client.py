"""OpenAI's own client, of whichever major version is installed: prints what it got as JSON."""

import json
import sys

import openai
from common_questions import asked_in_common

url, image = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def ask(*content, **more):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": [{"role": "user", "content": list(content)}], "max_tokens": 8} | more
    )


found = asked_in_common(ask, image, openai.BadRequestError)
print(json.dumps(found | {"version": openai.__version__}))
