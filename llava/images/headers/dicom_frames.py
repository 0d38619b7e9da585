"""What a DICOM header says of one frame. In multi-frame files of the newer kind that stands in groups: one shared by
all frames, and one of each frame.
"""

from dataclasses import dataclass

import numpy as np

from llava.images.headers.dicom_file import DicomFile, check_values, element_errors, sequence

_GREY_NUMBERS = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
_GREY_TABLES = ("ModalityLUTSequence", "VOILUTSequence")


@dataclass(frozen=True)
class Geometry:
    """Where a frame lies in the patient; None for what the file doesn't say."""

    directions: np.ndarray | None
    """float `[2, 3]`: along a row, and along a column."""
    position_mm: tuple[float, ...] | None
    """Of the first pixel's centre."""
    spacing_mm: tuple[float, ...] | None
    """Between rows, columns and, where known, slices."""


def frame_groups(pydicom, file: DicomFile, index: int) -> list:
    """The functional groups that apply to a frame: what all frames share, then its own, which takes precedence."""
    groups = []
    for keyword, place in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        groups += sequence(pydicom, file.header, keyword, file.budget)[place : place + 1]
    return groups


def grey_module(pydicom, file: DicomFile, groups: list):
    """A data set with the rescale, window and tables of a frame."""
    header, budget = file.header, file.budget
    module = pydicom.Dataset()
    module.file_meta = header.file_meta
    module.set_original_encoding(*header.original_encoding)
    if "PixelRepresentation" in header:
        module.PixelRepresentation = header.PixelRepresentation
    for scope in _scopes(pydicom, file, groups, "PixelValueTransformationSequence", "FrameVOILUTSequence"):
        for keyword in (*_GREY_NUMBERS, "VOILUTFunction"):
            if keyword in scope:
                with element_errors(keyword, budget.name):
                    module[keyword] = scope[keyword]
                    _check_number(scope[keyword].value if keyword in _GREY_NUMBERS else None)
        for keyword in _GREY_TABLES:
            tables = sequence(pydicom, scope, keyword, budget)[:1]
            for table in tables:
                check_values(table, budget.name)
            # Some files name a table without giving one.
            usable = [table for table in tables if table.get("LUTDescriptor") and table.get("LUTData")]
            if usable:
                setattr(module, keyword, usable)
    return module


def _check_number(value) -> None:
    """pydicom gives text as it is that should be a number: a ValueError; nothing at all is fine."""
    for one in np.atleast_1d(value)[:1]:
        float(one or 0)


def own_window(module) -> tuple[float, float] | None:
    """The first window of a grey module, if it has a usable one."""
    if module.get("WindowCenter") is None or module.get("WindowWidth") is None:
        return None
    centre, width = np.atleast_1d(module.WindowCenter), np.atleast_1d(module.WindowWidth)
    if not len(centre) or not len(width) or not float(width[0]) > 0:
        return None
    return float(centre[0]), float(width[0])


def geometry(pydicom, file: DicomFile, groups: list) -> Geometry:
    """Where the frame of these groups lies."""
    names = "PlaneOrientationSequence", "PlanePositionSequence", "PixelMeasuresSequence"
    scopes = list(_scopes(pydicom, file, groups, *names))

    def numbers(keyword: str) -> list[float]:
        with element_errors(keyword, file.budget.name):
            given = [value for scope in scopes if (value := scope.get(keyword)) is not None]
            return [float(value) for value in np.atleast_1d(given[-1])] if given else []

    directions, position = numbers("ImageOrientationPatient"), numbers("ImagePositionPatient")
    spacing = numbers("PixelSpacing") or numbers("ImagerPixelSpacing")
    between = (numbers("SpacingBetweenSlices") or numbers("SliceThickness"))[:1]
    return Geometry(
        np.reshape(directions, (2, 3)) if len(directions) == 6 else None,
        tuple(position) if len(position) == 3 else None,
        (*spacing, *between) if len(spacing) == 2 else None,
    )


def _scopes(pydicom, file: DicomFile, groups: list, *names: str):
    """The data set itself, then the items of these sequences of each group; later ones take precedence."""
    yield file.header
    for group in groups:
        for name in names:
            for item in sequence(pydicom, group, name, file.budget)[:1]:
                check_values(item, file.budget.name)
                yield item
