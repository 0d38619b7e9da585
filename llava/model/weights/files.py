"""The tensors of a checkpoint's files, by name, read one at a time and never executed.

`find_weight_files` lists a folder's shards (safetensors before `.bin`), `WeightFiles` reads from them through
memory maps. A `.bin` file is a pickle: it is opened with `weights_only=True` alone, so code in it can't run.
"""

import functools
import json
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open

from llava.errors import LlavaError, first_line
from llava.records import read_json

log = logging.getLogger(__name__)

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"

HARMLESS = (
    r".*\.rotary_emb\.inv_freq",  # computed from the config; older transformers stored it
    r".*\.embeddings\.position_ids",  # 0, 1, 2, …; older transformers stored it
)
"""Names in a file that carry no information, as patterns."""

DTYPE_NAMES = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
"""What safetensors calls each dtype."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

NO_VALUES = (
    "it was saved under DeepSpeed's ZeRO-3 without gathering the weights first; save it again with "
    "stage3_gather_16bit_weights_on_model_save, or convert the checkpoint with zero_to_fp32.py"
)
"""Why a tensor of a file has a shape but no values."""

_BLOCK = 1 << 24


def is_harmless(name: str) -> bool:
    """Whether a tensor of this name carries no information."""
    return any(re.fullmatch(pattern, name) for pattern in HARMLESS)


def find_weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a model folder, [] if it has none; an index's missing shard is an error.

    Where a whole file lies beside an index that doesn't list it, one of them is of another save: the index is taken,
    with a warning.
    """
    folder = Path(folder)
    for name in (SAFETENSORS, PICKLED):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index)
            if (folder / name).is_file() and folder / name not in shards:
                _say_which(index, name)
            return shards
        if (folder / name).is_file():
            return [folder / name]
    return []


class WeightFiles:
    """Tensors of one or more `.safetensors` or `.bin` files.

    Raises:
        LlavaError: a file is truncated, is no weight file, holds anything but tensors, or two files hold the
            same name; the message names the file.
    """

    def __init__(self, files: list[Path]):
        self._handles: dict[Path, _SafetensorsFile | _PickledFile] = {}
        owner: dict[str, Path] = {}
        for path in files:
            handle = _open(Path(path))
            self._handles[path] = handle
            for name in handle.names:
                if name in owner:
                    raise LlavaError(f"{path} and {owner[name]} both hold {name}; one of them is stale")
                owner[name] = path
        self.files = list(files)
        self.owner = MappingProxyType(owner)

    @classmethod
    def of_folder(cls, folder: str | Path) -> "WeightFiles":
        files = find_weight_files(folder)
        if not files:
            raise LlavaError(
                f"{folder}: no weights found (looked for {SAFETENSORS} and {PICKLED}, with or without index)"
            )
        return cls(files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.owner)

    def __contains__(self, name: str) -> bool:
        return name in self.owner

    def __len__(self) -> int:
        return len(self.owner)

    def file_of(self, name: str) -> Path:
        return self.owner[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._handles[self.owner[name]].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._handles[self.owner[name]].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, memory mapped where the file allows it: copy it before changing it."""
        return self._handles[self.owner[name]].read(name)

    def copy(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in memory of its own; from safetensors without a detour through a map."""
        return self._handles[self.owner[name]].copy(name)


class _SafetensorsFile:
    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        self.names = list(self._file.keys())
        for name in self.names:
            if (kind := self._file.get_slice(name).get_dtype()) not in _DTYPES:
                raise LlavaError(f"{path}: {name} is of the type {kind}; only {', '.join(_DTYPES)} can be read")
        self._spans: dict[str, tuple[int, int]] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._file.get_slice(name).get_dtype()]

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def copy(self, name: str) -> torch.Tensor:
        start, stop = self._span(name)
        if not hasattr(os, "preadv") or start == stop:
            return self.read(name).clone()
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        # Reading straight into place takes half the time of faulting in a map page by page and copying that.
        memory = tensor.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            while memory:
                count = os.preadv(file.fileno(), [memory[:_BLOCK]], start)
                if not count:
                    raise _unreadable(self.path, EOFError(f"{name} ends early"))
                start, memory = start + count, memory[count:]
        return tensor

    def _span(self, name: str) -> tuple[int, int]:
        """First and last byte of a tensor in the file: the header is its length in 8 bytes, and JSON."""
        if self._spans is None:
            with self.path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._spans = {
                key: tuple(8 + length + offset for offset in entry["data_offsets"]) for key, entry in header.items()
            }
        return self._spans[name]


class _PickledFile:
    def __init__(self, path: Path):
        self.path = path
        tensors = _load_pickled(path)
        if not isinstance(tensors, dict):
            raise LlavaError(f"{path}: expected named tensors, got a {type(tensors).__name__}")
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise LlavaError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
            if value.layout is not torch.strided or value.is_quantized:
                raise LlavaError(f"{path}: {name!r} is a sparse or quantized tensor; save it as a plain one")
            if value.dtype not in DTYPE_NAMES:
                raise LlavaError(f"{path}: {name!r} holds {value.dtype}; only {', '.join(_DTYPES)} can be read")
            # A view may repeat its values without end: in a copy they would all be there.
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise LlavaError(f"{path}: {name!r} has the shape {tuple(value.shape)} but not as many values")
        self._tensors: dict[str, torch.Tensor] = tensors
        self.names = list(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def copy(self, name: str) -> torch.Tensor:
        return self.read(name).clone()


def _open(path: Path) -> "_SafetensorsFile | _PickledFile":
    if not path.is_file():
        raise LlavaError(f"{path}: no such file")
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)


def _load_pickled(path: Path):
    try:
        # Files from before torch 1.6 are no zip archives and can't be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise LlavaError(
            f"{path}: holds something other than tensors and was not loaded, because unpickling it could run "
            f"code; ask its author for safetensors ({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> LlavaError:
    return LlavaError(
        f"{path}: can't be read as a weight file, perhaps it was cut off while downloading or copying "
        f"({path.stat().st_size} bytes); fetch it again ({first_line(error)})"
    )


@functools.cache  # once: loading looks for a folder's files more than once
def _say_which(index: Path, whole: str) -> None:
    log.warning(
        "%s: %s lies beside %s, which doesn't list it: the index's files are used; remove what is stale",
        index.parent,
        whole,
        index.name,
    )


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise LlavaError(f"{index}: has no weight_map")
    shards = []
    for name in weight_map.values():
        if not isinstance(name, str) or "\0" in name:
            raise LlavaError(f"{index}: shard {name!r:.100} is no file's name")
    for name in sorted(set(weight_map.values())):
        if name != Path(name).name:
            raise LlavaError(f"{index}: shard {name!r} lies outside the folder")
        shard = index.parent / name
        if not shard.is_file():
            raise LlavaError(f"{shard}: no such file, but {index.name} lists it; fetch the missing shard")
        shards.append(shard)
    return shards
