"""The image fuzzer, shortened (`make fuzz` is the long form), and that it finds what there is to find."""

import numpy as np
import pytest

from tests.fuzz.images import KINDS, mutate, mutated, originals, run

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

COUNT = 200


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_open_or_are_refused_plainly(kind):
    result = run(kind, COUNT, seed=1)
    assert result["findings"] == []
    assert result["opened"] + result["refused"] == result["files"] == COUNT
    assert result["opened"] and result["refused"], "the mutations are neither harmless nor all fatal"


def test_a_number_makes_the_same_file_again():
    whole = list(mutated("PNG", 0, 20, seed=3))
    assert list(mutated("PNG", 12, 20, seed=3)) == whole[12:]
    assert list(mutated("PNG", 0, 20, seed=4)) != whole


def test_the_mutations_make_a_plain_reader_raise_all_kinds_of_errors():
    """pydicom and nibabel by themselves raise a dozen kinds of errors on the same files."""
    import io

    import pydicom

    kinds = set()
    files = originals("DICOM")
    for number in range(300):
        generator = np.random.default_rng(number)
        content = mutate(files[number % len(files)], files[0], generator)
        try:
            pydicom.dcmread(io.BytesIO(content)).pixel_array  # noqa: B018
        except Exception as error:  # noqa: BLE001 - counted
            kinds.add(type(error).__name__)
    assert len(kinds) >= 5, kinds
