"""One more token of every running row without the host: what a step needs is on the device, and stays there.

On a GPU a step is captured once for each of a few batch sizes, and replayed; rows that fill a batch up write to a page
that belongs to nobody.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from llava.generation.cache.pages import PageCache

log = logging.getLogger(__name__)

_LEAST_PAGES = 8


class DecodingState:
    """Tokens, positions and pages of a batch's rows, `[rows]`, `[rows]` and `[rows, pages]`, on the device."""

    def __init__(self, rows: int, pages: int, device: torch.device):
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.table = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.owners: list[object] = []
        """The generations that the first rows belong to, in order; further rows only fill the batch up."""


class Arriving:
    """Tokens, int64 `[rows]`, on their way to the host; what is started after this doesn't delay them."""

    def __init__(self, chosen: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        if chosen.device.type != "cuda":
            self._tokens = chosen.cpu()
        else:
            self._tokens = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._tokens.copy_(chosen, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(chosen.device))  # the head may be on another GPU

    def tokens(self) -> list[int]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class Ahead(NamedTuple):
    """The logits of a step that was started before its rows were asked for."""

    owners: list[object]
    logits: torch.Tensor

    def of(self, owners: Sequence[object]) -> torch.Tensor | None:
        """The rows of `owners`, in their order; None if one of them wasn't in that step."""
        if self.owners == owners:
            return self.logits
        places = {id(one): place for place, one in enumerate(self.owners)}
        if any(id(one) not in places for one in owners):
            return None
        rows = torch.tensor([places[id(one)] for one in owners]).to(self.logits.device)
        return self.logits.index_select(0, rows)


class Decoder:
    """Runs decoding steps.

    Args:
        step: of a state's rows the logits `[rows, vocabulary]`; it moves the positions on by one.
        max_rows: rows of a batch, at most.
    """

    def __init__(
        self, cache: PageCache, step: Callable[[DecodingState], torch.Tensor], device: torch.device, max_rows: int
    ):
        self.cache, self.step, self.device = cache, step, device
        self.max_rows = max_rows
        self.captures = device.type == "cuda" and torch.cuda.is_available()
        """Whether steps are captured."""
        self.runs_ahead = self.captures
        """Whether the next step is started before the host has read the tokens of the last."""
        self._captured: dict[tuple[int, int], tuple[DecodingState, torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._state: DecodingState | None = None
        self._changes = -1
        """The cache's `changes` when its tables were copied into the state."""

    def logits(
        self, owners: Sequence[object], tokens: Callable[[], Sequence[int]], lengths: Sequence[int]
    ) -> torch.Tensor:
        """Of the next token of each row; the rows are the cache's first ones.

        Args:
            owners: whose rows they are; as long as they are the same, tokens and positions are those on the device.
            tokens: the last token of each, asked for if the rows are others than in the last step.
            lengths: positions of each row before this step.
        """
        for row, length in enumerate(lengths):
            self.cache.extend(row, length + 1)
        state = self._state
        pages = max(len(table) for table in self.cache.tables)
        if state is None or state.owners != list(owners) or pages > state.table.shape[1]:
            state = self._state = self._begun(len(owners), pages)
            state.owners = list(owners)
            self._put(state.tokens, np.array(tokens(), np.int64))
            self._put(state.positions, np.array(lengths, np.int64))
            self._changes = -1
        if self.cache.changes != self._changes:
            self._changes = self.cache.changes
            self._put(state.table, self.cache.table(range(len(owners)), state.table.shape[1]))
        for captured, graph, logits in self._captured.values():
            if captured is state:
                graph.replay()
                return logits.narrow(0, 0, len(owners))
        return self.step(state)

    def is_at(self, owners: Sequence[object]) -> bool:
        """Whether these rows' tokens and positions are on the device."""
        return self._state is not None and self._state.owners == list(owners)

    def goes_on(self, owners: Sequence[object], lengths: Sequence[int]) -> bool:
        """Whether the next step of these rows needs nothing of the host but their pages."""
        room = 0 if self._state is None else self._state.table.shape[1] * self.cache.page
        return self.is_at(owners) and max(lengths) < room

    def follow(self, owners: Sequence[object], tokens: torch.Tensor) -> None:
        """The rows' next tokens, int64 `[rows]`, as they were chosen on the device."""
        if self._state is not None and self.is_at(owners):
            self._state.tokens.narrow(0, 0, len(owners)).copy_(tokens)

    def forget(self) -> None:
        """The rows have changed otherwise than by decoding."""
        if self._state is not None:
            self._state.owners = []

    def _put(self, target: torch.Tensor, values: np.ndarray) -> None:
        """Copy to the first rows; those behind them are at the beginning of the page of nobody."""
        source = torch.from_numpy(values)
        if self.captures:
            source = source.pin_memory()  # the copy is queued, and the host goes on
        target.zero_().narrow(0, 0, len(values)).copy_(source, non_blocking=True)

    def _begun(self, rows: int, pages: int) -> DecodingState:
        """A state with room for the rows and as many pages; on a GPU one that is captured, if that can be done."""
        pages = max(_LEAST_PAGES, 1 << (pages - 1).bit_length())
        if not self.captures:
            return DecodingState(rows, pages, self.device)
        size = min(1 << (rows - 1).bit_length(), self.max_rows)
        if (size, pages) not in self._captured:
            state = DecodingState(size, pages, self.device)
            try:
                self._captured[size, pages] = (state, *self._capture(state))
            except RuntimeError as error:
                log.warning("decoding isn't captured in CUDA graphs (%s)", " ".join(str(error).split())[:200])
                self.captures = False
                return DecodingState(rows, pages, self.device)
        return self._captured[size, pages][0]

    def _capture(self, state: DecodingState) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
        """Run the step a few times on rows of nobody, then once more for the graph."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(state)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(state)
        return graph, logits
