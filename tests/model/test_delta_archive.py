"""Zips that a delta could come in: what isn't as it should be is said in one line, before it takes memory."""

import zipfile
from pathlib import Path

import pytest

from llava.errors import LlavaError
from llava.model.convert.delta import read_json_of
from llava.model.convert.delta_archive import DeltaArchive

LOCAL, DIRECTORY = b"PK\3\4", b"PK\1\2"
"""What the header of a member begins with, where it lies and in the zip's directory."""


def zipped(folder: Path, config: str = "{}") -> Path:
    path = folder / "delta.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("delta/config.json", config)
        archive.writestr("delta/model.safetensors", "weights")
    return path


def change(path: Path, member: int, places: dict[bytes, int], value: int) -> None:
    """Set a byte of both headers of a member."""
    content = bytearray(path.read_bytes())
    for mark, place in places.items():
        start = -1
        for _ in range(member + 1):
            start = content.index(mark, start + 1)
        content[start + place] = value
    path.write_bytes(content)


def use(path: Path, folder: Path) -> None:
    with DeltaArchive(path) as archive:
        assert archive.config() == {}
        archive.unpack(folder / "unpacked")


def test_as_it_should_be(tmp_path):
    use(zipped(tmp_path), tmp_path)
    assert (tmp_path / "unpacked" / "model.safetensors").read_text() == "weights"


def test_what_an_attempt_with_another_zip_left_is_not_taken(tmp_path):
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "model.safetensors").write_text("another")  # as long
    (tmp_path / "unpacked" / "model-00002-of-00002.safetensors").write_text("another")
    use(zipped(tmp_path), tmp_path)
    found = {path.name: path.read_text() for path in (tmp_path / "unpacked").iterdir()}
    assert found == {"config.json": "{}", "model.safetensors": "weights"}


@pytest.mark.parametrize(("member", "name"), [(0, "config.json"), (1, "model.safetensors")])
@pytest.mark.parametrize(
    ("places", "value", "reason"),
    [({LOCAL: 6, DIRECTORY: 8}, 1, "encrypted"), ({LOCAL: 8, DIRECTORY: 10}, 99, "compression method")],
)
def test_members_that_can_not_be_read(tmp_path, member, name, places, value, reason):
    path = zipped(tmp_path)
    change(path, member, places, value)
    with pytest.raises(LlavaError, match=f"{name} in it .*{reason}"):
        use(path, tmp_path)


def test_a_name_that_is_no_text(tmp_path):
    path = zipped(tmp_path)
    change(path, 0, {DIRECTORY: 9}, 8)  # the name is UTF-8, it says
    change(path, 0, {DIRECTORY: 46}, 0xFF)
    with pytest.raises(LlavaError, match="not a whole zip file"):
        use(path, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [("[1]", "no object"), ("[" * 100_000, "can't be read"), (" " * (2 << 20), "more than 1,048,576 bytes")],
    ids=["list", "deep", "long"],
)
def test_a_config_that_is_none(tmp_path, config, message):
    """It is in memory before anything is checked, and 3 MB of a zip hold 3 GB of blanks."""
    with pytest.raises(LlavaError, match=f"config.json in it .*{message}"):
        use(zipped(tmp_path, config), tmp_path)


def test_a_folder_whose_config_is_a_list(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(LlavaError, match="no object of settings"):
        read_json_of(tmp_path, "delta")
