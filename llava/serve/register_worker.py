"""Tell a controller of a worker by hand, for one that doesn't register by itself (--no-register).

python -m llava.serve.register_worker --controller-address http://localhost:21001 --worker-name http://HOST:21002
"""

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.serve.secret import add_secret_flags, headers, secret_from_args


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--controller-address", "--controller", default="http://localhost:21001")
    parser.add_argument("--worker-name", required=True, help="the worker's address, http://HOST:PORT")
    parser.add_bool("--check-heart-beat", help="drop the worker when its heartbeats stop")
    add_secret_flags(parser)
    return parser


def main(argv=None) -> int:
    import httpx

    args = build_parser().parse_args(argv)
    body = {"worker_name": args.worker_name, "check_heart_beat": args.check_heart_beat, "worker_status": None}
    try:
        reply = httpx.post(
            args.controller_address.rstrip("/") + "/register_worker",
            json=body,
            headers=headers(secret_from_args(args)),
            timeout=15,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LlavaError(f"controller {args.controller_address} can't be reached ({type(error).__name__})") from error
    if reply.status_code != 200:
        try:
            words = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            words = f"status {reply.status_code}"
        raise LlavaError(f"controller {args.controller_address}: {words}")
    write_line(f"registered {reply.json()['registered']}")
    return 0


if __name__ == "__main__":
    run(main)
