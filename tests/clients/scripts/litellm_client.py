"""LiteLLM: prints what it got as JSON."""

import json
import sys

import litellm

url, image = sys.argv[1:]


def ask(*content, **more):
    messages = [{"role": "user", "content": list(content)}]
    given = {"model": "openai/tiny", "api_base": url, "api_key": "none", "messages": messages, "max_tokens": 8}
    return litellm.completion(**given | more)


text = {"type": "text", "text": "What is shown?"}
picture = {"type": "image_url", "image_url": {"url": image}}
found = {"text": ask(text).choices[0].message.content}
found["image"] = ask(picture, text).choices[0].message.content
found["images"] = ask(picture, picture, text).choices[0].message.content
chunks = list(ask(picture, text, stream=True, stream_options={"include_usage": True}))
found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
found["usage"] = next(chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None))
found["several"] = [choice.message.content for choice in ask(text, n=2, temperature=1, seed=7).choices]
found["again"] = [choice.message.content for choice in ask(text, n=2, temperature=1, seed=7).choices]
found["stopped"] = ask(text, stop=[found["text"].strip()[2]]).choices[0].message.content
found["logprobs"] = len(ask(text, logprobs=True, top_logprobs=2).choices[0].logprobs.content)
try:
    ask(text, frequency_penalty=1)
except litellm.BadRequestError as error:
    found["refused"] = str(error)
print(json.dumps(found))
