"""`Engine`: requests in, answers out. Offline (`generate`), one at a time (`stream`), or as a service (`submit`).

A caller that waits for an answer runs the engine's steps, unless `start` has begun a thread for them. After `stop`
nothing is taken in until `start`.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch

from llava.bars import tqdm
from llava.errors import LlavaError
from llava.generation.attention.map import AttentionMap, read_weights
from llava.generation.cache.memory import cache_budget
from llava.generation.detokenize import Detokenizer
from llava.generation.image_features import ImageEncoder
from llava.generation.prompts import Prompt, PromptBuilder
from llava.generation.runner import Runner
from llava.generation.scheduler import Scheduler
from llava.generation.state import Generation, Listener
from llava.generation.types import (
    Answer,
    ContextTooLong,
    EngineBusy,
    EngineStopped,
    OutOfMemory,
    Piece,
    Request,
    name_request,
)
from llava.model import LoadedModel
from llava.model.products import use_onednn

log = logging.getLogger(__name__)

_MOST_FEATURES = 512 << 20


class Engine:
    """Answers requests with a model from `llava.model.load_pretrained_model`.

    Args:
        loaded: (tokenizer, model, image processor, context length).
        max_batch_size: requests computed at the same time.
        max_waiting: requests that may wait; one more is refused with EngineBusy. None is no limit.
        cache_bytes: memory for keys and values of running requests; by default half of what is free.
        prefix_bytes: for those of earlier prompts, kept for the next turn and the next question about an image.
        feature_bytes: for features of images; by default a quarter of `cache_bytes`, at most 512 MB.
        max_prefill: positions of prompts computed in one pass.
        paged: keys and values in pages and a layer's products joined; by default on a GPU alone. A model that is in
            training keeps its own form with False; else its linear modules compute by oneDNN on the CPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch_size: int = 64,
        max_waiting: int | None = None,
        cache_bytes: int | None = None,
        prefix_bytes: int | None = None,
        feature_bytes: int | None = None,
        max_prefill: int = 16_384,
        paged: bool | None = None,
    ):
        self.tokenizer, self.model, image_processor, self.context_len = loaded
        self.model.eval()
        if paged is not False:
            use_onednn(self.model)
        self.max_waiting = max_waiting
        budget = cache_budget(self.model) if cache_bytes is None else cache_bytes
        features = min(budget // 4, _MOST_FEATURES) if feature_bytes is None else feature_bytes
        self.encoder = ImageEncoder(self.model, image_processor, features)
        self.prompts = PromptBuilder(self.tokenizer, self.model.config, self.encoder, self.context_len)
        prefix_bytes = budget // 4 if prefix_bytes is None else prefix_bytes
        runner = Runner(self.model, self.encoder, budget, self.context_len, paged=paged, max_rows=max_batch_size)
        self.scheduler = Scheduler(runner, Detokenizer(self.tokenizer), max_batch_size, max_prefill, prefix_bytes)
        self._stepping = threading.Lock()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def generate(self, requests: Sequence[Request], progress: bool | str | None = None) -> list[Answer]:
        """Answers in the order of the requests.

        Requests about the same image are computed together, else those of like length. `progress` shows a bar
        (with that text before it).

        Raises:
            EngineStopped: by `stop`, and not started again.
            LlavaError: a request that can't be answered: the error names it, and nothing is answered.
        """
        known: dict[int, Any] = {}
        prompts = []
        for request in requests:
            prompts.append(self.prompts.build(request, known))
            for image in prompts[-1].images:
                image.pixels = None  # with `anyres` it was opened to know its length; all at once would be gigabytes
        order = _batch_order(prompts)
        answers: list[Answer | None] = [None] * len(requests)
        underway: set[Generation] = set()
        label = progress if isinstance(progress, str) else None
        self.scheduler.announce(prompts)
        announced = iter(order)
        try:
            with tqdm(total=len(requests), desc=label, unit="answer", disable=not progress) as bar, _patient(self):
                for index in self._prepared(prompts, order):
                    generation = self._generation(prompts[index], underway, answers, index, bar)
                    underway.add(generation)
                    self._take_in(generation, is_announced=True)
                    next(announced)
                    while len(self.scheduler.waiting) >= self.scheduler.max_batch_size:
                        self._advance()
                while underway:
                    self._advance()
        finally:
            self.scheduler.announce([prompts[index] for index in announced], -1)
            for generation in list(underway):  # the engine's thread may take some out meanwhile
                self.scheduler.cancel(generation)
            if underway and self._thread is None:
                self._advance()
        done = [answer for answer in answers if answer is not None]
        for answer in done:
            if answer.error is not None:
                name_request(answer.error, answer.id)
                raise answer.error
        return done

    def stream(self, request: Request) -> Iterator[str]:
        """Pieces of one answer's text as they are made; their join is `generate`'s text.

        Closing the iterator gives the request up.
        """
        with self.submit(request) as handle:
            for piece in handle:
                yield piece.text

    def submit(self, request: Request, listener: Listener | None = None, pieces: bool = True) -> "Handle":
        """Queue a request; images are opened here, in the caller's thread.

        Args:
            listener: is given each Piece and finally the Answer, in the engine's thread (it must return at once; once
                it raises, which is logged, it is given no more). Without one the handle is iterated.
            pieces: False gives the Answer alone, which costs less.

        Raises:
            EngineBusy: too many are waiting.
            EngineStopped: by `stop`, and not started again.
            ContextTooLong, LlavaError: the request can't be answered.
        """
        if self.max_waiting is not None and len(self.scheduler.waiting) >= self.max_waiting:
            raise EngineBusy(f"{self.max_waiting} requests are waiting already; try again in a moment")
        prompt = self.prompts.build(request)
        self.encoder.prepare(prompt.images)
        handle = Handle(self)
        handle.generation = Generation(
            prompt, self.scheduler.detokenizer, listener or handle.put, is_streamed=pieces, keep=True
        )
        self._take_in(handle.generation)
        return handle

    def attention_map(self, request: Request, token_ids: Sequence[int]) -> AttentionMap:
        """Where the model looked when it answered `request` with `token_ids` (an Answer's): computed anew.

        Between two steps, so that requests under way wait as long as for one prompt.

        Raises:
            ContextTooLong, OutOfMemory, LlavaError: no token, or an id that the vocabulary doesn't have.
        """
        prompt = self.prompts.build(request)
        ids = np.asarray(token_ids, np.int64)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
            raise LlavaError(f"the answer's token_ids have to be at least one id from 0 to {vocabulary - 1}")
        if len(prompt) + len(ids) > self.context_len:
            raise ContextTooLong(f"prompt and answer are longer than the model's context of {self.context_len}")
        self.encoder.prepare(prompt.images)
        # The last token is no query: what made it is the position before it.
        whole = replace(prompt, ids=np.concatenate([prompt.ids, ids[:-1]]))
        with self._stepping, torch.inference_mode():
            try:
                weights = self.scheduler.runner.watch(whole, len(ids)).cpu().numpy()
            except torch.OutOfMemoryError as error:
                raise OutOfMemory("the device ran out of memory for this view; try a shorter answer") from error
        return read_weights(prompt, ids.tolist(), weights, self.encoder, self.scheduler.detokenizer)

    def start(self) -> None:
        """Run the steps in a thread of the engine's own until `stop`."""
        while self._is_stopped and (ending := self._thread) is not None:
            self._end(ending)
        with self._work:
            if self._thread is None:
                self._is_stopped = False
                self._thread = threading.Thread(target=self._serve, name="llava-engine", daemon=True)
                self._thread.start()

    def stop(self, drain: bool = True) -> None:
        """End the thread: after everything taken in is answered, or (without `drain`) with EngineStopped for all.

        From its first moment on nothing is taken in, until `start`. Without a thread it does nothing.

        Raises:
            LlavaError: called by a listener, in the thread that it would wait for.
        """
        with self._work:
            thread = self._thread
            if thread is None:
                return
            if thread is threading.current_thread():
                raise LlavaError("a listener can't stop the engine that calls it; call stop() in another thread")
            self._is_stopped = True
            self._work.notify()
        if not drain:
            self._abort(EngineStopped("the engine was stopped"))
        self._end(thread)

    def statistics(self) -> dict[str, int]:
        """Numbers for a metrics page: gauges `running` and `waiting`, the rest counted since the start."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            **vars(self.scheduler.counts),
            "images_encoded": self.encoder.encoded,
            "images_reused": self.encoder.reused,
            "prefixes": len(self.scheduler.prefixes),
        }

    def _end(self, thread: threading.Thread) -> None:
        thread.join()
        with self._work:
            if self._thread is thread:
                self._thread = None

    def _take_in(self, generation: Generation, is_announced: bool = False) -> None:
        """Queue it; refused from `stop` on, because the thread may have looked for the last time."""
        with self._work:
            if self._is_stopped:
                raise EngineStopped("the engine was stopped; call start() to have it take requests in again")
            self.scheduler.submit(generation, is_announced)
            self._work.notify()

    def _generation(
        self,
        prompt: Prompt,
        underway: set[Generation],
        answers: list[Answer | None],
        index: int,
        bar: tqdm,
    ) -> Generation:
        def done(answer: Piece | Answer) -> None:
            answers[index] = cast(Answer, answer)  # whole, because it isn't streamed
            underway.discard(generation)
            bar.update()

        generation = Generation(prompt, self.scheduler.detokenizer, done, is_streamed=False, keep=False)
        return generation

    def _prepared(self, prompts: list[Prompt], order: list[int]) -> Iterator[int]:
        """The indices of `order`, each once its images are opened; a few threads work ahead."""
        if not any(prompt.images for prompt in prompts):
            yield from order
            return
        workers = 4 if self.scheduler.runner.device.type == "cuda" else 1
        ahead = 2 * self.scheduler.max_batch_size
        with ThreadPoolExecutor(workers, "llava-images") as pool:
            remaining = iter(order)
            tasks: queue.SimpleQueue[tuple[int, Future[None]]] = queue.SimpleQueue()
            for index in islice(remaining, ahead):
                tasks.put((index, pool.submit(self.encoder.prepare, prompts[index].images)))
            try:
                while not tasks.empty():
                    index, task = tasks.get()
                    try:
                        task.result()
                    except LlavaError as error:
                        name_request(error, prompts[index].request.id)
                        raise
                    for following in islice(remaining, 1):
                        tasks.put((following, pool.submit(self.encoder.prepare, prompts[following].images)))
                    yield index
            finally:
                pool.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        """One step, made here or by the engine's thread."""
        if self._thread is not None:
            time.sleep(0.002)
            return
        with self._stepping:
            self.scheduler.step()

    def _serve(self) -> None:
        while True:
            with self._work:
                while self.scheduler.is_idle and not self._is_stopped:
                    self._work.wait(1.0)
                if self.scheduler.is_idle:
                    return
            try:
                with self._stepping:
                    self.scheduler.step()
            except BaseException as error:
                # Whatever it was, a panic of a library too: other requests must not wait for ever.
                log.exception("a step of the engine failed; everything under way ends with an error")
                self._abort(LlavaError(f"the engine failed ({type(error).__name__}); send the request again"))

    def _abort(self, error: LlavaError) -> None:
        with self._stepping:
            self.scheduler.abort(error)


class Handle:
    """A request that was submitted. Iterate it for pieces; `answer` is there when the iteration is over."""

    def __init__(self, engine: Engine):
        self.generation: Generation | None = None
        self.answer: Answer | None = None
        self._engine = engine
        self._news: queue.SimpleQueue[Piece | Answer] = queue.SimpleQueue()

    def put(self, news: Piece | Answer) -> None:
        self._news.put(news)

    def __iter__(self) -> Iterator[Piece]:
        """Raises the error (LlavaError) that ended the answer, if one did."""
        while self.answer is None:
            news = self._next()
            if isinstance(news, Answer):
                self.answer = news
            else:
                yield news
        if self.answer.error is not None:
            raise self.answer.error

    def cancel(self) -> None:
        """Give the request up; its place is free after the next step."""
        if self.answer is None and self.generation is not None:
            self._engine.scheduler.cancel(self.generation)
            with self._engine._work:
                self._engine._work.notify()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        if self.answer is None:
            self.cancel()
            if self._engine._thread is None:
                self._engine._advance()

    def _next(self) -> Piece | Answer:
        if self._engine._thread is not None:
            return self._news.get()
        while self._news.empty():
            self._engine._advance()
        return self._news.get()


@contextmanager
def _patient(engine: Engine) -> Iterator[None]:
    """The scheduler takes requests in by the half batch while a `generate` runs and nobody else waits."""
    engine.scheduler.is_patient = engine._thread is None
    try:
        yield
    finally:
        engine.scheduler.is_patient = False


def _batch_order(prompts: Sequence[Prompt]) -> list[int]:
    """Indices, longest first, but requests that share a beginning (an image) one after the other."""
    groups: dict[bytes | int, list[int]] = {}
    """By the beginning's digest; a prompt that shares none is alone, under its index."""
    for index, prompt in enumerate(prompts):
        shared = prompt.beginnings[1] or prompt.beginnings[2]
        groups.setdefault(shared.digest if shared else index, []).append(index)
    longest_first = [sorted(group, key=lambda index: -len(prompts[index])) for group in groups.values()]
    longest_first.sort(key=lambda group: -len(prompts[group[0]]))
    return [index for group in longest_first for index in group]
