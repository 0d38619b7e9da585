"""Images of requests: opened and made into pixel values once, encoded in batches, their features kept.

An image is known by its content (or its file's path, size and time), so that an image asked about again, in
another turn or by another request, is neither opened nor encoded again.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import ExifTags, Image

from llava.errors import LlavaError
from llava.folders import expanded, other_form_note
from llava.image_options import ImageWithOptions
from llava.images import ImageProcessor, open_image
from llava.model.language_model import LlavaForCausalLM

_ENCODE_AT_ONCE = 32
_ENTRY_BYTES = 1500
"""What an image's entry takes in addition to its numbers, measured: of a small model more than they do."""


class RequestImage:
    """An image of a request: a digest (16 bytes) of what is shown, and the source that `open_image` takes."""

    def __init__(self, source: Any, digest: bytes):
        self.source = source
        self.digest = digest
        # Negative and far from IMAGE_TOKEN_INDEX and every id of a token.
        self.key = -(int.from_bytes(digest[:8], "big") >> 2) - 1000
        """A number of 62 bits made of the digest."""
        self.pixels: np.ndarray | None = None
        """float32 `[tiles, 3, H, W]` between preparing and encoding."""
        self.positions: int | None = None
        """How many it takes, once that is known."""
        self.lock = threading.Lock()


class ImageEncoder:
    """Features of images: `[positions, hidden]` each, in the language model's dtype, on its device."""

    def __init__(self, model: LlavaForCausalLM, image_processor: ImageProcessor, max_bytes: int):
        self.model = model
        self.image_processor = image_processor
        self.aspect_ratio = model.config.image_aspect_ratio
        self.grid_pinpoints = model.config.image_grid_pinpoints
        self.max_bytes = max_bytes
        self.opener: Callable[[Any], Image.Image] | None = None
        """In place of `open_image`, where images are opened elsewhere."""
        self.encoded = self.reused = 0
        """How many images were encoded, and how many were found."""
        self._features: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._images: WeakValueDictionary[bytes, RequestImage] = WeakValueDictionary()
        self._lock = threading.Lock()

    def identify(self, source: Any) -> RequestImage:
        """The image that `source` (whatever `open_image` takes) is, without opening it; one object for one image.

        Raises:
            LlavaError: there is no such file.
        """
        image = source if isinstance(source, RequestImage) else RequestImage(source, _digest(source))
        with self._lock:
            return self._images.setdefault(image.digest, image)

    def num_positions(self, image: RequestImage) -> int:
        """How many positions it takes; with `anyres` it has to be opened to know."""
        if self.aspect_ratio != "anyres":
            return self.model.num_patches
        if image.positions is None:
            with self._lock:
                found = self._features.get(image.key)
            if found is not None:
                image.positions = len(found)
            else:
                self.prepare([image])
                image.positions = len(self._prepared(image)) * self.model.num_patches
        return image.positions

    def prepare(self, images: Iterable[RequestImage]) -> None:
        """Make pixel values of those whose features aren't there; may be called from any thread.

        Raises:
            LlavaError: an image can't be read.
        """
        for image in images:
            with image.lock:
                with self._lock:
                    is_known = image.key in self._features
                if not is_known and image.pixels is None:
                    image.pixels = self._pixels(image)

    @torch.inference_mode()
    def features(self, images: Sequence[RequestImage]) -> list[torch.Tensor]:
        """Features of each; distinct new ones are encoded together."""
        with self._lock:
            found = {image.key: self._features[image.key] for image in images if image.key in self._features}
            for key in found:
                self._features.move_to_end(key)
        new = {image.key: image for image in images if image.key not in found}
        self.encoded += len(new)
        self.reused += len(images) - len(new)
        found |= self._encode(list(new.values()))
        with self._lock:
            self._keep({key: found[key] for key in new})
        for image in images:
            image.pixels = None
        return [found[image.key] for image in images]

    def seen(self, image: RequestImage) -> list[Image.Image]:
        """What the tower gets of it: the image in the tower's size, or with `anyres` also tiles of it."""
        return [self.image_processor.restore(tile) for tile in self._pixels(image)]

    def _prepared(self, image: RequestImage) -> np.ndarray:
        pixels = image.pixels  # another thread may take it away
        return self._pixels(image) if pixels is None else pixels

    def _pixels(self, image: RequestImage) -> np.ndarray:
        pixels: np.ndarray
        if isinstance(image.source, np.ndarray):
            pixels = image.source
        else:
            rgb = (self.opener or open_image)(image.source)
            pixels = np.asarray(self.image_processor([rgb], self.aspect_ratio, self.grid_pinpoints), np.float32)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        size = self.model.get_vision_tower().image_size
        if pixels.shape[1:] != (3, size, size):
            raise LlavaError(
                f"the vision tower takes images of {size} × {size}, but the image processor made "
                f"{pixels.shape[-2]} × {pixels.shape[-1]}; check image_aspect_ratio and preprocessor_config.json"
            )
        return pixels

    def _encode(self, images: list[RequestImage]) -> dict[int, torch.Tensor]:
        encoded: dict[int, torch.Tensor] = {}
        for start in range(0, len(images), _ENCODE_AT_ONCE):
            part = images[start : start + _ENCODE_AT_ONCE]
            pixels = [self._prepared(image) for image in part]
            tiles = torch.from_numpy(np.concatenate(pixels))
            features = self.model.encode_images(tiles).split([len(one) for one in pixels])
            encoded |= {
                # A copy, or one image kept would keep the memory of all that were encoded with it.
                image.key: (own.flatten(0, 1).clone() if len(part) > 1 else own.flatten(0, 1))
                for image, own in zip(part, features, strict=True)
            }
        return encoded

    def _keep(self, features: dict[int, torch.Tensor]) -> None:
        for key, value in features.items():
            if key not in self._features:
                self._features[key] = value
                self._bytes += _num_bytes(value)
        while self._bytes > self.max_bytes and self._features:
            _, dropped = self._features.popitem(last=False)
            self._bytes -= _num_bytes(dropped)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() + _ENTRY_BYTES


def _digest(source: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, ImageWithOptions):
        digest.update(_digest(source.source) + str(source.options).encode())
    elif isinstance(source, Image.Image):
        # All that `open_image` looks at: the same pixels with other colours or turned otherwise are another image.
        colours = source.getpalette(None), source.info.get("transparency")
        orientation = source.getexif().get(ExifTags.Base.Orientation)
        digest.update(f"{source.mode} {source.size} {colours} {orientation}".encode())
        digest.update(source.tobytes())
    elif isinstance(source, np.ndarray):
        digest.update(np.ascontiguousarray(source).tobytes())
    elif isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        digest.update(source.encode())
    elif isinstance(source, (str, os.PathLike)):
        digest.update(_file_identity(expanded(source)))
    else:
        raise LlavaError(f"an image is a path, bytes, a data: URL or a Pillow image, not {type(source).__name__}")
    return digest.digest()


def _file_identity(path: Path) -> bytes:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise LlavaError(f"image not found: {path}{other_form_note([path])}") from error
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode()
