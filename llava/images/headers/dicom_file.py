"""A DICOM file's header, and where its pixels lie: read once, under a budget of elements and items.

Only the tags that describe pixels are read at all: no patient's name, number or date can reach a log or an error,
because none is ever parsed.
"""

import contextlib
import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava.errors import ImageError
from llava.images.headers.inflating import inflate
from llava.images.limits import Limits, plain_errors

_PIXEL_TAGS = (
    "SOPClassUID",
    "Modality",
    "BurnedInAnnotation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "PresentationLUTShape",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SpacingBetweenSlices",
    "SliceThickness",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ICCProfile",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "PaletteColorLookupTableUID",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
_DICOMDIR = "1.2.840.10008.1.3.10"
_EXPLICIT = b"\0" * 128 + b"DICM\2\0\x10\0UI\x14\0001.2.840.10008.1.2.1\0"
"""The begin of a file in Explicit VR Little Endian, which is what a deflated data set is once unpacked."""
_PIXELS = {(0x7FE0, 0x0010): "PixelData", (0x7FE0, 0x0008): "FloatPixelData", (0x7FE0, 0x0009): "DoubleFloatPixelData"}
_UNDEFINED = 0xFFFFFFFF
_ITEM = b"\xfe\xff\x00\xe0"
_UID = re.compile(r"[0-9.]{1,64}")

MAX_READS = 250_000
"""Elements and items of sequences: about 3,000 frames of the newer kind, or 4 seconds."""
_MAX_FRAGMENTS = 250_000
_MAX_DEFLATED = 256 << 20
_LONG_VALUE = 1024
_MAX_VALUE = 256 << 10
"""Bytes of an element that isn't a sequence; the largest tables have 131,072."""
_MAX_LONG_VALUE = 4 << 20
_LONG = frozenset({0x0028_2000, 0x7FE0_0001, 0x7FE0_0002})
"""The colour profile and the tables of frames."""
_SEQUENCES = frozenset({0x0028_3000, 0x0028_3010, 0x5200_9229, 0x5200_9230})
_SIZES = {"US": 2, "SS": 2, "US or SS": 2, "UL": 4, "SL": 4, "FL": 4, "FD": 8, "UV": 8, "SV": 8}
"""Bytes of a value, by its type."""
_MAX_META_VALUE = 1 << 20
_CHARACTER_SETS = frozenset({b"\x08\0\x05\0", b"\0\x08\0\x05"})


@dataclass(frozen=True)
class DicomFile:
    header: Any
    """pydicom's data set of the tags about pixels."""
    syntax: Any
    """UID of the transfer syntax."""
    keyword: str
    """The element that holds the pixels."""
    vr: str | None
    content: bytes
    start: int
    """Where its value begins in `content`."""
    length: int | None
    """Of the value in bytes; None where it goes on to a delimiter."""
    budget: "Budget"

    def pixels(self) -> memoryview:
        """The value of the pixels' element, of an uncompressed file."""
        end = len(self.content) if self.length is None else self.start + self.length
        return memoryview(self.content)[self.start : end]

    def frame(self, pydicom, index: int, frames: int, name: str) -> bytes:
        """A compressed frame."""
        if self.content.count(_ITEM, self.start) > _MAX_FRAGMENTS:
            raise ImageError(f"{name}: pixels in more than {_MAX_FRAGMENTS:,} fragments aren't read")
        source = io.BytesIO(self.content)
        source.seek(self.start)
        self._check_offsets(name)
        table, lengths = (self.header.get(keyword) for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"))
        return pydicom.encaps.get_frame(
            source, index, number_of_frames=frames, extended_offsets=(table, lengths) if table and lengths else None
        )

    def _check_offsets(self, name: str) -> None:
        """The table in front of the frames, of four bytes for each, would be turned into objects."""
        head = self.content[self.start : self.start + 8]
        size = struct.unpack("<L", head[4:])[0] if len(head) == 8 and head[:4] == _ITEM else 0
        if size > 4 * _MAX_FRAGMENTS:
            raise ImageError(f"{name}: the DICOM pixels are damaged (a table of frames of {size:,} bytes)")


class Budget:
    """How many elements and items may still be read of a file."""

    def __init__(self, name: str):
        self.name = name
        self.left = MAX_READS

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self._spent()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """pydicom turns what its reader raises within a sequence into an error of its own."""
        try:
            yield
        except OSError:
            raise (
                self._spent()
                if self.left < 0
                else ImageError(f"{self.name}: the DICOM header is damaged or cut off (a sequence)")
            ) from None

    def _spent(self) -> ImageError:
        return ImageError(f"{self.name}: a DICOM header with more than {MAX_READS:,} elements isn't read")


class _Deflated(Exception):
    """The data set is deflated from this position on."""


class _Counted(io.BytesIO):
    """What pydicom parses, one read for each element, value and item; so all of them are counted."""

    def __init__(self, content: bytes, budget: Budget):
        super().__init__(content)
        self.content, self.budget = content, budget

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            # Only a deflated data set is ever read to its end, to be unpacked without a cap.
            raise _Deflated
        self.budget.spend()
        if size > _LONG_VALUE:
            self._check_long_value(size)
        return super().read(size)

    def _check_long_value(self, size: int) -> None:
        """pydicom makes objects of two kinds of values by itself: character sets, and the file meta information."""
        place = self.tell()
        short, long = self.content[place - 8 : place - 4], self.content[place - 12 : place - 8]
        if not short[:2].isalpha():  # otherwise these are the VR, and the tag stands before them
            long = short
        if {short, long} & _CHARACTER_SETS or (long[:2] == b"\2\0" and size > _MAX_META_VALUE):
            raise damaged_header(self.budget.name, f"it has a value of length {size:,}")


def read_dicom_file(
    pydicom, content: bytes, name: str, limits: Limits, *, tags: Sequence[str] = _PIXEL_TAGS
) -> DicomFile:
    """Of the header only `tags`, by their keywords.

    Raises:
        ImageError: no DICOM, an index (DICOMDIR), no image in it, too many elements, damaged.
    """
    budget = Budget(name)
    with plain_errors(name, "the DICOM header is damaged"):
        try:
            source = _Counted(content, budget)
            header = _parse(pydicom, source, tags)
        except _Deflated:
            unpacked = inflate(memoryview(content)[source.tell() :], min(limits.max_volume_bytes, _MAX_DEFLATED), name)
            if unpacked is None:
                raise ImageError(
                    f"{name}: deflated DICOM that grows beyond {_MAX_DEFLATED >> 20} MiB isn't read; "
                    f"convert it to an uncompressed one (dcmconv +te)"
                ) from None
            content = _EXPLICIT + unpacked
            source = _Counted(content, budget)
            header = _parse(pydicom, source, tags)
        check_values(header, name)
        if header.get("SOPClassUID") == _DICOMDIR or header.file_meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
            raise ImageError(f"{name}: a DICOMDIR is an index, not an image; give one of the files it lists")
        if "Rows" not in header or "Columns" not in header:
            raise ImageError(f"{name}: a DICOM file without an image, or no DICOM file at all")
        syntax = header.file_meta.get("TransferSyntaxUID") or _guessed_syntax(pydicom, header)
        keyword, vr, start, length = _locate_pixels(header, content, source.tell(), name)
        return DicomFile(header, syntax, keyword, vr, content, start, length, budget)


def sequence(pydicom, dataset, keyword: str, budget: Budget) -> list:
    """The items of a sequence, parsed under the same budget (pydicom by itself would parse it when first asked)."""
    from pydicom.dataelem import RawDataElement
    from pydicom.filereader import read_sequence

    if keyword not in dataset:
        return []
    element = dataset.get_item(keyword)
    if not isinstance(element, RawDataElement):
        return list(element.value) if element.VR == "SQ" else []
    value = element.value or b""
    if element.VR not in (None, "SQ", "UN"):
        return []
    source = _Counted(value, budget)
    with budget.counting():
        return list(read_sequence(source, element.is_implicit_VR, element.is_little_endian, len(value), "iso8859"))


def transfer_syntax_name(syntax) -> str:
    """For messages; what is no UID at all isn't shown."""
    return syntax.name if _UID.fullmatch(str(syntax)) else "unknown"


def _parse(pydicom, source: _Counted, tags: Sequence[str]):
    with source.budget.counting():
        return pydicom.dcmread(source, stop_before_pixels=True, force=True, specific_tags=list(tags))


def check_values(dataset, name: str) -> None:
    """Before pydicom makes Python objects of them, which takes up to a hundred times their bytes.

    Raises:
        ImageError: with the element: too long, or no whole number of values of its type.
    """
    from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag

    for element in dataset.values():
        tag, size = element.tag, len(element.value) if isinstance(element.value, bytes) else 0
        if tag in _SEQUENCES or not size:
            continue  # sequences are parsed by `sequence` alone
        is_untold = element.VR in (None, "UN") and dictionary_has_tag(tag)
        vr = dictionary_VR(tag) if is_untold else element.VR
        is_long = size > (_MAX_LONG_VALUE if tag in _LONG else _MAX_VALUE)
        if is_long or element.VR == "SQ" or size % _SIZES.get(vr, 1):
            said = keyword_for_tag(tag) or f"({tag.group:04x},{tag.elem:04x})"
            raise damaged_header(name, f"{said} has a value of length {size:,}")


def damaged_header(name: str, what: str) -> ImageError:
    """The error of a header in which `what`."""
    return ImageError(f"{name}: {_damage(what)}")


def element_errors(keyword: str, name: str) -> contextlib.AbstractContextManager[None]:
    """Within, what fails becomes an ImageError that names the element."""
    return plain_errors(name, _damage(f"{keyword} has no usable value"))


def _damage(what: str) -> str:
    return f"the DICOM header is damaged ({what}); correct this element, or export the image as PNG"


def whole_number(dataset, keyword: str, name: str, default: int | None = None) -> int:
    """The value of an element that has a single one; `default` for none, and for zero.

    Raises:
        ImageError: with the element: it holds anything else, or nothing and there is no default.
    """
    with element_errors(keyword, name):
        value: Any = dataset.get(keyword) or default
        return int(value)


def _guessed_syntax(pydicom, header):
    is_implicit, is_little = header.original_encoding
    if is_implicit:
        return pydicom.uid.ImplicitVRLittleEndian
    return pydicom.uid.ExplicitVRLittleEndian if is_little else pydicom.uid.ExplicitVRBigEndian


def _locate_pixels(header, content: bytes, place: int, name: str) -> tuple[str, str | None, int, int | None]:
    """(keyword, VR, begin and length of the value) of the element at `place`, where parsing has stopped."""
    is_implicit, is_little = header.original_encoding
    order = "<" if is_little else ">"
    # Some writers change to implicit VR in the middle of a file; pydicom follows them.
    is_implicit = is_implicit or not content[place + 4 : place + 6].isalpha()
    if place + (8 if is_implicit else 12) > len(content):
        raise ImageError(f"{name}: the DICOM pixels are missing or cut off")
    group, number = struct.unpack_from(order + "HH", content, place)
    if (group, number) not in _PIXELS:
        raise ImageError(f"{name}: the DICOM pixels are missing or cut off")
    at = place + (4 if is_implicit else 8)
    (length,) = struct.unpack_from(order + "L", content, at)
    vr = None if is_implicit else content[place + 4 : place + 6].decode("ascii", "replace")
    return _PIXELS[group, number], vr, at + 4, None if length == _UNDEFINED else length
