"""Ask a worker one question and write its answer as it comes: is the serving up?

Through the controller, as a page or an API would ask, or straight to --worker-address.

python -m llava.serve.test_message --model-name NAME --controller http://localhost:21001
"""

import sys

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError, for_terminal
from llava.serve.protocol import ServeError
from llava.serve.secret import add_secret_flags, secret_from_args

DEFAULT_MESSAGE = "Tell me a story with more than 1000 words."


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--controller-address", "--controller", default="http://localhost:21001", help="who knows the models"
    )
    parser.add_argument("--worker-address", help="ask this worker instead of one that the controller names")
    parser.add_argument("--model-name", default="", help="default: the first model that the controller knows")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--message", default=DEFAULT_MESSAGE, help="what to ask")
    add_secret_flags(parser)
    return parser


def main(argv=None) -> int:
    import asyncio

    args = build_parser().parse_args(argv)
    try:
        asyncio.run(_ask(args, secret_from_args(args)))
    except ServeError as error:
        raise LlavaError(f"{error.error_type.value}: {error}") from error
    return 0


async def _ask(args, secret: str | None) -> None:
    from llava.serve.client import ServingClient, WorkerClient

    client = ServingClient(args.controller_address, secret)
    try:
        model = args.model_name
        if args.worker_address:
            client = WorkerClient(args.worker_address, secret)
        elif not model:
            models = await client.models()
            if not models:
                raise LlavaError("the controller knows no model yet; start a worker")
            model = models[0]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": args.message}],
            "max_new_tokens": args.max_new_tokens,
        }
        said = ""
        async for chunk in client.generate(body):
            sys.stdout.write(for_terminal(chunk["text"][len(said) :]))
            sys.stdout.flush()
            said = chunk["text"]
        write_line()
    finally:
        await client.close()


if __name__ == "__main__":
    run(main)
