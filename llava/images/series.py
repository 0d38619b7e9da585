"""A hospital's folder taken apart: DICOM files grouped into series and sorted, volumes, and what can't be used.

What names a patient, a study or a series groups files while this runs, and is written nowhere.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import ImageError, LlavaError, require
from llava.images.headers.dicom_file import (
    DicomFile,
    check_values,
    damaged_header,
    element_errors,
    read_dicom_file,
    sequence,
    whole_number,
)
from llava.images.headers.kinds import image_kind
from llava.images.limits import UPLOAD_LIMITS, Limits, plain_errors

_GROUPING_TAGS = (
    "SeriesInstanceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "InstanceNumber",
    "EchoNumbers",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "Modality",
    "BodyPartExamined",
    "BurnedInAnnotation",
    "SOPClassUID",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_MOST_FRAMES = 5_000
_MAX_NUMBERS = 1024
"""Bytes of a direction or a position, six numbers at most."""
BODY_WINDOWS = {
    "lung": ("CHEST", "LUNG", "THORAX"),
    "brain": ("HEAD", "BRAIN", "SKULL"),
    "bone": ("SPINE", "CSPINE", "TSPINE", "LSPINE", "EXTREMITY", "KNEE", "HIP", "SHOULDER", "ANKLE", "FOOT", "HAND",
             "WRIST", "ELBOW", "LEG", "ARM", "PELVIS"),
    "mediastinum": ("NECK", "HEART", "MEDIASTINUM"),
    "abdomen": ("ABDOMEN", "ABDOMENPELVIS", "LIVER", "KIDNEY", "PANCREAS", "COLON"),
}  # fmt: skip
"""CT presets by DICOM's BodyPartExamined."""
_CODES = {part for parts in BODY_WINDOWS.values() for part in parts}
_CODES |= {"CT", "MR", "CR", "DX", "US", "PT", "NM", "XA", "MG"}


@dataclass
class Slice:
    """One image of a series: a file, and the frame or slice within it."""

    path: Path
    frame: int | None = None


@dataclass
class Series:
    """Images that belong together, in order."""

    slices: list[Slice]
    modality: str = ""
    body_part: str = ""
    """One of DICOM's words for parts of the body; "" for anything else."""
    volume: Path | None = None
    """The file, if it is a volume's; its slices are counted along `axis`."""
    axis: int = 2

    @property
    def preset(self) -> str | None:
        """The CT window of the part of the body; None where there is none to choose."""
        if self.modality != "CT":
            return None
        return next((name for name, parts in BODY_WINDOWS.items() if self.body_part in parts), None)


@dataclass
class Survey:
    """What a folder holds."""

    series: list[Series] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    """Files that aren't used, with the reason in words that name nobody."""


def survey(folder: str | Path, *, axis: int = 2, keep_burned_in: bool = False) -> Survey:
    """All series below a folder; links, which may lead anywhere, aren't followed but left out.

    Args:
        axis: along which volumes are cut.
        keep_burned_in: use images that say that they have text burnt into their pixels.
    """
    found = Survey()
    groups: dict[tuple[Any, ...], list[_Member]] = {}
    for path in _files(Path(folder), found.left_out):
        try:
            if path.is_symlink() or not path.is_file():
                raise ImageError("a link, a device or a pipe; give the file itself")
            kind = image_kind(path)
            if kind == "nifti":
                found.series.append(_volume(path, axis))
            elif kind == "dicom":
                for key, member in _read(path, keep_burned_in, _content(path), str(path), Limits()):
                    groups.setdefault(key, []).append(member)
            else:
                found.left_out.append((path, "neither DICOM nor NIfTI"))
        except ImageError as error:
            found.left_out.append((path, without_path(error, path)))
    by_path = sorted(groups.values(), key=lambda members: min((member.path, member.frame or 0) for member in members))
    found.series += [_series(members) for members in by_path]
    return found


@dataclass
class _Member:
    """A frame of a file, None for the only one."""

    path: Path
    frame: int | None
    position: float
    number: float
    modality: str
    body_part: str


def _files(folder: Path, unread: list[tuple[Path, str]]) -> Iterator[Path]:
    """All files and links below a folder; a folder that can't be looked into goes to `unread`, with the reason."""

    def note(error: OSError) -> None:
        unread.append((Path(error.filename), f"a folder that can't be read ({error.strerror})"))

    for where, folders, names in os.walk(folder, onerror=note):
        folders.sort()
        links = (name for name in folders if os.path.islink(os.path.join(where, name)))
        yield from (Path(where) / name for name in sorted([*names, *links]))


@dataclass(frozen=True)
class SeriesPlace:
    """Where a DICOM file stands in its series; `series` is a digest of what its files have in common."""

    series: str
    position: float
    number: float
    frames: list[int]
    """Of a file of several, in the order of their places."""


def series_place(content: bytes, *, limits: Limits = UPLOAD_LIMITS) -> SeriesPlace:
    """The place of a file that came by itself, by its header alone; burnt-in text is left to whoever shows it.

    Raises:
        ImageError: the header can't be read, there is no image in the file, it's beyond the limits.
    """
    # A file that names no series is one by itself.
    own = Path(hashlib.sha256(content).hexdigest())
    limits.check_bytes(len(content), "a DICOM file")
    found = _read(own, True, content, "a DICOM file", limits)
    key, first = found[0]
    frames = sorted((member.position, member.frame) for _, member in found if member.frame is not None)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return SeriesPlace(digest, first.position, first.number, [frame for _, frame in frames])


def _content(path: Path) -> bytes:
    limits = Limits()
    try:
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise ImageError(f"{path}: can't be read ({error.strerror})") from None
    limits.check_bytes(len(content), str(path))
    return content


def _read(
    path: Path, keep_burned_in: bool, content: bytes, name: str, limits: Limits
) -> list[tuple[tuple[Any, ...], _Member]]:
    """(what it has in common with the rest of its series, itself) of each frame of a file, from its `content`."""
    pydicom = require("pydicom", "medical")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), plain_errors(name, "the header can't be read"):
        warnings.simplefilter("ignore")
        file = read_dicom_file(pydicom, content, name, limits, tags=_GROUPING_TAGS)
        header = file.header
        if str(header.get("BurnedInAnnotation", "")).upper() == "YES" and not keep_burned_in:
            raise ImageError("says that text is burnt into its pixels (--keep-burned-in uses it all the same)")
        sides = whole_number(header, "Rows", name), whole_number(header, "Columns", name)
        common, echo = (str(header.get("SeriesInstanceUID") or path), *sides), str(header.get("EchoNumbers") or "")
        with element_errors("InstanceNumber", name):
            number = float(header.get("InstanceNumber") or 0)
        codes = _code(header.get("Modality")), _code(header.get("BodyPartExamined"))
        frames = whole_number(header, "NumberOfFrames", name, 1)
        if not 1 <= frames <= len(content):
            raise damaged_header(name, f"NumberOfFrames is {frames:,}")
        if frames > _MOST_FRAMES:
            raise ImageError(f"a file of {frames:,} frames can't be looked through; at most {_MOST_FRAMES:,} can")
        groups = _Groups(pydicom, file)
        found = []
        for frame in range(frames):
            directions = groups.numbers(frame, "PlaneOrientationSequence", "ImageOrientationPatient")
            place = groups.numbers(frame, "PlanePositionSequence", "ImagePositionPatient")
            position = 0.0
            if len(directions) == 6 and len(place) == 3:
                position = float(np.dot(np.cross(directions[:3], directions[3:]), place))
            # Localisers and repetitions stand in one series with the slices that they aren't. Zero has no sign (+ 0.0).
            key = (*common, tuple(round(value, 2) + 0.0 for value in directions), echo)
            found.append((key, _Member(path, frame if frames > 1 else None, position, number, *codes)))
        return found


class _Groups:
    """What a header says of each frame, read under its budget."""

    def __init__(self, pydicom: Any, file: DicomFile):
        self.pydicom, self.file = pydicom, file
        self.shared, self.own = (
            sequence(pydicom, file.header, f"{whose}FunctionalGroupsSequence", file.budget)
            for whose in ("Shared", "PerFrame")
        )

    def numbers(self, frame: int, group: str, keyword: str) -> list[float]:
        """The values of a field: of the frame's own group, the one that all share, or the file."""
        scopes = [self.file.header]
        for item in (*self.shared[:1], *self.own[frame : frame + 1]):
            scopes += sequence(self.pydicom, item, group, self.file.budget)[:1]
        values: list[float] = []
        for scope in scopes:
            check_values(scope, self.file.budget.name)
            element = scope.get_item(keyword)
            if element is not None and isinstance(element.value, bytes) and len(element.value) > _MAX_NUMBERS:
                raise damaged_header(self.file.budget.name, f"{keyword} has a value of length {len(element.value):,}")
            with element_errors(keyword, self.file.budget.name):
                values = [float(value) for value in scope.get(keyword) or ()] or values
        return values


def _series(members: Sequence[_Member]) -> Series:
    """Sorted by place in the body, then by number."""
    ordered = sorted(members, key=lambda one: (one.position, one.number, one.path, one.frame or 0))
    slices = [Slice(member.path, member.frame) for member in ordered]
    return Series(slices, ordered[0].modality, ordered[0].body_part)


def _volume(path: Path, axis: int) -> Series:
    from llava.images.opening import describe_image

    try:
        count = describe_image(path, axis=axis).frames
    except LlavaError as error:
        raise ImageError(without_path(error, path)) from error
    return Series([Slice(path, frame) for frame in range(count)], volume=path, axis=axis)


def _code(value: Any) -> str:
    """A word of DICOM's own lists; anything else could be text that somebody typed."""
    text = str(value or "").upper().replace(" ", "")
    return text if text in _CODES else ""


def without_path(error: Exception, path: Path) -> str:
    """The error's words without the file's name, which may be a patient's."""
    return str(error).replace(f"{path}: ", "").replace(str(path), "the file")
