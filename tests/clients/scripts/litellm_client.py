"""LiteLLM: prints what it got as JSON."""

import json
import sys

import litellm
from common_questions import asked_in_common

url, image = sys.argv[1:]


def ask(*content, **more):
    messages = [{"role": "user", "content": list(content)}]
    given = {"model": "openai/tiny", "api_base": url, "api_key": "none", "messages": messages, "max_tokens": 8}
    return litellm.completion(**given | more)


print(json.dumps(asked_in_common(ask, image, litellm.BadRequestError)))
