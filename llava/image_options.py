"""How a DICOM file or a NIfTI volume is shown: grey window or preset, frame, axis and slice; declared once.

Records and questions give them beside an image's path (`{"path": "ct.nii.gz", "preset": "lung", "slice": 40}`),
requests of the API beside its address (`image_options`), commands as flags, the web page by its controls.
`llava.images.open_image` takes an `ImageWithOptions` wherever it takes an image. Needs no other package.
"""

import os
import re
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from llava.errors import LlavaError

CT_WINDOWS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "brain": (40, 80),
        "subdural": (75, 215),
        "stroke": (32, 8),
        "lung": (-600, 1500),
        "mediastinum": (50, 350),
        "bone": (400, 1800),
        "abdomen": (50, 400),
        "soft tissue": (40, 400),
    }
)
"""(centre, width) in Hounsfield units by the preset's name."""
AXES = ("sagittal", "coronal", "axial")
"""What a volume's axes 0, 1 and 2 are called."""
KINDS = MappingProxyType(
    {
        "dicom": ("a DICOM file", ("window", "preset", "frame")),
        "nifti": ("a NIfTI volume", ("window", "preset", "axis", "slice")),
        "slide": ("a slide of pathology", ("frame",)),
        "image": ("neither DICOM nor NIfTI", ()),
    }
)
"""What a kind of file is called, and which options it takes."""
_TOGETHER = (("window", "preset"), ("frame", "slice"), ("frame", "axis"))
_LARGEST = 1e9


@dataclass(frozen=True)
class ImageOptions:
    """What is asked for; None is what the file says, or the middle one.

    Raises:
        LlavaError: a value of another kind or range, or two options that exclude each other; it names them.
    """

    window: tuple[float, float] | None = None
    """(centre, width) of the values that black to white stand for, in the file's units."""
    preset: str | None = None
    """A window by its name in `CT_WINDOWS`."""
    frame: int | None = None
    """Of a DICOM file of several, from 0; a slide's level, from 1."""
    axis: int | None = None
    """Of a volume, along which slices are counted: 0 sagittal, 1 coronal, 2 axial."""
    slice: int | None = None
    """Of a volume, from 0."""

    def __post_init__(self) -> None:
        if self.window is not None:
            object.__setattr__(self, "window", _window(self.window))
        if self.preset is not None:
            if str(self.preset).lower() not in CT_WINDOWS:
                raise LlavaError(f"preset: {_shown(self.preset)} is unknown; give one of {', '.join(CT_WINDOWS)}")
            object.__setattr__(self, "preset", str(self.preset).lower())
        for name in ("frame", "axis", "slice"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= _LARGEST):
                raise LlavaError(f"{name}: {_shown(value)} is no whole number from 0")
        if self.axis is not None and self.axis > 2:
            raise LlavaError(f"axis: {self.axis} is none of 0 (sagittal), 1 (coronal) and 2 (axial)")
        for first, second in _TOGETHER:
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise LlavaError(f"{first} and {second} exclude each other; give one of them")

    @classmethod
    def parse(cls, given: Any) -> "ImageOptions":
        """The options of a JSON object; null is the same as not given."""
        if not isinstance(given, Mapping):
            raise LlavaError(f'image options are an object such as {{"preset": "lung"}}, not {_shown(given)}')
        known = [field.name for field in fields(cls)]
        unknown = [name for name, value in given.items() if name not in known and value is not None]
        if unknown:
            raise LlavaError(f"{_shown(unknown[0])} is no option of an image; known: {', '.join(known)}")
        return cls(**{name: value for name, value in given.items() if name in known and value is not None})

    def as_dict(self) -> dict[str, Any]:
        """What was given, as JSON has it; `parse` reads it."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value is not None
        }

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    def __str__(self) -> str:
        """`preset lung, slice 40`."""
        shown = self.as_dict()
        if self.window is not None:
            shown["window"] = "/".join(f"{value:g}" for value in self.window)
        return ", ".join(f"{name} {value}" for name, value in shown.items())

    @property
    def grey(self) -> str | tuple[float, float] | None:
        """The window: (centre, width), or a preset's name."""
        return self.window or self.preset

    @property
    def index(self) -> int | None:
        """The frame or the slice."""
        return self.slice if self.frame is None else self.frame

    def check_kind(self, kind: str, name: str) -> None:
        """Raises a LlavaError for an option that files of a kind (`KINDS`) don't take; `name` opens it."""
        called, taken = KINDS[kind]
        wrong = [option for option in self.as_dict() if option not in taken]
        if wrong:
            takes = f"which takes {', '.join(taken)}" if taken else "which takes no options"
            raise LlavaError(f"{name}: {wrong[0]} is given, but the file is {called}, {takes}")

    def for_kind(self, kind: str) -> "ImageOptions":
        """Those that files of a kind take."""
        return ImageOptions(**{name: value for name, value in self._given().items() if name in KINDS[kind][1]})

    def or_else(self, defaults: "ImageOptions") -> "ImageOptions":
        """These, with those of `defaults` about which nothing is said here: of window and preset, and of frame, axis
        and slice, all or none are taken."""
        given, others = self._given(), defaults._given()
        for group in (("window", "preset"), ("frame", "axis", "slice")):
            if not any(name in given for name in group):
                given |= {name: others[name] for name in group if name in others}
        return ImageOptions(**given)

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.as_dict()}


NO_OPTIONS = ImageOptions()


@dataclass(frozen=True)
class ImageWithOptions:
    """An image, and how it is shown; `source` is whatever else `llava.images.open_image` takes."""

    source: Any
    options: ImageOptions


def read_image_entry(entry: Mapping[str, Any]) -> Any:
    """What an object with `path` or `bytes` stands for: the path, the object itself if it embeds a file without more,
    an ImageWithOptions if options stand beside either.

    Raises:
        LlavaError: an option is unknown, wrong, or excludes another.
    """
    path, content = entry.get("path"), entry.get("bytes")
    if content is None and not isinstance(path, (str, os.PathLike)):
        return entry
    options = ImageOptions.parse({name: value for name, value in entry.items() if name not in ("path", "bytes")})
    plain: Any = path if content is None else entry
    return ImageWithOptions(path if content is None else content, options) if options else plain


def with_options_of(image: Any, source: Any) -> Any:
    """`source`, with the options that `image` has."""
    return ImageWithOptions(source, image.options) if isinstance(image, ImageWithOptions) else source


def options_of(image: Any) -> dict[str, Any] | None:
    """The options of an image as JSON has them; None for an image without."""
    return image.options.as_dict() if isinstance(image, ImageWithOptions) and image.options else None


def add_image_flags(parser: ArgumentParser) -> None:
    """Flags that say how DICOM and NIfTI files are shown of which nothing else is said."""
    take_negative_windows(parser)
    group = parser.add_argument_group("DICOM and NIfTI", "for images that say nothing of it themselves")
    group.add_argument("--window", metavar="CENTRE,WIDTH", help="grey window in the file's units, such as 40,80")
    group.add_argument("--preset", help=f"grey window of CT by name: {', '.join(CT_WINDOWS)}")
    group.add_argument("--frame", type=int, help="frame of DICOM files of several; default: the middle one")
    group.add_argument("--axis", type=int, help="axis of volumes: 0 sagittal, 1 coronal, 2 axial; default: 2")
    group.add_argument("--slice", type=int, help="slice of volumes; default: the middle one")


def add_window_flag(parser: ArgumentParser, help: str, default: str | None = None) -> None:
    """`--window`, which may be called `--preset` too: `parse_window` of what is given, or the default."""
    take_negative_windows(parser)
    help = f"{help}CENTRE,WIDTH, or one of {', '.join(CT_WINDOWS)}"
    parser.add_argument("--window", "--preset", action=_ReadWindow, default=default, help=help)


class _ReadWindow(Action):
    """What is wrong is said of the flag that was typed."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values if values == self.default else parse_window(values, option_string))


def take_negative_windows(parser: ArgumentParser) -> None:
    """`-600,1500` is a window, though argparse would take it for a flag."""
    parser._negative_number_matcher = re.compile(r"-\d[\d.,/-]*$")


def image_options_from_args(args: Namespace) -> ImageOptions:
    """What the flags of `add_image_flags` give.

    Raises:
        LlavaError: names the flag.
    """
    given = {name: getattr(args, name) for name in ("preset", "frame", "axis", "slice")}
    if args.window is not None:
        window = parse_window(args.window)
        if isinstance(window, str) and given["preset"] is not None:
            raise LlavaError("--window and --preset exclude each other; give one of them")
        given["preset" if isinstance(window, str) else "window"] = window
    try:
        return ImageOptions(**given)
    except LlavaError as error:
        raise LlavaError(f"--{error}") from error


def parse_window(text: str, flag: str = "--window") -> str | tuple[float, float]:
    """`40,80` (or `40/80`), or a preset's name, which was given as `flag`.

    Raises:
        LlavaError: it is neither.
    """
    if text.lower() in CT_WINDOWS:
        return text.lower()
    try:
        return _window([float(part) for part in text.replace("/", ",").split(",")])
    except (ValueError, LlavaError):
        raise LlavaError(
            f"{flag} {text}: give centre and width, such as 40,80, or one of {', '.join(CT_WINDOWS)}"
        ) from None


def _window(value: Any) -> tuple[float, float]:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or not all(_is_number(each) for each in value):
        raise LlavaError(f"window: {_shown(value)} is no centre and width, such as [40, 80]")
    if not value[1] > 0:
        raise LlavaError(f"window: the width has to be above 0, not {value[1]:g}")
    return float(value[0]), float(value[1])


def _is_number(value: Any) -> bool:
    # Not finite is not within the range either.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
