"""Records and images in every form they may come in: the same losses as from a JSON list and a folder."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llava.errors import LlavaError
from llava.records import write_records
from llava.train.data.image_source import ImageSource
from llava.train.data.record_store import open_records
from llava.train.train import train
from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"), 12, text_only_every=4)


def run(output_dir, base, data, images, *more):
    words = flags(output_dir, data, base, "--max_steps", "4", *more)
    words[words.index("--image_folder") + 1] = str(images)
    train(words)
    return losses(output_dir)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, base, data):
    return run(tmp_path_factory.mktemp("plain"), base, data, data.parent / "images")


def as_table(records):
    names = dict.fromkeys(name for record in records for name in record)
    return pyarrow.table({name: [record.get(name) for record in records] for name in names})


def as_jsonl(records, images, folder):
    write_records(folder / "records.jsonl", records)
    return folder / "records.jsonl", images


def as_parquet(records, images, folder):
    write_records(folder / "records.parquet", records)
    return folder / "records.parquet", images


def as_arrow(records, images, folder):
    table = as_table(records)
    with pyarrow.OSFile(str(folder / "records.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    return folder / "records.arrow", images


def with_images_inside(records, images, folder):
    """As image datasets on hubs are: {"bytes", "path"} in a column of Parquet."""
    for record in records:
        if name := record.get("image"):
            record["image"] = {"bytes": (images / name).read_bytes(), "path": name}
    pyarrow.parquet.write_table(as_table(records), folder / "records.parquet")
    return folder / "records.parquet", folder / "none"


def in_tar_shards(records, images, folder):
    """WebDataset's way: two shards, members in folders, named by their last part in the records."""
    files = sorted(images.iterdir())
    for number in range(2):
        make_tar(folder / f"shard-{number}.tar", {f"./part/{p.name}": p.read_bytes() for p in files[number::2]})
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json", folder


FORMS = [as_jsonl, as_parquet, as_arrow, with_images_inside, in_tar_shards]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_the_same(form, workers, tmp_path, base, data, expected):
    records, images = form(json.loads(data.read_text()), data.parent / "images", tmp_path)
    images.mkdir(exist_ok=True)
    assert run(tmp_path / "out", base, records, images, "--dataloader_num_workers", str(workers)) == expected


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_full_name_comes_before_the_last_part_of_another(tmp_path):
    make_tar(tmp_path / "a.tar", {"x/1.png": b"one", "1.png": b"two", "y/2.png": b"three"})
    source = ImageSource(tmp_path)
    assert [source.read(name) for name in ("x/1.png", "1.png", "2.png")] == [b"one", b"two", b"three"]
    with pytest.raises(FileNotFoundError):
        source.read("3.png")
    assert pickle.loads(pickle.dumps(source)).read("2.png") == b"three"


def test_members_are_told_apart_by_every_bit_of_their_digests(tmp_path):
    names = [f"{number}.png" for number in range(8)]
    make_tar(tmp_path / "a.tar", {name: name.encode() for name in names})
    ImageSource(tmp_path)
    (path,) = tmp_path.glob(".a.tar.*.members.npy")
    table = np.load(path)
    near = table.copy()
    near[0] -= 1  # a digest that float64 can't tell from the next
    np.save(path, np.concatenate([near, table], 1)[:, np.argsort(np.concatenate([near[0], table[0]]))])
    source = ImageSource(tmp_path)
    assert [source.read(name) for name in names] == [name.encode() for name in names]


def test_a_last_part_that_two_members_have_is_no_name(tmp_path):
    make_tar(tmp_path / "a.tar", {"x/1.png": b"one"})
    make_tar(tmp_path / "b.tar", {"y/1.png": b"two"})
    source = ImageSource(tmp_path)
    assert source.read("y/1.png") == b"two"
    with pytest.raises(LlavaError, match=r"several members .* 1\.png"):
        source.read("1.png")


def test_one_name_in_two_shards_is_an_error_and_in_one_the_later_counts(tmp_path):
    with tarfile.open(make_tar(tmp_path / "a.tar", {"1.png": b"old"}), "a") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
    assert ImageSource(tmp_path).read("1.png") == b"new"
    make_tar(tmp_path / "b.tar", {"1.png": b"two"})
    with pytest.raises(LlavaError, match=r"a\.tar and b\.tar"):
        ImageSource(tmp_path)


def test_a_changed_shard_is_indexed_anew(tmp_path):
    make_tar(tmp_path / "a.tar", {"1.png": b"one"})
    ImageSource(tmp_path)
    make_tar(tmp_path / "a.tar", {"0.png": b"zero" * 1000, "1.png": b"two"})
    os.utime(tmp_path / "a.tar", (1, 1))
    assert ImageSource(tmp_path).read("1.png") == b"two"


def header(name="1.png", size=4, kind=tarfile.REGTYPE, written=None):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if written is not None:
        block[124:136], block[148:156] = written, b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(record):
    content = b"%d %s\n" % (len(record) + 4, record)
    return header("x", len(content), tarfile.XHDTYPE) + content.ljust(512, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        header(written=b"\x80" + b"\0" * 3 + (2**62).to_bytes(8, "big")),
        header(written=b"\x80" + b"\x7f" * 11),
        header(written=b"\xff" * 11 + b"\x9c"),
        b"".join((header("x", 4, tarfile.GNUTYPE_LONGNAME) + b"abc".ljust(512, b"\0")) for _ in range(3000)) + header(),
        extended(b"GNU.sparse.map=0,99999999,a") + header(),
        extended(b"GNU.sparse.map=0,9999999999") + header(),
    ],
    ids=["large", "larger", "negative", "names without end", "damaged sparse", "sparse"],
)
def test_damaged_headers_are_an_error(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content + b"abcd".ljust(512, b"\0") + bytes(1024))
    with pytest.raises(LlavaError, match=r"a\.tar: (not an uncompressed tar file|1\.png in it is sparse)"):
        ImageSource(tmp_path, tmp_path).read("1.png")


@pytest.mark.parametrize("content", [b"no tar", b"\x1f\x8b\x08 gzip"])
def test_what_is_no_plain_tar_is_named(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(LlavaError, match=r"a\.tar: not an uncompressed tar file"):
        ImageSource(tmp_path)
    assert not list(tmp_path.glob(".*.npy"))


def test_parquet_takes_no_memory_of_its_own(tmp_path):
    """200,000 records of 100 bytes: mapped, not read; nor do they travel to a worker process."""
    path = tmp_path / "records.parquet"
    columns = {"id": list(range(200_000)), "text": [f"{number:0100d}" for number in range(200_000)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=20_000)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    store = open_records(path)
    assert store[123_456] == {"id": 123_456, "text": f"{123_456:0100d}"}
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert pyarrow.total_allocated_bytes() - before < 2e6
    assert len(pickle.dumps(store)) < 1000
    assert pickle.loads(pickle.dumps(store))[7]["id"] == 7


@pytest.mark.parametrize("name", ["records.parquet", "records.arrow"])
def test_half_a_file_is_named(tmp_path, name):
    form = {"records.parquet": as_parquet, "records.arrow": as_arrow}[name]
    path, _ = form([{"id": number} for number in range(1000)], None, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LlavaError, match=f"{name}: not a whole"):
        open_records(path)


@pytest.mark.parametrize("name", [300 * "a" + ".png", "a\0.png"])
def test_a_name_that_no_file_can_have_is_a_missing_image(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        ImageSource(tmp_path).find(name)
