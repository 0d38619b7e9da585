"""Delta weights: `target = base + delta`, tensor by tensor from shards to shards.

A delta is what training changed, so that it can be published where a licence forbids publishing the base.
Names that the base doesn't have (projector, tower) are whole in the delta; the embedding and the head of the
delta have a row more for each added token. All arithmetic is in the delta's dtype, as the releases were made.
"""

import logging
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.errors import LlavaError, amount
from llava.folders import check_space, check_target, expanded, stage
from llava.model.convert.delta_archive import DeltaArchive
from llava.model.convert.model_card import write_model_card
from llava.model.convert.other_files import copy_side_files
from llava.model.families import EMBEDDING, EMBEDDINGS, HEAD, family_names, find_family
from llava.model.tokenizer import find_tokenizer
from llava.model.weights.checksums import recorded_checksums
from llava.model.weights.files import WeightFiles, is_harmless
from llava.model.weights.locate import locate_model
from llava.model.weights.shards import MAX_SHARD_BYTES, RESUMABLE, Fill, Planned, write_shards
from llava.records import read_json

log = logging.getLogger(__name__)

_UNPACKED = "delta"
"""Folder next to the shards for what a zip holds."""

_ADDED_PARTS = ("model.mm_projector.", "model.vision_tower.")
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def apply_delta(
    base: str | Path,
    target: str | Path,
    delta: str | Path,
    *,
    overwrite: bool = False,
    check_inputs: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model `base + delta` to the folder `target`; returns it.

    Args:
        base: folder or hub id of the plain language model.
        delta: a folder, a `.zip` of one, or a hub id.
        check_inputs: compare what is read with the checksums in the files, where they hold some.

    Raises:
        LlavaError: what doesn't fit, found before any work where it can be; the target is then untouched.
    """
    target = check_target(target, overwrite)
    base_folder = locate_model(base, "base model")
    with ExitStack() as stack:
        if str(delta).endswith(".zip"):
            archive = stack.enter_context(DeltaArchive(expanded(delta)))
            _check_configs(read_json_of(base_folder, "base"), archive.config(), str(base_folder), str(delta))
            check_space(target, archive.unpacked_bytes() * 2, "unpacking the delta and writing the result")
            staged = stage(target, overwrite=overwrite, resume=(*RESUMABLE, _UNPACKED))
            folder = stack.enter_context(staged)
            delta_folder = archive.unpack(folder / _UNPACKED)
        else:
            delta_folder = locate_model(delta, "delta")
            folder = None
        pair = open_pair(base_folder, delta_folder, "delta")
        check_space(target, sum(pair.upper.dtype(name).itemsize * _numel(pair.upper, name) for name in pair.names))
        folder = folder or stack.enter_context(stage(target, overwrite=overwrite, resume=RESUMABLE))
        tensors = _plan(pair, 1, None, check_inputs)
        write_shards(folder, tensors, pair.base.files + pair.upper.files, max_shard_bytes=max_shard_bytes)
        copy_side_files(delta_folder, folder)
        if find_tokenizer(folder) is None and (source := find_tokenizer(base_folder)):
            log.info("the delta has no %s; taking the base's", source.name)
            copy_side_files(base_folder, folder, only=(source.name,))
        write_model_card(folder, "Delta weights applied to their base.", base=str(base), source=str(delta))
        if (folder / _UNPACKED).is_dir():
            del pair, tensors
            archive.remove()
    return target


def make_delta(
    base: str | Path,
    target: str | Path,
    delta: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the difference of the model `target` to `base` into the folder `delta`; returns it.

    `dtype` is each tensor's own in the target by default; a smaller one makes the sum as much less exact.

    Raises:
        LlavaError: what doesn't fit, found before any work.
    """
    delta = check_target(delta, overwrite)
    base_folder, target_folder = locate_model(base, "base model"), locate_model(target, "target model")
    pair = open_pair(base_folder, target_folder, "target")
    tensors = _plan(pair, -1, dtype, True)
    check_space(delta, sum(tensor.nbytes for tensor in tensors))
    with stage(delta, overwrite=overwrite, resume=RESUMABLE) as folder:
        write_shards(folder, tensors, pair.base.files + pair.upper.files, max_shard_bytes=max_shard_bytes)
        copy_side_files(target_folder, folder)
        write_model_card(
            folder,
            "Delta weights: not a model by themselves. Apply them to the base with "
            "`llava-med apply-delta --base BASE --target RESULT --delta THIS`. The sum is rounded twice, "
            "so single values may differ from the original's in the last place.",
            base=str(base),
            source=str(target),
            is_delta=True,
        )
    return delta


@dataclass(frozen=True)
class Pair:
    """Base and the larger one of the two (delta or target) with the names that are to be written."""

    base: WeightFiles
    upper: WeightFiles
    names: tuple[str, ...]


def open_pair(base_folder: Path, upper_folder: Path, what: str) -> Pair:
    """Open both and check that they belong together; `what` names the second.

    Raises:
        LlavaError: the first thing that doesn't fit, in words.
    """
    upper_config = read_json_of(upper_folder, what)
    _check_configs(read_json_of(base_folder, "base"), upper_config, str(base_folder), str(upper_folder), what)
    base, upper = WeightFiles.of_folder(base_folder), WeightFiles.of_folder(upper_folder)
    tied = _is_tied(base_folder, base) and _is_tied(upper_folder, upper)
    names = tuple(name for name in upper if not is_harmless(name) and not (tied and name == HEAD))
    own = [name for name in base if name.startswith(_ADDED_PARTS)]
    if own:
        raise LlavaError(
            f"{base_folder}: the base already holds {own[0]}, so it is a finished LLaVA and not the plain language "
            f"model; give the folder of the original"
        )
    missing = [name for name in names if name not in base and not name.startswith(_ADDED_PARTS)]
    if missing:
        if missing == [HEAD] and _is_tied(base_folder, base):
            raise LlavaError(
                f"{base_folder}: the base's head is its embedding (config.json: tie_word_embeddings), the {what} "
                f"{upper_folder} has one of its own; give the base that it was made for"
            )
        raise LlavaError(
            f"{base_folder}: the base has no {_some(missing)}, which the {what} {upper_folder} changes; "
            f"the {what} was made for another base, or a file of the base is missing"
        )
    extra = [name for name in base if name not in upper and not is_harmless(name) and not (tied and name == HEAD)]
    if extra:
        raise LlavaError(
            f"{upper_folder}: the {what} has no {_some(extra)}, which the base {base_folder} has; "
            f"the {what} is incomplete or was made for another base"
        )
    if not any(name.startswith("model.mm_projector.") for name in names):
        log.warning("%s: the %s holds no projector (model.mm_projector.*)", upper_folder, what)
    for name in names:
        if not upper.dtype(name).is_floating_point:
            raise LlavaError(
                f"{upper.file_of(name)}: {name} holds {upper.dtype(name)}, not floating-point numbers; "
                f"quantized weights have no delta, give the 16-bit ones"
            )
        if name in base:
            _check_shape(base, upper, name, what)
    rows = upper.shape(EMBEDDING)[0] if EMBEDDING in upper else None
    if rows is not None and rows != upper_config.get("vocab_size", rows):
        raise LlavaError(
            f"{upper.file_of(EMBEDDING)}: the embedding has {rows} rows but config.json next to it says vocab_size "
            f"{upper_config['vocab_size']}; take weights and config.json of one release"
        )
    return Pair(base, upper, names)


def _is_tied(folder: Path, weights: WeightFiles) -> bool:
    """Whether the head is the embedding; a file may hold the tensor twice.

    Raises:
        LlavaError: the config ties two tensors that differ.
    """
    if not read_json(folder / "config.json").get("tie_word_embeddings"):
        return False
    if HEAD in weights and not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
        raise LlavaError(
            f"{weights.file_of(HEAD)}: {HEAD} isn't the embedding, but config.json ties the two; set "
            f"tie_word_embeddings there to false, or remove {HEAD}"
        )
    return True


def read_json_of(folder: Path, what: str) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise LlavaError(f"{path}: no such file; the {what} needs its config.json, is {folder} a whole model folder?")
    config = read_json(path)
    if not isinstance(config, dict):
        raise LlavaError(f"{path}: no object of settings; is {folder} a whole model folder?")
    return config


def _check_configs(base: dict, upper: dict, base_name: str, upper_name: str, what: str = "delta") -> None:
    families = []
    for config, name in ((base, base_name), (upper, upper_name)):
        family = find_family(config.get("model_type"))
        if family is None or "text_config" in config:
            raise LlavaError(
                f"{name}: config.json has model_type {config.get('model_type')!r} and isn't {family_names()} in "
                f"the native layout; convert it with llava-med import first"
            )
        families.append(family.name)
    if families[0] != families[1]:
        raise LlavaError(
            f"base {base_name} is a {families[0]} model but {what} {upper_name} belongs to a {families[1]} one; "
            f"give the base that the {what} was made from"
        )
    for field in _SIZES:
        default = "num_attention_heads" if field == "num_key_value_heads" else field
        ours, theirs = base.get(field, base.get(default)), upper.get(field, upper.get(default))
        if ours != theirs:
            raise LlavaError(
                f"base {base_name} has {field} {ours}, {what} {upper_name} has {theirs} (config.json); "
                f"the {what} was made for a model of another size"
            )


def _check_shape(base: WeightFiles, upper: WeightFiles, name: str, what: str) -> None:
    ours, theirs = base.shape(name), upper.shape(name)
    if ours == theirs:
        return
    if name in EMBEDDINGS and len(ours) == len(theirs) == 2 and ours[1] == theirs[1]:
        if theirs[0] > ours[0]:
            return
        raise LlavaError(
            f"{base.file_of(name)}: {name} has {ours[0]} rows in the base but only {theirs[0]} in the {what} "
            f"{upper.file_of(name)}; tokens were already added to this base (a plain LLaMA has 32000 rows, "
            f"LLaVA-Med v1.0 has 32003), give the plain language model"
        )
    raise LlavaError(
        f"{name} has shape {list(ours)} in the base ({base.file_of(name)}) and {list(theirs)} in the {what} "
        f"({upper.file_of(name)}); the {what} was made for another base"
    )


def _plan(pair: Pair, sign: int, dtype: torch.dtype | None, check_inputs: bool) -> list[Planned]:
    checksums = [recorded_checksums(w) if check_inputs else {} for w in (pair.base, pair.upper)]
    planned = []
    for name in pair.names:
        begin = _Sum(pair, name, sign, checksums[0].get(name), checksums[1].get(name))
        planned.append(Planned(name, pair.upper.shape(name), dtype or pair.upper.dtype(name), begin))
    return planned


class _Sum:
    """`upper + sign * base` of one tensor. The base's rows come first in both, so a flat prefix is the base's."""

    def __init__(self, pair: Pair, name: str, sign: int, base_checksum: int | None, upper_checksum: int | None):
        self.pair, self.name, self.sign = pair, name, sign
        self.expected = (base_checksum, upper_checksum)

    def __call__(self) -> Fill:
        upper = _Checked(self.pair.upper, self.name, self.expected[1])
        if self.name not in self.pair.base:
            return upper.copy_into
        base = _Checked(self.pair.base, self.name, self.expected[0])

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            new = upper.read(start, stop).to(out.dtype)
            shared = max(0, min(stop, base.numel) - start)
            if shared:
                old = base.read(start, start + shared).to(out.dtype)
                torch.add(new[:shared], old, alpha=self.sign, out=out[:shared])
            out[shared:].copy_(new[shared:])

        return fill


class _Checked:
    """A tensor read chunk by chunk from its start; at its end the checksum must be the recorded one."""

    def __init__(self, weights: WeightFiles, name: str, expected: int | None):
        self.flat = weights.read(name).reshape(-1)
        self.numel = self.flat.numel()
        self.path, self.name, self.expected = weights.file_of(name), name, expected
        self.checksum = 0

    def copy_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self.read(start, stop))

    def read(self, start: int, stop: int) -> torch.Tensor:
        chunk = self.flat[start:stop]
        if self.expected is not None:
            self.checksum = zlib.crc32(chunk.view(torch.uint8).numpy().data, self.checksum)
            if stop == self.numel and self.checksum != self.expected:
                raise LlavaError(
                    f"{self.path}: {self.name} has checksum {self.checksum:08x}, the file records "
                    f"{self.expected:08x}; the file was damaged, fetch it again"
                )
        return chunk


def _numel(weights: WeightFiles, name: str) -> int:
    return torch.Size(weights.shape(name)).numel()


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {amount(len(names) - 1, 'more tensor')})"
