"""OpenAI's own client, of whichever major version is installed: prints what it got as JSON."""

import json
import sys

import openai

url, image = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def ask(*content, **more):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": [{"role": "user", "content": list(content)}], "max_tokens": 8} | more
    )


text = {"type": "text", "text": "What is shown?"}
picture = {"type": "image_url", "image_url": {"url": image}}
found = {"version": openai.__version__}
found["text"] = ask(text).choices[0].message.content
found["image"] = ask(picture, text).choices[0].message.content
found["images"] = ask(picture, picture, text).choices[0].message.content
chunks = list(ask(picture, text, stream=True, stream_options={"include_usage": True}))
found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
found["usage"] = chunks[-1].usage.completion_tokens
found["several"] = [choice.message.content for choice in ask(text, n=2, temperature=1, seed=7).choices]
found["again"] = [choice.message.content for choice in ask(text, n=2, temperature=1, seed=7).choices]
found["stopped"] = ask(text, stop=[found["text"].strip()[2]]).choices[0].message.content
found["logprobs"] = len(ask(text, logprobs=True, top_logprobs=2).choices[0].logprobs.content)
try:
    ask(text, frequency_penalty=1)
except openai.BadRequestError as error:
    found["refused"] = error.message
print(json.dumps(found))
