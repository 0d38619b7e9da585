"""A worker that says any number of tokens at once, each with as many others as are asked for:
`python -m tests.security.talking_worker --port …`."""

import threading

from llava.commandline import ArgumentParser, run
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.worker.answering import Piece
from tests.serve.scripted_worker import add_worker_flags, serve_backend


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
    parser = ArgumentParser()
    add_worker_flags(parser)
    parser.add_argument("--max-body-bytes", type=int, default=64 << 20)
    args = parser.parse_args(argv)
    serve_backend(args, TalkingBackend(), "talking", 1, timeout=300, max_body=args.max_body_bytes)


if __name__ == "__main__":
    run(main)
