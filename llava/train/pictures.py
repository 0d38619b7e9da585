"""Pictures of training records: found in a folder, in tar shards, or in the record itself."""

import tarfile
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.records import Record


def record_images(record: Record) -> list[Any]:
    """The pictures that a record names, in order: paths as written, or embedded ones (`bytes`)."""
    image = record.get("image")
    if image is None:
        image = record.get("images")
    if image is None or image == "" or image == []:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def image_key(image: Any) -> str:
    """A name that tells distinct pictures apart: the path, or a digest of embedded bytes."""
    if isinstance(image, str):
        return image
    import hashlib

    return "sha256:" + hashlib.sha256(_embedded(image)).hexdigest()


class PictureSource:
    """Opens the pictures of records.

    `folder` may be a folder of pictures, a folder of `.tar` shards (WebDataset), a single `.tar`, or None when
    records hold absolute paths or the pictures themselves. Members of tar files are read in place.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder).expanduser() if folder else None
        self._members: dict[str, tuple[Path, int, int]] = {}
        shards: list[Path] = []
        if self.folder is not None and self.folder.is_file():
            if not tarfile.is_tarfile(self.folder):
                raise LlavaError(f"--image_folder {self.folder}: neither a folder nor a tar file")
            shards = [self.folder]
        elif self.folder is not None:
            shards = sorted(self.folder.glob("*.tar"))
        for shard in shards:
            self._members.update(_tar_index(shard))

    def read(self, image: Any) -> Path | bytes | str:
        """What `llava.images.open_image` takes: a path, the file's bytes or a data URL.

        Raises:
            FileNotFoundError: there is no such picture.
        """
        if not isinstance(image, str):
            return _embedded(image)
        place = self.find(image)
        if isinstance(place, (str, Path)):
            return place
        shard, offset, size = place
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def find(self, image: Any) -> Path | str | tuple[Path, int, int] | None:
        """Where a picture is, without reading it: its path, its data URL, (tar, offset, size), None if embedded.

        Raises:
            FileNotFoundError: there is no such picture.
        """
        if not isinstance(image, str):
            return None
        if image.startswith("data:"):
            return image
        member = self._members.get(image)
        if member is not None:
            return member
        path = Path(image) if self.folder is None else self.folder / image
        if not path.is_file():
            raise FileNotFoundError(str(path))
        return path

    def identify(self, image: Any) -> str:
        """A key that changes when the picture does: path, size and time of its file, or a digest of its bytes."""
        place = self.find(image)
        if isinstance(place, Path):
            status = place.stat()
            return f"{place.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if isinstance(place, tuple):
            return f"{place[0].resolve()}|{place[1]}|{place[2]}|{place[0].stat().st_mtime_ns}"
        return image_key(image)


def _embedded(image: Any) -> bytes:
    if isinstance(image, dict) and image.get("bytes") is not None:
        image = image["bytes"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    raise LlavaError(f"a picture must be a path, bytes or {{'bytes': …}}, not {type(image).__name__}")


def _tar_index(shard: Path) -> dict[str, tuple[Path, int, int]]:
    """{member's name: (tar file, offset, size)}, by full name and by last part."""
    index: dict[str, tuple[Path, int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    place = (shard, member.offset_data, member.size)
                    index[member.name.removeprefix("./")] = place
                    index.setdefault(Path(member.name).name, place)
    except tarfile.TarError as error:
        raise LlavaError(f"{shard}: not an uncompressed tar file ({error})") from error
    return index
