"""Scans of the web page: a DICOM file, a series of them or a NIfTI volume, of which a visitor chooses what is shown.

A scan is in the server's memory alone, as the conversation that it belongs to. Needs neither torch nor gradio.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from llava.errors import ImageError
from llava.image_options import ImageOptions, ImageWithOptions
from llava.images import png_bytes
from llava.images.headers.kinds import image_kind
from llava.serve.decoding.pool import DecodingPool
from llava.serve.web.chat_state import LARGE, UploadedImage, reduced, reduced_url

ICON = 96  # pixels

Window = str | tuple[float, float] | None
"""A preset's name, (centre, width), or what the file says."""


Source = tuple[int, ImageOptions]
"""What a view is drawn of: the number of the file, and how it is opened."""


@dataclass(eq=False)
class DrawnView:
    """A view as the browser gets it: `png` is a file, `facts` what the pool's `describe` says of it."""

    source: Source
    png: bytes
    facts: dict[str, Any]
    used: int = 0
    """The higher, the later."""
    home: dict[Source, "DrawnView"] = field(default_factory=dict)
    """Where it is kept."""

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, nearly."""
        return len(self.png)


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
    drawn: dict[Source, DrawnView] = field(default_factory=dict)
    """Views that are kept (`memory_budget`)."""
    name: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """What a browser asks for its slices by; `visitor` is the only one who gets them."""
    visitor: str = ""

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
    def slices_url(self) -> str:
        """Address of its slices but for the place's number at the end. The server draws them as they are to look now;
        what else is in the query tells the browser that they look different."""
        look = urlencode({"axis": self.axis, "window": str(self.window)})
        return f"slice/{self.name}?{look}&place="

    @property
    def source(self) -> Source:
        """Of the view that is chosen."""
        return self._source_at(self.place)

    @property
    def view_key(self) -> tuple[str, Source]:
        """By which an image of a question (`UploadedImage.view`) is known as the view that is chosen now."""
        return self.name, self.source

    def choose_place(self, place: int) -> None:
        """Raises an ImageError if there is no such slice."""
        self._source_at(place)
        self.place = place

    def _source_at(self, place: int) -> Source:
        slices, chosen = self.slices, self.window
        if not 0 <= place < len(slices):
            raise ImageError(f"There is no slice {place}; the scan has {len(slices)}.")
        file, frame = slices[place]
        preset = chosen if isinstance(chosen, str) else None
        window = None if isinstance(chosen, str) else chosen
        if self.kind == "nifti":
            return file, ImageOptions(window=window, preset=preset, axis=self.axis, slice=place)
        return file, ImageOptions(window=window, preset=preset, frame=frame)

    def said(self) -> dict[str, Any]:
        """What is written down of the view: the options, its place in a series, and why it looks as it does."""
        _, options = self.source
        said = options.as_dict()
        if len(self.slices) > 1:
            if len(self.files) > 1:
                said["slice"] = self.place
            said["of"] = len(self.slices)
        return said | {"shown": [str(line) for line in self.facts.get("shown", ())]}

    def choose_axis(self, axis: int) -> None:
        """Cut the volume along another axis, in its middle; `draw` finds how many slices there are."""
        self.axis, self.slices, self.place = axis, [(0, None)], 0

    def look(self, pool: DecodingPool) -> Image.Image:
        """The view as it is opened; `facts` are those of it.

        Raises:
            ImageError: it can't be opened.
        """
        self._count_slices(pool)
        image, self.facts = self._describe(pool, self.source)
        return image

    def draw(self, pool: DecodingPool, place: int | None = None) -> DrawnView:
        """The view of a slice: one that is kept, or a new one. Without `place` the chosen slice's, and `facts` are
        those of it. Raises as `look`."""
        self._count_slices(pool)
        source = self._source_at(self.place if place is None else place)
        view = self.drawn.get(source)
        if view is None:
            image, facts = self._describe(pool, source)
            view = DrawnView(source, png_bytes(reduced(image, LARGE)), facts)
        if place is None:
            self.facts = view.facts
        return view

    def _describe(self, pool: DecodingPool, source: Source) -> tuple[Image.Image, dict[str, Any]]:
        file, options = source
        return pool.describe(ImageWithOptions(self.files[file], options))

    def _count_slices(self, pool: DecodingPool) -> None:
        """Of a volume along an axis that was just chosen; the middle one is shown."""
        if self.kind == "nifti" and len(self.slices) == 1:
            _, facts = self._describe(pool, (0, ImageOptions(axis=self.axis)))
            self.slices, self.place = [(0, None)] * int(facts["frames"]), int(facts["frame"])

    def leave_out(self, number: int) -> None:
        """One of the files goes; what is chosen is the middle of the others."""
        self.slices = [(file - (file > number), frame) for file, frame in self.slices if file != number]
        del self.files[number]
        self.place = len(self.slices) // 2

    def view(self, pool: DecodingPool) -> UploadedImage:
        """The view as an image of a question."""
        key = self.view_key
        file, options = key[1]

        def small(source: Any) -> Image.Image:
            return pool.open(source, longest=LARGE)

        return replace(UploadedImage.from_bytes(self.files[file], small, options, self.said()), view=key)


def read_scans(files: Sequence[tuple[str, bytes]], pool: DecodingPool) -> tuple[list[Scan], list[str]]:
    """DICOM and NIfTI files (name, content) as scans: DICOM files of one series together, sorted by position, then by
    number. And a line on each file that is left out: it can't be read, or its view, the first of a scan, not be opened.
    """
    scans: list[Scan] = []
    refused: list[str] = []
    series: dict[str, list[tuple[tuple[float, float], list[int | None], bytes]]] = {}
    names = {id(content): name for name, content in files}
    for name, content in files:
        try:
            if image_kind(content) == "nifti":
                scans.append(Scan("nifti", [content], [(0, None)], 0))
                continue
            place = pool.place(content)
        except ImageError as error:
            refused.append(f"{name}: {error}")
            continue
        frames: list[int | None] = [*place.frames] or [None]
        series.setdefault(place.series, []).append(((place.position, place.number), frames, content))
    for members in series.values():
        members.sort(key=lambda member: member[0])
        slices: list[tuple[int, int | None]] = [
            (number, frame) for number, (_, frames, _) in enumerate(members) for frame in frames
        ]
        scans.append(Scan("dicom", [content for *_, content in members], slices, len(slices) // 2))
    for scan in scans:
        while scan.slices and not scan.icon:
            file, _ = scan.source
            try:
                scan.icon = reduced_url(scan.look(pool), ICON)
            except ImageError as error:
                refused.append(f"{names[id(scan.files[file])]}: {error}")
                scan.leave_out(file)
    return [scan for scan in scans if scan.slices], refused


def size_of(scan: Scan) -> int:
    """Bytes that it takes."""
    return sum(map(len, scan.files))
