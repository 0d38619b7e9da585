"""Continuous batching: requests join and leave the running batch at every step.

A step takes in waiting requests as far as rows and memory reach, computes their prompts (what several have in
common only once), and makes one token for every running request.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
import torch

from llava.errors import LlavaError
from llava.generation.beam import beam_search
from llava.generation.cache.prefix_store import PrefixStore
from llava.generation.decoding import Ahead, Arriving, Decoder
from llava.generation.detokenize import Detokenizer
from llava.generation.forward_pass import Row, split_into_passes
from llava.generation.prompts import Prompt
from llava.generation.runner import Runner
from llava.generation.sampling import SamplingTable
from llava.generation.state import Generation, Plan
from llava.generation.types import Counts, OutOfMemory, for_user

log = logging.getLogger(__name__)

_ROOM = 64
"""Positions beyond its prompt for which a request has to find memory before it is taken in."""


class Scheduler:
    """`submit` from any thread; `step` from one at a time."""

    def __init__(
        self, runner: Runner, detokenizer: Detokenizer, max_batch_size: int, max_prefill: int, prefix_bytes: int
    ):
        self.runner = runner
        self.detokenizer = detokenizer
        self.max_batch_size = max_batch_size
        self.max_prefill = max_prefill
        self.prefixes = PrefixStore(prefix_bytes)
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        """Generation i is in row i of the cache."""
        self.starting: list[Generation] = []
        """Taken in by the present step, and not yet running."""
        self.counts = Counts()
        self.is_patient = False
        """Take requests in by the half batch, not one by one: more throughput, later first tokens."""
        self._is_filling = False
        self._cancelled: set[Generation] = set()
        self._expected: Counter[bytes] = Counter()
        """How many requests are announced or waiting for each beginning."""
        self._table: SamplingTable | None = None
        """Made for the rows that got the last tokens."""
        self._ahead: Ahead | None = None
        self._lock = threading.Lock()

    def announce(self, prompts: Iterable[Prompt], sign: int = 1) -> None:
        """Say which prompts will come (or, with `sign` -1, won't), so that what they share is kept for them."""
        digests = [beginning.digest for prompt in prompts for beginning in prompt.beginnings if beginning]
        with self._lock:
            for digest in digests:
                self._expected[digest] += sign
                if self._expected[digest] <= 0:
                    del self._expected[digest]

    def submit(self, generation: Generation, is_announced: bool = False) -> None:
        if not is_announced:
            self.announce([generation.prompt])
        with self._lock:
            self.waiting.append(generation)

    def cancel(self, generation: Generation) -> None:
        """End it with the next step, whether it waits or runs; nothing happens if it is done."""
        with self._lock:
            self._cancelled.add(generation)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    @torch.inference_mode()
    def step(self) -> None:
        """Take in what fits, and make a token for each running request."""
        self._drop_cancelled()
        self._make_room()
        try:
            self._admit()
            if self.running or self.starting:
                error = self._try(len(self.running), list(self.starting))
                if error is not None:
                    counts = len(self.starting), len(self.running)
                    log.warning("%d prompts and %d running requests failed (%s)", *counts, type(error).__name__)
                    self._start_apart()
        finally:
            self._put_back()
        self.counts.steps += 1

    def abort(self, error: LlavaError) -> None:
        """End everything that waits or runs with `error`."""
        with self._lock:
            generations = [*self.running, *self.waiting]
            self.waiting.clear()
            self._expected.clear()
        self.running.clear()
        self._ahead = None
        self.runner.cache.release()
        for generation in generations:
            generation.finish("error", error)

    def _admit(self) -> None:
        """Move the waiting requests that are taken in now to `starting`, in order of arrival."""
        if not self._takes_in():
            return
        free = self.max_batch_size - len(self.running)
        positions, lengths = 0, self._next_lengths()
        while self.waiting and len(self.starting) < free:
            first = self.waiting[0]
            if not self._prepare(first):
                continue
            lengths.append(len(first.prompt) + min(_ROOM, first.left))
            if not self.runner.cache.holds(lengths):
                if self.running or self.starting:
                    break
                lengths = [len(first.prompt) + 1]  # alone it may have all the memory
                if not self.runner.cache.holds(lengths):
                    self._refuse(self.waiting.popleft())
                    lengths = []
                    continue
            positions += len(first.prompt)
            if self.starting and positions > self.max_prefill:
                break
            self.announce([first.prompt], -1)
            self.starting.append(self.waiting.popleft())
        # What one pass doesn't hold follows in the next, not when half the batch is free again.
        self._is_filling = bool(self.starting) and len(self.starting) < free

    def _takes_in(self) -> bool:
        """Whether requests wait and there are rows for them now."""
        free = self.max_batch_size - len(self.running)
        is_early = self.is_patient and not self._is_filling and self.running and free < self.max_batch_size // 2
        return bool(self.waiting and free and not is_early)

    def _put_back(self) -> None:
        """Have those wait who were taken in and neither started nor failed: something else went wrong."""
        self.announce([one.prompt for one in self.starting])
        with self._lock:
            self.waiting.extendleft(reversed(self.starting))
        self.starting.clear()

    def _prepare(self, first: Generation) -> bool:
        """Whether the first waiting request can be taken in; beams are done here, what fails is finished."""
        try:
            self.runner.encoder.prepare(first.prompt.images)
            if first.sampling.num_beams == 1:
                return True
            reasons = map(first.take, beam_search(self.runner, first.prompt))
            reason = next(filter(None, reasons), "stop")
        except (torch.OutOfMemoryError, LlavaError) as error:
            self._leave_queue(first).finish("error", for_user(error))
        else:
            self._leave_queue(first).finish(reason)
            self.counts.finished += 1
        return False

    def _leave_queue(self, generation: Generation) -> Generation:
        with self._lock:
            self.waiting.remove(generation)
        self.announce([generation.prompt], -1)
        return generation

    def _refuse(self, generation: Generation) -> None:
        self.announce([generation.prompt], -1)
        error = OutOfMemory(
            f"a prompt of {len(generation.prompt)} positions needs more memory than the engine was given; "
            f"shorten it or raise cache_bytes"
        )
        generation.finish("error", error)

    def _start_apart(self) -> None:
        """Compute the prompts of `starting` without those who run; where that fails too, of fewer at a time."""
        todo = [list(self.starting)]
        while todo:
            part = todo.pop(0)
            self.prefixes.clear()
            error = self._try(0, part)
            if error is not None and len(part) == 1:
                self.starting.remove(part[0])
                part[0].finish("error", for_user(error))
            elif error is not None:
                log.warning("%d prompts at once failed (%s); trying fewer", len(part), type(error).__name__)
                half = len(part) // 2 if isinstance(error, torch.OutOfMemoryError) else 1
                todo[:0] = [part[start : start + half] for start in range(0, len(part), half)]

    def _try(self, decoding: int, admitted: list[Generation]) -> Exception | None:
        """`_compute`; the error, if there was one and prompts are left that it may be tried with in another way.

        Without its traceback, which would keep the memory of all that the pass had made.
        """
        try:
            self._compute(decoding, admitted)
        except (torch.OutOfMemoryError, LlavaError) as error:
            if not set(admitted).intersection(self.starting):
                raise
            return error.with_traceback(None)
        return None

    def _compute(self, decoding: int, admitted: list[Generation]) -> None:
        """Run one forward pass: one more token of the first `decoding` running requests, and the prompts of `admitted`.

        A beginning that several of the prompts share is computed once. All of it goes into one pass because a pass has
        a high fixed cost.
        """
        running, plans = len(self.running), self._plan(admitted)
        if not plans and decoding == running and self.runner.decoder is not None:
            return self._decode(self.runner.decoder)
        row_of = {id(plan): running + place for place, plan in enumerate(plans)}
        most, room = self.runner.cache.max_width, self.runner.cache.room
        lengths = [min(len(plan.prompt) + min(room, plan.generation.left), most) for plan in plans]
        self._prepare_rows([*self._next_lengths(), *lengths])
        rows = [Row(row, one.length, one.length + 1) for row, one in enumerate(self.running[:decoding])]
        for row, plan in enumerate(plans, running):
            if plan.prefix is not None:
                self.runner.cache.load(row, 1, plan.prefix.states, plan.begin)
            rows.append(
                Row(row, plan.begin, len(plan.prompt), None if plan.source is None else row_of[id(plan.source)])
            )
        tokens = [one.tokens[-1] for one in self.running[:decoding]]
        prompts = [plan.prompt for plan in plans]
        hidden = [
            self.runner.run(rows[i:j], tokens[i:j], prompts[max(i - decoding, 0) : max(j - decoding, 0)])
            for i, j in split_into_passes([row.end - row.begin for row in rows], self.max_prefill)
        ]
        # What may fail for want of memory comes before anything is noted down.
        logits = self.runner.logits(torch.cat(hidden))
        for one in self.running[:decoding]:
            one.length += 1
        for row, plan in enumerate(plans, running):
            self._started(plan, row)
        if self.runner.decoder is not None:
            self.runner.decoder.forget()
            self._ahead = None
        self._take_tokens(running - decoding, logits)

    def _decode(self, decoder: Decoder) -> None:
        """One more token of every running request, from what is on the device."""
        running, ahead, self._ahead = self.running, self._ahead, None
        logits = None if ahead is None else ahead.of(running)
        if logits is None:
            self._prepare_rows(self._next_lengths())
            logits = decoder.logits(running, lambda: [one.tokens[-1] for one in running], self._lengths())
        for one in running:
            one.length += 1
        self._take_tokens(0, logits)

    def _run_ahead(self, decoder: Decoder) -> None:
        """Start the next step of the same rows while the host still works on this one's tokens.

        Not if one of them ends for sure, others are about to join, or memory is short. Whoever ends or joins otherwise
        changes nothing: the rows that stay keep their logits, and what is computed again is written again.
        """
        lengths = self._lengths()
        ends = any(one.left <= 1 for one in self.running)
        if ends or self._takes_in() or not decoder.goes_on(self.running, lengths):
            return
        if self.runner.cache.holds(self._next_lengths()):
            self._prepare_rows(self._next_lengths())
            self._ahead = Ahead(list(self.running), decoder.logits(self.running, list, lengths))

    def _lengths(self) -> list[int]:
        return [one.length for one in self.running]

    def _prepare_rows(self, lengths: list[int]) -> None:
        """Have room for rows of so many positions; kept beginnings are given up for it."""
        while True:
            try:
                return self.runner.cache.prepare(lengths, len(self.running))
            except torch.OutOfMemoryError:
                if not self.prefixes.drop_oldest():
                    raise

    def _plan(self, admitted: list[Generation]) -> list[Plan]:
        """What to compute of each prompt: not what was kept, and not what another one begins with too."""
        if not admitted:
            return []
        plans = [Plan(one, *self.prefixes.find(one.prompt.key[:-1])) for one in admitted]
        for level in range(len(admitted[0].prompt.beginnings)):
            owners: dict[bytes, Plan] = {}
            for plan in plans:
                beginning = plan.prompt.beginnings[level]
                if beginning is None or beginning.length <= plan.begin:
                    continue
                owner = owners.setdefault(beginning.digest, plan)
                if owner is not plan:
                    plan.prefix, plan.source, plan.begin = None, owner, beginning.length
                elif self._expected[beginning.digest]:
                    plan.kept_length = beginning.length
        # Sources first; then by length, so that attention's groups are of like ones.
        return sorted(plans, key=lambda plan: (plan.depth, plan.begin - len(plan.prompt)))

    def _started(self, plan: Plan, row: int) -> None:
        one = plan.generation
        one.length = len(one.prompt)
        one.cached = max(one.cached, plan.begin)
        self.counts.prompt_tokens += one.length
        self.counts.cached_tokens += plan.begin
        if plan.kept_length:
            self._keep(one.prompt.key[: plan.kept_length], row)
        self.starting.remove(one)
        self.running.append(one)

    def _next_lengths(self) -> list[int]:
        """Positions that the running rows need for their next token."""
        return [one.length + 1 for one in self.running]

    def _make_room(self) -> None:
        """If memory is short for the next tokens, the latest requests wait again; one that has all of it ends."""
        while self.running and not self.runner.cache.holds(self._next_lengths()):
            last = self.running[-1]
            if not self.runner.cache.holds_alone(last.length + 1):
                log.warning("an answer ends at %d tokens: it takes all of the engine's cache_bytes", len(last.tokens))
                self._leave({len(self.running) - 1: "length"})
                continue
            if len(self.running) == 1:
                break
            self.running.pop()
            self.counts.preempted += 1
            self.announce([last.prompt])
            last.continue_later()
            self.waiting.appendleft(last)
        self.runner.cache.trim(len(self.running))

    def _take_tokens(self, start: int, logits: torch.Tensor) -> None:
        """Choose the next token of the rows from `start` on; finished requests leave."""
        generations = self.running[start:]
        choosers = [one.chooser for one in generations]
        if self._table is None or not self._table.is_of(choosers):
            self._table = SamplingTable(choosers, logits.shape[-1], logits.device)
        chosen = self._table.choose(logits)
        if self.runner.decoder is not None:
            self.runner.decoder.follow(generations, chosen)
        logprobs = self._table.logprobs(logits, chosen, self.detokenizer)
        arriving = Arriving(chosen)
        if self.runner.decoder is not None and self.runner.decoder.runs_ahead and start == 0:
            self._run_ahead(self.runner.decoder)
        tokens = arriving.tokens()
        self.counts.generated_tokens += len(tokens)
        finished: dict[int, str] = {}
        for row, (one, token, logprob) in enumerate(zip(generations, tokens, logprobs, strict=True), start):
            if reason := one.take(token, logprob):
                finished[row] = reason
        self._leave(finished)

    def _keep(self, key: np.ndarray, row: int) -> None:
        """Keep the beginning of a row that `key` stands for, if it isn't kept and there is memory for a copy."""
        if self.prefixes.holds(key):
            return
        try:
            self.prefixes.add(key, self.runner.cache.save(row, len(key)))
        except torch.OutOfMemoryError:
            self.prefixes.clear()

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
        self._leave({row: "cancelled" for row, one in enumerate(self.running) if one in cancelled})
        for one in cancelled.intersection(self._waiting()):
            self._leave_queue(one).finish("cancelled")

    def _waiting(self) -> list[Generation]:
        with self._lock:  # others may append meanwhile
            return list(self.waiting)

    def _leave(self, finished: dict[int, str]) -> None:
        """Take rows out; the last rows move into the gaps."""
        if not finished:
            return
        leaving = [(self.running[row], row, reason) for row, reason in finished.items()]
        for one, row, _ in leaving:
            if one.keep:
                self._keep(one.key(), row)
        left = len(self.running) - len(finished)
        gaps = [row for row in finished if row < left]
        movers = [row for row in range(left, len(self.running)) if row not in finished]
        if movers:
            self.runner.cache.move(movers, gaps, max(self.running[row].length for row in movers))
            for gap, mover in zip(gaps, movers, strict=True):
                self.running[gap] = self.running[mover]
        del self.running[left:]
        self.runner.cache.trim(left)
        self.counts.finished += len(leaving)
        for one, _, reason in leaving:
            one.finish(reason)
