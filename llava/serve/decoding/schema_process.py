"""A process that compiles JSON schemas and may be killed for one: see `decoding.schemas`."""

import resource

from llava.errors import LlavaError
from llava.generation.constraint import compile_schema
from llava.serve.decoding.process import run

STACK = 4 << 20
"""Bytes; a worker's threads have more, so that what is compiled here doesn't go too deep there."""


def main() -> None:
    import llguidance

    # What compiling takes doesn't depend on the vocabulary.
    tokenizer = llguidance.LLTokenizer("byte")

    def answer(content: bytes, _: dict) -> tuple[dict, bytes]:
        try:
            compile_schema(tokenizer, content.decode())
        except LlavaError as error:
            return {"error": str(error)}, b""
        return {}, b""

    run(lambda: resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK)), answer)
