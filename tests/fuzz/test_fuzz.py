"""The fuzzer, shortened (`make fuzz` is the long form), and that it finds what there is to find."""

import json

import numpy as np
import pytest

from tests.fuzz.__main__ import KINDS
from tests.fuzz.harness import mutated, run
from tests.fuzz.images import originals
from tests.fuzz.mutations import mutate, mutate_json

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")
pytest.importorskip("openslide")

COUNT = dict.fromkeys(KINDS, 200) | {"CONFIG": 40, "TOKENIZER": 80}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused_plainly(kind):
    result = run(kind, COUNT[kind], seed=1)
    assert result["findings"] == []
    assert result["opened"] + result["refused"] == result["files"] == COUNT[kind]
    assert result["opened"] and result["refused"], "the mutations are neither harmless nor all fatal"


def test_a_number_makes_the_same_file_again():
    whole = list(mutated("PNG", 0, 20, seed=3))
    assert list(mutated("PNG", 12, 20, seed=3)) == whole[12:]
    assert list(mutated("PNG", 0, 20, seed=4)) != whole


def test_values_of_json_are_changed_everywhere():
    content = json.dumps({"a": [1, {"b": "x"}], "c": None}).encode()
    made = [mutate_json(content, content, np.random.default_rng(number)) for number in range(300)]
    sound = [text for text in made if _is_json(text)]
    assert len(set(made)) > 200 and len(sound) > 200
    assert any(b'"a": null' in text for text in sound) and any(b'"b"' not in text for text in sound)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


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
