"""Scans of the web page: a DICOM file, a series of them or a NIfTI volume, of which a visitor chooses what is shown.

A scan is in the server's memory alone, as the conversation that it belongs to. Needs neither torch nor gradio.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from llava.image_options import ImageOptions, ImageWithOptions
from llava.images.opening import image_kind
from llava.serve.decoding.pool import DecodingPool
from llava.serve.web.chat_state import LARGE, UploadedImage, reduced_url

ICON = 96  # pixels

Window = str | tuple[float, float] | None
"""A preset's name, (centre, width), or what the file says."""


@dataclass(eq=False)
class Scan:
    """`slices` are (file, frame within it or None), in the order of their places in the body; of a volume only the
    number of slices along `axis` is known. `window` and `place` are what is chosen."""

    kind: str
    files: list[bytes]
    slices: list[tuple[int, int | None]]
    place: int
    axis: int = 2
    window: Window = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What the pool's `describe` says of the view that is shown."""
    is_wanted: bool = True
    """Whether the view goes with the next question."""
    icon: str = ""
    """Its first view, tiny, as a data: URL."""

    @property
    def is_grey(self) -> bool:
        return self.facts.get("values") is not None

    @property
    def title(self) -> str:
        """What it is, in words that name nobody."""
        modality = self.facts.get("modality") or ("volume" if self.kind == "nifti" else "image")
        if len(self.slices) == 1:
            return str(modality)
        what = "frames" if self.kind == "dicom" and len(self.files) == 1 else "slices"
        return f"{modality}, {len(self.slices)} {what}"

    @property
    def options(self) -> ImageOptions:
        """Of the file that is shown."""
        _, frame = self.slices[self.place]
        preset = self.window if isinstance(self.window, str) else None
        window = None if isinstance(self.window, str) else self.window
        if self.kind == "nifti":
            return ImageOptions(window=window, preset=preset, axis=self.axis, slice=self.place)
        return ImageOptions(window=window, preset=preset, frame=frame)

    def said(self) -> dict[str, Any]:
        """What is written down of the view: the options, its place in a series, and why it looks as it does."""
        said = self.options.as_dict()
        if len(self.slices) > 1:
            if len(self.files) > 1:
                said["slice"] = self.place
            said["of"] = len(self.slices)
        return said | {"shown": [str(line) for line in self.facts.get("shown", ())]}

    def choose_axis(self, axis: int) -> None:
        """Cut the volume along another axis, in its middle; `look` finds how many slices there are."""
        self.axis, self.slices, self.place = axis, [(0, None)], 0

    def look(self, pool: DecodingPool) -> Image.Image:
        """The view as it is opened; `facts` are those of it.

        Raises:
            ImageError: it can't be opened.
        """
        if self.kind == "nifti" and len(self.slices) == 1:
            _, facts = pool.describe(ImageWithOptions(self.files[0], ImageOptions(axis=self.axis)))
            self.slices, self.place = [(0, None)] * int(facts["frames"]), int(facts["frame"])
        file, _ = self.slices[self.place]
        image, self.facts = pool.describe(ImageWithOptions(self.files[file], self.options))
        return image

    def view(self, pool: DecodingPool) -> UploadedImage:
        """The view as an image of a question."""
        file, _ = self.slices[self.place]

        def small(source: Any) -> Image.Image:
            return pool.open(source, longest=LARGE)

        return UploadedImage.from_bytes(self.files[file], small, self.options, self.said())


def read_scans(contents: Sequence[bytes], pool: DecodingPool) -> list[Scan]:
    """DICOM and NIfTI files as scans: DICOM files of one series together, sorted by position, then by number.

    Raises:
        ImageError: a file can't be read, or its first view not be opened.
    """
    scans: list[Scan] = []
    series: dict[str, list[tuple[tuple[float, float], list[int | None], bytes]]] = {}
    for content in contents:
        if image_kind(content) == "nifti":
            scans.append(Scan("nifti", [content], [(0, None)], 0))
            continue
        place = pool.place(content)
        frames: list[int | None] = [*place.frames] or [None]
        series.setdefault(place.series, []).append(((place.position, place.number), frames, content))
    for members in series.values():
        members.sort(key=lambda member: member[0])
        slices: list[tuple[int, int | None]] = [
            (number, frame) for number, (_, frames, _) in enumerate(members) for frame in frames
        ]
        scans.append(Scan("dicom", [content for *_, content in members], slices, len(slices) // 2))
    for scan in scans:
        scan.icon = reduced_url(scan.look(pool), ICON)
    return scans


def size_of(scan: Scan) -> int:
    """Bytes that it takes."""
    return sum(map(len, scan.files))
