"""What every client that speaks OpenAI's form is asked: `ask(*content, **more)` is its chat completion."""

TEXT = {"type": "text", "text": "What is shown?"}


def asked_in_common(ask, image, refusal):
    """What came of it; `refusal` is the error that the client raises for a refused field."""
    picture = {"type": "image_url", "image_url": {"url": image}}
    found = {"text": ask(TEXT).choices[0].message.content}
    found["image"] = ask(picture, TEXT).choices[0].message.content
    found["images"] = ask(picture, picture, TEXT).choices[0].message.content
    chunks = list(ask(picture, TEXT, stream=True, stream_options={"include_usage": True}))
    found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    found["usage"] = next(chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None))
    found["several"] = [choice.message.content for choice in ask(TEXT, n=2, temperature=1, seed=7).choices]
    found["again"] = [choice.message.content for choice in ask(TEXT, n=2, temperature=1, seed=7).choices]
    found["stopped"] = ask(TEXT, stop=[found["text"].strip()[2]]).choices[0].message.content
    found["logprobs"] = len(ask(TEXT, logprobs=True, top_logprobs=2).choices[0].logprobs.content)
    try:
        ask(TEXT, frequency_penalty=1)
    except refusal as error:
        found["refused"] = str(error)
    return found
