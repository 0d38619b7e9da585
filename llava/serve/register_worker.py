"""Tell a controller of a worker by hand, for one that doesn't register by itself (--no-register).

It stays known until the controller is stopped, or with --check-heart-beat as long as its heartbeats come.

python -m llava.serve.register_worker --controller-address http://localhost:21001 --worker-name http://HOST:21002
"""

import json

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.serve.secret import add_secret_flags, secret_from_args

READ_TIMEOUT = 15.0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--controller-address", "--controller", default="http://localhost:21001", help="whom to tell")
    parser.add_argument("--worker-name", required=True, help="the worker's address, http://HOST:PORT")
    parser.add_bool("--check-heart-beat", help="drop the worker when its heartbeats stop")
    add_secret_flags(parser)
    return parser


def main(argv=None) -> int:
    import asyncio

    args = build_parser().parse_args(argv)
    write_line(f"registered {asyncio.run(_register(args, secret_from_args(args)))}")
    return 0


async def _register(args, secret: str | None) -> str:
    """The address as the controller noted it."""
    import aiohttp

    from llava.serve.transport.session import open_session, read_reply

    body = {"worker_name": args.worker_name, "check_heart_beat": args.check_heart_beat}
    session = open_session(secret, READ_TIMEOUT)
    try:
        url = args.controller_address.rstrip("/") + "/register_worker"
        async with session.post(url, json=body, allow_redirects=False) as reply:
            content = await read_reply(reply)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LlavaError(f"controller {args.controller_address} can't be reached ({type(error).__name__})") from error
    finally:
        await session.close()
    try:
        answer = json.loads(content)
        if reply.status == 200:
            return answer["registered"]
        words = answer["error"]["message"]
    except (ValueError, KeyError, TypeError):
        words = f"status {reply.status}"
    raise LlavaError(f"controller {args.controller_address}: {words}")


if __name__ == "__main__":
    run(main)
