"""A worker whose model is a word, and whose images are opened for real: `python -m tests.security.opening_worker`.

`--pooled False` is the deliberately vulnerable stand-in: images are opened in the worker itself, in the threads that
every request needs. `--hanging` has an image take for ever, wherever it is opened.
"""

import asyncio
import sys
import threading
import time

from llava.commandline import ArgumentParser, run
from llava.errors import ImageError
from llava.serve.decoding.pool import DecodingPool, _text_threads
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.worker.answering import Piece

STAND_IN = [sys.executable, "-m", "tests.serve.decoding_stand_in"]


class OpeningBackend:
    def __init__(self, pooled: bool, hanging: bool, seconds: float):
        self.pool = DecodingPool(2, seconds=seconds, command=STAND_IN if hanging else None)
        self.pooled, self.hanging = pooled, hanging
        self.opening = 0
        self.lock = threading.Lock()

    def submit(self, job, put):
        self._count(1)
        try:
            for image in job.images:
                self._open(image) if self.pooled else _text_threads.submit(self._open_here, image).result()
            # Every request passes the threads that take requests, as text does.
            if not self.pooled:
                _text_threads.submit(int).result()
        except ImageError as error:
            raise ServeError(ErrorType.BAD_IMAGE, str(error)) from error
        finally:
            self._count(-1)
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
        put(Piece("seen", finish_reason="stop", usage=usage))
        return lambda: None

    def _open(self, image):
        self.pool.open(image)

    def _open_here(self, image):
        from llava.images import read_upload
        from tests.security.image_bombs import open_plainly

        if self.hanging:
            time.sleep(600)
        open_plainly(read_upload(image))

    def _count(self, change):
        with self.lock:
            self.opening += change

    def attention_map(self, job, token_ids):
        raise ServeError(ErrorType.BAD_REQUEST, "not here")

    def stats(self):
        return {"queue_length": self.opening, "opening": self.opening}

    def close(self):
        self.pool.close()


def main(argv=None):
    from llava.serve.secret import add_secret_flags, secret_from_args
    from llava.serve.worker.app import WorkerApp, serve

    parser = ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_bool("--pooled", default=True)
    parser.add_bool("--hanging")
    parser.add_argument("--seconds", type=float, default=30.0)
    add_secret_flags(parser)
    args = parser.parse_args(argv)

    async def go():
        backend = OpeningBackend(args.pooled, args.hanging, args.seconds)
        await serve(
            WorkerApp(backend, ["opening"], secret_from_args(args), timeout=60), "127.0.0.1", args.port, None, 1
        )

    asyncio.run(go())


if __name__ == "__main__":
    run(main)
