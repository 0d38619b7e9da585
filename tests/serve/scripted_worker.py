"""A worker whose engine does what the question says: `python -m tests.serve.scripted_worker --port …`.

All of the HTTP side is real; only the model isn't. The last word of the question decides: `oom`, `context`, `full`,
`image`, `crash` (the engine's thread raises), `die` (the process is gone), `slow` (20 s),
`hold` (says its words, then waits to be stopped, 5 minutes at most); else it says `echo: …`,
word by word.
"""

import base64
import heapq
import itertools
import os
import threading
import time

import numpy as np

from llava.commandline import ArgumentParser, run
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.images import open_uploaded_image, png_data_url
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import ModelCard
from llava.serve.worker.answering import Piece

REFUSED = {
    "oom": ErrorType.OUT_OF_MEMORY,
    "context": ErrorType.CONTEXT_TOO_LONG,
    "full": ErrorType.QUEUE_FULL,
    "image": ErrorType.BAD_IMAGE,
}


class Timetable:
    """One thread for all answers, as an engine has: runs scripts, which yield the seconds until they go on."""

    def __init__(self):
        self._due: list = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, script, seconds: float = 0.0) -> None:
        """Run `script` then; one that has been run to its end by then is passed over."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), script))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                _, _, script = heapq.heappop(self._due)
            seconds = next(script, None)
            if seconds is not None:
                self.add(script, seconds)


class ScriptedBackend:
    def __init__(self, pause: float, names_images: bool = True):
        self.pause, self.names_images = pause, names_images
        self.timetable = Timetable()
        self.running = 0
        self.cancelled = 0

    def _asked(self, job) -> str:
        """The question, with or without the places of its images, which no model would say."""
        text = job.prompt or job.messages[-1].text
        return text if self.names_images else text.replace(DEFAULT_IMAGE_TOKEN, "")

    def submit(self, job, put):
        text = self._asked(job)
        word = text.split()[-1] if text.strip() else ""
        if word in REFUSED:
            raise ServeError(REFUSED[word], retry_after=2.0 if word == "full" else None)
        if word == "crash":
            raise ValueError("address 0x7f00 of /secret/path")
        stopped = threading.Event()
        self.running += 1
        script = self._answer(job, text, put, stopped)
        self.timetable.add(script)

        def stop():
            stopped.set()
            self.timetable.add(script)

        return stop

    def _answer(self, job, text, put, stopped):
        words = ["echo:", *text.split()]
        if words[-1] == "slow":
            words *= 100
        said = 0
        last = len(words) - 1 if words[-1] == "hold" else None
        for place, word in enumerate(words[: job.sampling.max_new_tokens]):
            if word == "die":
                yield 0.2
                os._exit(9)
            top = [{"token": word, "logprob": -0.5}][: job.sampling.logprobs or 0]
            logprobs = (
                ({"token": word + " ", "logprob": -0.5, "top": top},) if job.sampling.logprobs is not None else ()
            )
            put(Piece(word + " ", logprobs, (place,)))
            said += 1
            yield 300 if place == last else self.pause
            if stopped.is_set():
                self.cancelled += 1
                self.running -= 1
                return
        reason = "length" if len(words) > job.sampling.max_new_tokens else "stop"
        usage = {"prompt_tokens": len(text.split()), "completion_tokens": said, "cached_tokens": 0}
        self.running -= 1
        put(Piece(finish_reason=reason, usage=usage))

    def attention_map(self, job, token_ids):
        """Token n looks at patch n alone, with half of its attention."""
        views = []
        for number in range(len(job.images)):
            weights = np.zeros((len(token_ids), 4, 4), "<f2")
            weights.reshape(-1, 16)[np.arange(len(token_ids)), np.array(token_ids) % 16] = 0.5 / len(job.images)
            image = png_data_url(open_uploaded_image(job.images[number]).convert("RGB").resize((224, 224)))
            content = base64.b64encode(weights.tobytes()).decode()
            views.append({"number": number, "image": image, "side": 4, "weights": content})
        words = ["echo:", *self._asked(job).split()]
        return {
            "tokens": [words[token % len(words)] + " " for token in token_ids],
            "shares": [0.5] * len(token_ids),
            "views": views,
        }

    def seen_images(self, job):
        """Each image as a square of 64."""
        return {"images": [png_data_url(open_uploaded_image(image).resize((64, 64))) for image in job.images]}

    def stats(self):
        return {"queue_length": self.running, "running": self.running, "cancelled": self.cancelled}

    def close(self):
        pass


def add_worker_flags(parser: ArgumentParser) -> None:
    """What `serve_backend` reads."""
    from llava.serve.secret import add_secret_flags

    parser.add_argument("--port", type=int)
    parser.add_argument("--controller")
    add_secret_flags(parser)


def serve_backend(args, backend, model_name: str, grace: float, **options) -> None:
    """A worker over any backend, registered where a controller is named; `options` are WorkerApp's."""
    from llava.serve.secret import secret_from_args
    from llava.serve.worker.app import WorkerApp, run_serving, serve
    from llava.serve.worker.heartbeat import Membership

    async def go():
        secret = secret_from_args(args)
        worker = WorkerApp(backend, [model_name], secret, **options)
        member = None
        if args.controller:
            member = Membership(args.controller, f"http://127.0.0.1:{args.port}", worker.status, secret)
        await serve(worker, "127.0.0.1", args.port, member, grace)

    run_serving(go())


def main(argv=None):
    parser = ArgumentParser()
    add_worker_flags(parser)
    parser.add_argument("--model-name", default="scripted")
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_bool("--names-images", default=True, help="False: the echo leaves out the places of images")
    parser.add_argument("--trained-on", help="what the model's card says")
    args = parser.parse_args(argv)
    card = ModelCard(template="scripted", context="2,048 tokens", trained_on=args.trained_on)
    backend = ScriptedBackend(args.pause, args.names_images)
    serve_backend(args, backend, args.model_name, 20, timeout=args.timeout, card=card)


if __name__ == "__main__":
    run(main)
