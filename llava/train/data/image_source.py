"""Where the images of training records are: in a folder, in tar shards, or in the record itself."""

import tarfile
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.folders import expanded, is_file
from llava.image_options import ImageWithOptions
from llava.record_content import image_bytes, image_file, image_key
from llava.train.data.tar_index import Place, TarIndex


class ImageSource:
    """Opens the images of records.

    `folder` may be a folder of images, a folder of `.tar` shards (WebDataset), a single `.tar`, or None when
    records hold absolute paths or the images themselves. Members of tar files are read in place, by full name or
    by the name's last part; their index is saved next to the first archive, or in `output_dir`.
    """

    def __init__(self, folder: str | Path | None, output_dir: str | Path = "."):
        self.folder = expanded(folder) if folder else None
        shards: list[Path] = []
        if self.folder is not None and self.folder.is_file():
            if not tarfile.is_tarfile(self.folder):
                raise LlavaError(f"--image_folder {self.folder}: neither a folder nor a tar file")
            shards = [self.folder]
        elif self.folder is not None:
            shards = sorted(self.folder.glob("*.tar"))
        self._members = TarIndex(shards, Path(output_dir)) if shards else None

    def read(self, image: Any) -> Path | bytes | str | ImageWithOptions:
        """What `llava.images.open_image` takes: a path, the file's bytes or a data URL, with the image's options.

        Raises:
            FileNotFoundError: there is no such image.
        """
        if isinstance(image, ImageWithOptions):
            return ImageWithOptions(self.read(image.source), image.options)
        if not isinstance(image, str):
            return image_bytes(image)
        place = self._find_named(image)
        if isinstance(place, (str, Path)):
            return place
        with place.shard.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    def find(self, image: Any) -> Path | str | Place | None:
        """Where an image is, without reading it: its path, its data URL, its place in a tar, None if embedded.

        Raises:
            FileNotFoundError: there is no such image.
        """
        name = image_file(image)
        return self._find_named(name) if isinstance(name, str) else None

    def _find_named(self, image: str) -> Path | str | Place:
        if image.startswith("data:"):
            return image
        if self._members is not None and (member := self._members.find(image)):
            return member
        path = Path(image) if self.folder is None else self.folder / image
        if not is_file(path):
            raise FileNotFoundError(str(path))
        return path

    def identify(self, image: Any) -> str:
        """A key that changes when the image does: path, size and time of its file, or a digest of its bytes; and with
        its options."""
        if isinstance(image, ImageWithOptions):
            return f"{self.identify(image.source)}|{image.options}"
        place = self.find(image)
        if isinstance(place, Path):
            status = place.stat()
            return f"{place.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if isinstance(place, Place):
            return f"{place.shard.resolve()}|{place.offset}|{place.size}|{place.shard.stat().st_mtime_ns}"
        return image_key(image)
