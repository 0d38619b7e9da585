"""A worker that says any number of tokens at once, each with as many others as are asked for:
`python -m tests.security.talking_worker --port …`."""

import asyncio
import threading

from llava.commandline import ArgumentParser, run
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.worker.answering import Piece


class TalkingBackend:
    def __init__(self):
        self.received = 0

    def submit(self, job, put):
        count, top = job.sampling.max_new_tokens, job.sampling.logprobs
        self.received += 1
        threading.Thread(target=self._answer, args=(job, count, top, put), daemon=True).start()
        return lambda: None

    def _answer(self, job, count, top, put):
        others = [{"token": f"word{place} ", "logprob": -0.5 - place} for place in range(top or 0)]
        usage = {"prompt_tokens": 1, "completion_tokens": count, "cached_tokens": 0}
        entry = {"token": "word0 ", "logprob": -0.5, "top": others}
        entries = () if top is None else (entry,) * count
        if job.stream:
            for place in range(count):
                put(Piece("word0 ", entries[:1], (place,)))
            put(Piece(finish_reason="length", usage=usage))
        else:
            put(Piece("word0 " * count, entries, tuple(range(count)), "length", usage))

    def attention_map(self, job, token_ids):
        raise ServeError(ErrorType.BAD_REQUEST, "not here")

    def stats(self):
        return {"queue_length": 0, "received": self.received}

    def close(self):
        pass


def main(argv=None):
    from llava.serve.secret import add_secret_flags, secret_from_args
    from llava.serve.worker.app import WorkerApp, serve
    from llava.serve.worker.heartbeat import Membership

    parser = ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--controller")
    parser.add_argument("--max-body-bytes", type=int, default=64 << 20)
    add_secret_flags(parser)
    args = parser.parse_args(argv)

    async def go():
        secret = secret_from_args(args)
        worker = WorkerApp(TalkingBackend(), ["talking"], secret, timeout=300, max_body=args.max_body_bytes)
        member = Membership(args.controller, f"http://127.0.0.1:{args.port}", worker.status, secret)
        await serve(worker, "127.0.0.1", args.port, member, 1)

    asyncio.run(go())


if __name__ == "__main__":
    run(main)
