"""Questions answered in parts, by processes of one machine or of several; the last one to finish joins the parts."""

import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.folders import PART, writing
from llava.manifests import finished, give_up, manifest_path, read_manifest, write_manifest
from llava.records import read_records, write_records

log = logging.getLogger(__name__)

_OF_A_PART = {"file", "sha256", "versions", "written", "fingerprint", "chunk", "counts", "seconds", "asked"}
"""What a part's manifest says of itself; all else is the run's."""
_LOCK_SECONDS = 600


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def split(self, count: int) -> "list[Shard]":
        """The `count` parts of this one."""
        return [Shard(self.index * count + place, self.count * count) for place in range(count)]

    def path(self, answers_file: Path) -> Path:
        """Where this part of `answers_file` is answered."""
        return answers_file.with_name(f"{answers_file.stem}-chunk{self.index}-of-{self.count}{answers_file.suffix}")


def shard_of(args: Namespace, environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The part that `--shard` names, else this process's of those that torchrun started; None if there is but one.

    Raises:
        LlavaError: it isn't `i/n` with 0 <= i < n, or `--overwrite` is set: no process knows what the others began.
    """
    if args.shard is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", args.shard)
        shard = Shard(*map(int, found.groups())) if found else None
        if shard is None or shard.index >= shard.count:
            raise LlavaError(f"--shard is {args.shard}; give i/n with i from 0 to n - 1, such as 0/8")
    elif int(environment.get("WORLD_SIZE", 1)) > 1:
        shard = Shard(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    else:
        return None
    if args.overwrite:
        raise LlavaError(f"--overwrite can't be combined with shards; remove {args.answers_file} and its parts first")
    return shard


def join_when_complete(answers_file: Path, count: int, order: Sequence[Any], run: str) -> bool:
    """Join the `count` parts if all are answered, once, whoever asks; whether the whole is there now.

    Args:
        order: ids of all questions.
        run: what the manifests of this run's parts, and that of its whole, have in common.

    Raises:
        LlavaError: as `join_parts`.
    """
    from filelock import FileLock

    parts = [Shard(index, count).path(answers_file) for index in range(count)]
    lock = answers_file.with_name(f".{answers_file.name}.lock{PART}")
    with writing(answers_file, "the parts are kept"), FileLock(lock, timeout=_LOCK_SECONDS):
        if not finished(answers_file, "run", run):
            done = sum(part.is_file() and manifest_path(part).is_file() for part in parts)
            if done < count:
                log.info("%d of %d parts are answered; the last one joins them", done, count)
                return False
            join_parts(parts, answers_file, order)
        for part in parts:
            part.unlink(missing_ok=True)
            manifest_path(part).unlink(missing_ok=True)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the whole
    return True


def join_parts(parts: Sequence[Path], answers_file: Path, order: Sequence[Any]) -> None:
    """Put the parts together under the final name, with a manifest.

    Raises:
        LlavaError: an answer is missing, doubled or to a question that wasn't asked; parts of different runs.
    """
    answers, manifests = [], []
    for part in parts:
        answers += read_records(part) if part.stat().st_size else []
        manifests.append(read_manifest(part) or {})
    if len({manifest.get("run") for manifest in manifests}) > 1:
        names = sorted(
            {name for one in manifests for name in one if one[name] != manifests[0].get(name)} - _OF_A_PART - {"run"}
        )
        raise LlavaError(
            f"the {len(parts)} parts of {answers_file} are of different runs (different: {', '.join(names)}); "
            f"remove those of the other run and answer them again"
        )
    got = [answer["question_id"] for answer in answers]
    if got != list(order):
        raise LlavaError(
            f"the {len(parts)} parts of {answers_file} hold {len(got)} answers ({len(set(map(str, got)))} different) "
            f"to {len(order)} questions, or not in their order; start anew with --overwrite"
        )
    write_records(answers_file, answers)
    first = next((manifest for manifest in manifests if manifest.get("model_id")), manifests[0])
    counts: dict[str, int] = {}
    for manifest in manifests:
        for name, count in manifest.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + count
    counts.pop("images", None)  # parts share images
    write_manifest(
        answers_file,
        **{key: value for key, value in first.items() if key not in _OF_A_PART},
        asked=len(order),
        processes=len(parts),
        counts=counts,
        seconds=max((manifest.get("seconds", 0) for manifest in manifests), default=0),
    )


def discard(answers_file: Path, shards: Sequence[Shard]) -> None:
    """Forget that there were answers: the parts go, and the whole may be replaced."""
    for shard in shards:
        path = shard.path(answers_file)
        begun = path.with_name(path.name + PART)
        for one in (path, manifest_path(path), begun, begun.with_name(f"{begun.name}.json")):
            one.unlink(missing_ok=True)
    give_up(answers_file)
