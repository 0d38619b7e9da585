"""Counts what a step does, operator by operator: live memory, work, waits for the GPU, collectives."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

from llava.train.estimate.costs import Clock, Work, size_of, work_of
from llava.train.estimate.eight_bit import WITHOUT_OUTLIERS

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.equal,
           aten.is_nonzero}  # fmt: skip
"""Operators whose result's size or value the host needs: it waits for the GPU."""
WAITING_BY_NAME = {"bitsandbytes::int8_vectorwise_quant"}
"""The same, of libraries that need not be there."""
COPYING = {aten.copy_, aten._to_copy}
"""With one process FSDP gathers by these."""
REDUCING = ("reduce_scatter", "allreduce", "all_reduce")
SHARDING = {"all_gather": "gathered weights", "allgather": "gathered weights",
            "split_with_sizes_copy": "gathered weights", "chunk_cat": "gradients, whole",
            "reduce_scatter": "gradients, whole", "allreduce": "gradients, in DDP's buckets"}  # fmt: skip
"""What the tensors of FSDP's and DDP's own operators are, by a part of the operator's name."""
MAY_RESIZE = ("fsdp", "c10d", "_c10d_functional")
"""Operators of these namespaces come right after sharded weights got or gave back their memory."""


class Memory:
    """Bytes of all tensors that are alive, each storage once; the most of them at once, and what that consisted of."""

    def __init__(self):
        self.total = 0
        self.peak = 0
        self.at_peak: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        """Kind of a storage by its number, for those that a kind is known of; it stays when the storage is freed."""
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._resized: set[int] = set()
        self._next = 0

    def note(self, tensor: torch.Tensor, kind: str | None = None) -> int:
        """Count a tensor's storage if it is new, or its new size; returns its number."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        number = self._numbers.get(key)
        if number is None:
            number = self._next
            self._next += 1
            self._numbers[key] = number
            self._sizes[number] = size
            self._alive[number] = weakref.ref(storage, partial(self._free, key, number))
            self.total += size
        elif self._sizes[number] != size:
            self._resize(number, size)
        if kind is not None:
            self.kinds[number] = kind
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = dict(self._sizes)
        return number

    def look_at_resized(self, numbers: Iterable[int] | None = None) -> None:
        """See which of the storages that grow and shrink (or of these) have done so unseen."""
        for number in list(self._resized) if numbers is None else numbers:
            storage = self._alive[number]()
            if storage is not None and storage.nbytes() != self._sizes[number]:
                self._resize(number, storage.nbytes())

    def note_passing(self, tensor: torch.Tensor, kind: str | None) -> None:
        """Count a tensor of FSDP's, whose storage may grow and shrink; lasting kinds stay what they are."""
        number = self.note(tensor)
        if kind is not None:
            self.kinds.setdefault(number, kind)
        self._resized.add(number)

    def size(self, number: int) -> int:
        """Bytes of a storage, 0 if it is no more."""
        return self._sizes.get(number, 0)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.look_at_resized(list(self._sizes))
        self.peak, self.at_peak = self.total, dict(self._sizes)

    def parts(self) -> dict[str, int]:
        """Bytes of each kind at the peak; what no kind is known of are activations and what passes."""
        parts: Counter[str] = Counter()
        for number, size in self.at_peak.items():
            parts[self.kinds.get(number, "activations")] += size
        return dict(parts)

    def _resize(self, number: int, size: int) -> None:
        self.total += size - self._sizes[number]
        self._sizes[number] = size
        self._resized.add(number)
        self.kinds.setdefault(number, "gathered weights")  # nothing but FSDP resizes a storage

    def _free(self, key: int, number: int, reference: object = None) -> None:
        self.total -= self._sizes.pop(number)
        del self._numbers[key], self._alive[number]
        self._resized.discard(number)


class Tracker(TorchDispatchMode):
    """Entered inside a FakeTensorMode: sees each operator before it is carried out there.

    Attributes:
        memory: live bytes.
        clock: seconds of host, GPU and links, compiled regions as fused.
        work: sums since it was last replaced.
        pairs: how many pairs of positions attend in the batch at hand (joined samples, whose borders have no content).
    """

    def __init__(self, clock: Clock):
        super().__init__()
        self.memory = Memory()
        self.clock = clock
        self.work = Work()
        self.waits: Counter[str] = Counter()
        self.reduced: set[torch.dtype] = set()
        self.attention: Counter[str] = Counter()
        self.operators = 0
        self.pairs = 0
        self._paused = False
        self._chain: Chain | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Within, chains of operators between matrix products and attention read and write their outer tensors once."""
        before, self._paused, self._chain = self._paused, False, Chain()
        try:
            yield
        finally:
            self._close_chain()
            self._paused, self._chain = before, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass_type, types)):  # its own operators come next
            return NotImplemented
        name = function._schema.name
        carry_out = WITHOUT_OUTLIERS.get(name, function)
        if self._paused or function.namespace == "prim":
            return carry_out(*args, **kwargs)
        self.operators += 1
        packet = function._overloadpacket
        if packet in WAITING or name in WAITING_BY_NAME:
            self.waits[packet.__name__] += 1
            self.clock.wait()
            if packet is aten._local_scalar_dense:  # there is no value; any will do
                return args[0].dtype.is_floating_point * 1.0 if args[0].dtype != torch.bool else False
        if function.namespace in MAY_RESIZE or packet in COPYING:
            self.memory.look_at_resized()
        out = carry_out(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._count(function, args, kwargs, inputs, outputs, out)
        return out

    def _count(self, function, args, kwargs, inputs, outputs, out) -> None:
        name = function._overloadpacket.__name__
        if function.namespace in MAY_RESIZE:
            kind = next((kind for word, kind in SHARDING.items() if word in name), None)
            for tensor in (*inputs, *outputs):
                self.memory.note_passing(tensor, kind)
        numbers = [self.memory.note(tensor) for tensor in outputs]
        if any(word in name for word in REDUCING):
            self.reduced.update(tensor.dtype for tensor in inputs if tensor.is_floating_point())
        work = work_of(function, args, kwargs, inputs, outputs, out, self.pairs)
        if work.attention:
            self.attention[work.attention] += 1
        if self._chain is None:
            self._run(work)
        elif work.flops:
            self._close_chain()
            self._run(work)
        elif work.kernels:
            self._chain.add({self.memory.note(tensor): size_of(tensor) for tensor in inputs}, numbers)

    def _run(self, work: Work) -> None:
        self.work += work
        self.clock.run(work)

    def _close_chain(self) -> None:
        chain = self._chain
        if chain is not None and (chain.made or chain.read):
            moved = sum(chain.read.values()) + sum(self.memory.size(number) for number in chain.made)
            self._run(Work(bytes=moved, kernels=1))
        self._chain = Chain()


@dataclass
class Chain:
    """Operators that become one kernel."""

    read: dict[int, int] = field(default_factory=dict)
    """Bytes read of storages from outside, by number."""
    made: set[int] = field(default_factory=set)
    """Storages made within; those that don't outlive it are never written."""

    def add(self, read: dict[int, int], made: list[int]) -> None:
        for number, size in read.items():
            if number not in self.made:
                self.read[number] = max(size, self.read.get(number, 0))
        self.made.update(number for number in made if number not in read)


def held(tensor: object) -> Iterator[torch.Tensor]:
    """What has memory of a tensor: this process's part of a sharded one, codes and scales of a quantized one."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # a mesh may be among them
            yield from held(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor):
        yield tensor


def note_all(memory: Memory, tensors: Iterable[torch.Tensor], kind: str) -> None:
    """Count tensors as being of a kind."""
    for tensor in tensors:
        for part in held(tensor):
            memory.note(part, kind)
