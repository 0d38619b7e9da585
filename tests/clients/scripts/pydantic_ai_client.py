"""pydantic-ai: what it has settings for, and a typed result; prints what it got as JSON."""

import asyncio
import base64
import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, image = sys.argv[1:]
model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="none"))
picture = BinaryContent(base64.b64decode(image.partition(",")[2]), media_type="image/png")
settings = {"max_tokens": 8, "temperature": 0}


class Finding(BaseModel):
    is_nodule: bool
    sides: list[bool]


async def main():
    agent = Agent(model)
    found = {"text": (await agent.run("What is shown?", model_settings=settings)).output}
    found["image"] = (await agent.run([picture, "What is shown?"], model_settings=settings)).output
    found["images"] = (await agent.run([picture, picture, "What is shown?"], model_settings=settings)).output
    async with agent.run_stream([picture, "What is shown?"], model_settings=settings) as run:
        found["stream"] = [text async for text in run.stream_text()][-1]
        found["usage"] = run.usage().output_tokens if callable(run.usage) else run.usage.output_tokens
    drawn = settings | {"temperature": 1, "seed": 7}
    found["several"], found["again"] = [
        (await agent.run("What is shown?", model_settings=drawn)).output for _ in range(2)
    ]
    stopped = settings | {"stop_sequences": [found["text"].strip()[2]]}
    found["stopped"] = (await agent.run("What is shown?", model_settings=stopped)).output
    noted = settings | {"openai_logprobs": True, "openai_top_logprobs": 2}
    answer = (await agent.run("What is shown?", model_settings=noted)).all_messages()[-1]
    found["logprobs"] = len(answer.provider_details["logprobs"])
    try:
        await agent.run("What is shown?", model_settings=settings | {"frequency_penalty": 1})
    except ModelHTTPError as error:
        found["refused"] = str(error)
    typed = {}
    for output in (NativeOutput(Finding), ToolOutput(Finding)):
        answer = await Agent(model, output_type=output).run(
            "What is shown?", model_settings={"max_tokens": 200, "temperature": 1, "seed": 3}
        )
        typed[type(output).__name__] = isinstance(answer.output, Finding)
    found["structured"] = typed
    print(json.dumps(found))


asyncio.run(main())
