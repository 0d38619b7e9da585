"""Writing safetensors shards tensor by tensor: bounded memory, resumable, verified.

A caller lists the tensors (`Planned`); `write_shards` lays them out, reserves the disk space, and lets two
threads compute and write them chunk by chunk at their final offsets. Each tensor's CRC-32 is taken from memory
before it is written. After the writers a third thread flushes to the disk and compares what the files then
hold with that checksum, so verification costs no pass of its own. (Python's zlib does 1.8 GB/s here; SHA-256
does half of that and would only protect against an attacker who can't also replace the checksum.) A journal of
finished tensors lets a killed run go on; the checksums also stay in the header of each shard, for whoever reads
it (llava.model.weights.checksums).
"""

import json
import logging
import os
import queue
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from llava.bars import tqdm
from llava.errors import LlavaError
from llava.folders import WEIGHTS, remove_stale
from llava.model.weights.checksums import CHECKSUMS
from llava.model.weights.files import DTYPE_NAMES, WeightFiles
from llava.records import write_json

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
FLUSH_BYTES = 128 << 20
MAX_SHARD_BYTES = 5_000_000_000
WRITERS = 2
JOURNAL = "journal.txt"
RESUMABLE = (JOURNAL, "*.safetensors")
"""What a later attempt goes on with (llava.folders.stage)."""

Fill = Callable[[int, int, torch.Tensor], None]
"""`fill(start, stop, out)` puts elements start to stop of a flattened tensor into `out`, of its dtype."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. `begin` is called when its turn comes and gives the function that fills chunks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: Callable[[], Fill]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def planned_copy(
    weights: WeightFiles, name: str, new_name: str | None = None, dtype: torch.dtype | None = None
) -> Planned:
    """Tensor `name` of some files as it is, or under a new name, or in another dtype."""
    return Planned(
        new_name or name,
        weights.shape(name),
        dtype or weights.dtype(name),
        lambda: fill_from(weights.read(name)),
    )


def planned_tensor(name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> Planned:
    """A tensor that `make` computes whole when its turn comes; cast to `dtype`."""
    return Planned(name, tuple(shape), dtype, lambda: fill_from(make()))


def fill_from(tensor: torch.Tensor) -> Fill:
    """Chunks of `tensor`, cast to what is asked for."""
    flat = tensor.detach().reshape(-1)

    def fill(start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(flat[start:stop])

    return fill


def write_shards(
    folder: Path,
    tensors: Sequence[Planned],
    inputs: Iterable[Path] = (),
    *,
    metadata: dict[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write `tensors` as `model.safetensors`, or as shards with an index, into `folder`.

    Run again after it was killed, with the same `tensors` and unchanged `inputs` (the files that they come
    from), it goes on where it was. On return everything is flushed and verified.

    Raises:
        LlavaError: what was written can't be read back as it was meant.
        OSError: the disk is full, or the system refuses for another reason.
    """
    shards = _lay_out(folder, tensors, metadata or {}, max_shard_bytes)
    # An earlier attempt may have cut the same tensors into other files.
    remove_stale(folder, WEIGHTS, keep=[shard.path.name for shard in shards])
    with _Journal(folder / JOURNAL, _fingerprint(shards, inputs)) as journal:
        fresh = not journal.done
        for shard in shards:
            shard.open(fresh)
        try:
            _Run(shards, journal).run()
            for shard in shards:
                shard.finish(journal.done)
        finally:
            for shard in shards:
                shard.close()
    if len(shards) > 1:
        weight_map = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    _check_readable([shard.path for shard in shards], tensors)
    journal.path.unlink()
    return [shard.path for shard in shards]


class _Shard:
    """One safetensors file with its space reserved; the header comes last, so an unfinished one can't be loaded."""

    def __init__(self, path: Path, tensors: list[Planned], metadata: dict[str, str]):
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self.header_bytes = len(self._header({tensor.name: 0 for tensor in tensors}))
        self.offsets: dict[str, int] = {}
        end = self.header_bytes
        for tensor in tensors:
            self.offsets[tensor.name] = end
            end += tensor.nbytes
        self.size = end
        self.handle = -1

    def open(self, fresh: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
        self.handle = os.open(self.path, flags, 0o666)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.handle, 0, self.size)
        os.ftruncate(self.handle, self.size)

    def finish(self, checksums: dict[str, int]) -> None:
        _write_at(self.handle, memoryview(self._header(checksums)), 0)
        os.fsync(self.handle)

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _header(self, checksums: dict[str, int]) -> bytes:
        text = " ".join(f"{checksums[tensor.name]:08x}" for tensor in self.tensors)
        content: dict = {"__metadata__": {"format": "pt", **self.metadata, CHECKSUMS: text}}
        end = 0
        for tensor in self.tensors:
            content[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        encoded = json.dumps(content, separators=(",", ":")).encode()
        # The format wants tensors aligned to 8 bytes.
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded


class _Run:
    """The two writers and the verifier that follows them."""

    def __init__(self, shards: list[_Shard], journal: "_Journal"):
        self.shards = shards
        self.journal = journal
        self.stop = threading.Event()
        self.written: queue.SimpleQueue[tuple[_Shard, Planned] | None] = queue.SimpleQueue()
        self.buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def run(self) -> None:
        jobs = [(shard, tensor) for shard in self.shards for tensor in shard.tensors]
        done = [job for job in jobs if job[1].name in self.journal.done and self._reads_back(*job)]
        todo = [job for job in jobs if job not in done]
        total = sum(tensor.nbytes for _, tensor in jobs)
        if done:
            log.info("going on from an earlier attempt: %d of %d tensors are there", len(done), len(jobs))
        for _ in range(WRITERS):
            self.buffers.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8))
        with (
            tqdm(total=total, initial=sum(t.nbytes for _, t in done), unit="B", unit_scale=True, disable=None) as bar,
            ThreadPoolExecutor(WRITERS) as writers,
            ThreadPoolExecutor(1) as verifier,
        ):
            futures = [writers.submit(self._write, shard, tensor, bar) for shard, tensor in todo]
            verification = verifier.submit(self._verify)
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except BaseException:
                self.stop.set()
                for future in futures:
                    future.cancel()
                raise
            finally:
                self.written.put(None)
            verification.result()

    def _write(self, shard: _Shard, tensor: Planned, bar: tqdm) -> None:
        buffer = self.buffers.get()
        try:
            fill = tensor.begin()
            step = CHUNK_BYTES // tensor.dtype.itemsize
            checksum, offset = 0, shard.offsets[tensor.name]
            for start in range(0, tensor.numel, step):
                if self.stop.is_set():
                    return
                stop = min(start + step, tensor.numel)
                out = buffer[: (stop - start) * tensor.dtype.itemsize]
                fill(start, stop, out.view(tensor.dtype))
                data = out.numpy().data
                checksum = zlib.crc32(data, checksum)
                _write_at(shard.handle, data, offset)
                offset += len(data)
                bar.update(len(data))
            self.journal.add(tensor.name, checksum)
            self.written.put((shard, tensor))
        finally:
            self.buffers.put(buffer)

    def _verify(self) -> None:
        """Flush, then read back; in batches, so that the disk works while the writers compute."""
        batch: list[tuple[_Shard, Planned]] = []
        waiting, ended = 0, False
        while not ended:
            job = self.written.get()
            if job is None:
                ended = True
            else:
                batch.append(job)
                waiting += job[1].nbytes
            if waiting < FLUSH_BYTES and not ended:
                continue
            if self.stop.is_set():
                return
            try:
                self._flush_and_compare(batch)
            except BaseException:
                self.stop.set()
                raise
            batch, waiting = [], 0

    def _flush_and_compare(self, batch: list[tuple[_Shard, Planned]]) -> None:
        for shard in {id(shard): shard for shard, _ in batch}.values():
            os.fdatasync(shard.handle) if hasattr(os, "fdatasync") else os.fsync(shard.handle)
        for shard, tensor in batch:
            if not self._reads_back(shard, tensor):
                raise LlavaError(
                    f"{shard.path}: {tensor.name} reads back other than it was written; the disk or its driver "
                    f"is faulty, or something else wrote to the file; nothing was kept, run again elsewhere"
                )

    def _reads_back(self, shard: _Shard, tensor: Planned) -> bool:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, tensor.nbytes)))
        checksum, offset = 0, shard.offsets[tensor.name]
        end = offset + tensor.nbytes
        while offset < end:
            count = os.preadv(shard.handle, [buffer[: end - offset]], offset)
            if count == 0:
                break
            checksum = zlib.crc32(buffer[:count], checksum)
            offset += count
        return checksum == self.journal.done[tensor.name]


class _Journal:
    """Names and checksums of the tensors that are written, one line each; of an earlier attempt if it fits."""

    def __init__(self, path: Path, fingerprint: str):
        self.path = path
        self.done: dict[str, int] = {}
        self._lock = threading.Lock()
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        if lines and lines[0] == fingerprint + "\n":
            for line in lines[1:]:
                checksum, _, name = line.rstrip("\n").partition(" ")
                if line.endswith("\n") and name:
                    self.done[name] = int(checksum, 16)
        elif lines:
            log.info("%s is from other inputs; starting afresh", path)
        if not self.done:
            path.write_text(fingerprint + "\n")
        self._file = path.open("a")

    def add(self, name: str, checksum: int) -> None:
        with self._lock:
            self._file.write(f"{checksum:08x} {name}\n")
            self._file.flush()
            self.done[name] = checksum

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def _lay_out(folder: Path, tensors: Sequence[Planned], metadata: dict[str, str], max_bytes: int) -> list[_Shard]:
    groups: list[list[Planned]] = [[]]
    size = 0
    # Widest elements first: every tensor then starts at a multiple of its element's size.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return [_Shard(folder / name, group, metadata) for name, group in zip(names, groups)]


def _fingerprint(shards: list[_Shard], inputs: Iterable[Path]) -> str:
    plan = [
        [shard.path.name, tensor.name, str(tensor.dtype), *tensor.shape] for shard in shards for tensor in shard.tensors
    ]
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    return sha256(json.dumps([plan, stats]).encode()).hexdigest()


def _check_readable(paths: list[Path], tensors: Sequence[Planned]) -> None:
    weights = WeightFiles(paths)
    wrong = [t.name for t in tensors if t.name not in weights or weights.shape(t.name) != t.shape]
    if wrong or len(weights) != len(tensors):
        raise LlavaError(f"{paths[0].parent}: the written files don't hold what they should: {', '.join(wrong[:3])}")


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
