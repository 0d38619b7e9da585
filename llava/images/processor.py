"""`ImageProcessor`: RGB images to the pixel values that a vision tower was trained on.

The numbers are those of the library's processors (resized on 8-bit pixels, centre crop, normalisation), made with
Pillow directly; the ways to fit an image into the square are LLaVA's and LLaVA-Med's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.errors import LlavaError, first_line
from llava.images.anyres import best_pinpoint, default_pinpoints, read_pinpoints, split_into_tiles
from llava.images.modes import pad_to_square, to_rgb
from llava.records import read_json, write_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILE_NAME = "preprocessor_config.json"
ASPECT_RATIOS = ("square", "pad", "keep", "anyres")

_HALF = (0.5, 0.5, 0.5)
_CLIP = {"size": {"shortest_edge": 224}}
_KINDS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    # CLIP's with padding, which a config's image_aspect_ratio says here.
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "ViTImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": _HALF,
        "image_std": _HALF,
        "resample": int(Image.Resampling.BILINEAR),
    },
}
"""The library's processors whose settings may be left out of a file, and what they then are (else CLIP's)."""
_NEEDED = ("size", "image_mean", "image_std", "resample")
"""What a file of any other kind of processor has to say itself."""
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")
"""What a file may ask for; `do_pad` is read by whoever knows the layout of the file (image_aspect_ratio)."""
_KEEP_LONGEST, _KEEP_SHORTEST = 448, 224
"""LLaVA-Med v1.0's bounds for `keep` (llava/train/train.py), whatever the tower's size."""
_MAX_SIDE = 4096
_MAX_STRETCH = 64
"""Beyond this ratio of sides only the part that survives the crop is resized: the whole would fill the memory."""


@dataclass(frozen=True)
class ImageProcessor:
    """Settings of a tower's preprocessing; call it on images.

    `size` is the shortest edge (or (height, width), which ignores the image's shape), `crop_size` the final
    (height, width), both in pixels; `resample` is Pillow's number of the filter.
    """

    size: int | tuple[int, int] = 224
    crop_size: tuple[int, int] = (224, 224)
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    kind: str = field(default="CLIPImageProcessor", compare=False)
    """The library's class that does the same, for the file; the numbers depend on the fields above alone."""

    @classmethod
    def from_pretrained(cls, source: str | Path | dict[str, Any]) -> "ImageProcessor":
        """From a folder with preprocessor_config.json, that file, or its content.

        Raises:
            LlavaError: no such file, or a setting that can't be.
        """
        if isinstance(source, dict):
            return cls._from_config(source, "image processor settings")
        path = Path(source)
        path = path / FILE_NAME if path.is_dir() else path
        return cls._from_config(read_json(path), str(path))

    from_config = from_pretrained

    @classmethod
    def find(cls, folder: Path) -> "ImageProcessor | None":
        """That of a model folder, whichever file says it; None if none does."""
        settings = find_settings(folder)
        return None if settings is None else cls._from_config(settings, str(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, as the library's processor of this kind reads it."""
        fields = asdict(self)
        kind = fields.pop("kind")
        height, width = self.crop_size
        fields["size"] = (
            {"shortest_edge": self.size} if isinstance(self.size, int) else dict(zip(("height", "width"), self.size))
        )
        fields["crop_size"] = {"height": height, "width": width}
        if not self.do_center_crop:
            del fields["crop_size"]
        fields |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        write_json(Path(folder) / FILE_NAME, {"image_processor_type": kind, "do_convert_rgb": True} | fields)

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        aspect_ratio: str | None = None,
        grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Pixel values, float32, of images of any size and mode.

        Args:
            images: one or more Pillow images (`llava.images.open_image`).
            aspect_ratio: None or `square`: shortest edge to `size`, centre cropped. `pad`: padded to a square with
                the mean colour first, nothing is cut off. `keep`: v1.0's, shape kept, at most 448 × 224.
                `anyres`: the whole image and tiles of it, LLaVA's.
            grid_pinpoints: for `anyres`, the (width, height) to choose from, also as text.

        Returns:
            `[n, 3, height, width]`; for `keep` a list of `[3, height, width]`, for `anyres` a list of
            `[tiles, 3, height, width]`.
        """
        images = [to_rgb(image) for image in ([images] if isinstance(images, Image.Image) else images)]
        if aspect_ratio in (None, "none", "square"):
            return self._stack(self._shrink(image) for image in images)
        if aspect_ratio == "pad":
            return self._stack(self._shrink(pad_to_square(image, self._mean_colour)) for image in images)
        if aspect_ratio == "keep":
            return [self._normalise(self._shrink_whole(image))[0] for image in images]
        if aspect_ratio == "anyres":
            return [self._stack(self._tiles(image, grid_pinpoints)) for image in images]
        raise LlavaError(f"unknown image_aspect_ratio {aspect_ratio!r}; one of {', '.join(ASPECT_RATIOS)}")

    def count_tiles(self, width: int, height: int, grid_pinpoints: str | Sequence[Sequence[int]] | None = None) -> int:
        """How many tiles `anyres` makes of an image of this size in pixels, the whole one included."""
        side = self.crop_size[0]
        columns, rows = (-(-size // side) for size in best_pinpoint(width, height, self._pinpoints(grid_pinpoints)))
        return 1 + columns * rows

    def fit(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to `crop_size`, still 8-bit RGB: what `square` normalises."""
        return self._shrink(to_rgb(image))

    def restore(self, pixels: np.ndarray) -> Image.Image:
        """The image that pixel values `[3, height, width]` were made of, as the tower sees it."""
        values = pixels.astype(np.float32)
        if self.do_normalize:
            mean, std = (np.array(part, np.float32)[:, None, None] for part in (self.image_mean, self.image_std))
            values = values * std + mean
        if self.do_rescale:
            values = values / self.rescale_factor
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    @property
    def _mean_colour(self) -> tuple[int, ...]:
        return tuple(int(mean * 255) for mean in self.image_mean)

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = None
    ) -> dict[str, Any]:
        """`{"pixel_values": [n, 3, height, width]}`, as transformers' processors say it; tensors with "pt"."""
        pixels = self(images)
        if return_tensors == "pt":
            from torch import from_numpy

            return {"pixel_values": from_numpy(pixels)}
        return {"pixel_values": pixels}

    def _stack(self, images: Iterable[Image.Image]) -> np.ndarray:
        pixels = [np.asarray(image) for image in images]
        if not pixels:
            return np.empty((0, 3, *self.crop_size), np.float32)
        for height, width, _ in (image.shape for image in pixels):
            if (height, width) != self.crop_size:
                raise LlavaError(
                    f"the image processor leaves an image at {width} × {height} pixels, not {self.crop_size[1]} × "
                    f"{self.crop_size[0]}; its settings need do_center_crop, or a size of height and width"
                )
        return self._normalise(np.stack(pixels))

    def _normalise(self, pixels: np.ndarray | Image.Image) -> np.ndarray:
        """uint8 `[n, height, width, 3]` to float32 `[n, 3, height, width]`."""
        pixels = np.atleast_3d(np.asarray(pixels))
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        result = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
        # There are 256 levels only: each is normalised once, in the reference's order and precision.
        for channel, levels in enumerate(self._levels()):
            np.take(levels, pixels[..., channel], out=result[:, channel])
        return result

    def _levels(self) -> np.ndarray:
        """What each 8-bit level becomes, float32 `[3, 256]`."""
        levels = np.arange(256).astype(np.float64)
        if self.do_rescale:
            levels = levels * self.rescale_factor
        levels = np.tile(levels.astype(np.float32), (3, 1))
        if self.do_normalize:
            mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
            levels = (levels - mean[:, None]) / std[:, None]
        return levels

    def _shrink(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to `crop_size`."""
        width, height = self._resized(*image.size)
        if self.do_center_crop and max(width, height) > _MAX_STRETCH * min(width, height):
            return self._resize_middle(image, width, height)
        if (width, height) != image.size:
            image = image.resize((width, height), self.resample)
        return self._crop(image) if self.do_center_crop else image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if not self.do_resize:
            return width, height
        if not isinstance(self.size, int):
            return self.size[1], self.size[0]
        return _with_shortest(width, height, self.size)

    def _crop(self, image: Image.Image) -> Image.Image:
        """The middle; what is missing at the edges of a smaller image is black."""
        height, width = self.crop_size
        if image.size == (width, height):
            return image
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def _resize_middle(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The crop's part of the image resized to `width` × `height`, the rest never computed."""
        crop_height, crop_width = min(self.crop_size[0], height), min(self.crop_size[1], width)
        across, down = image.width / width, image.height / height
        left, top = (width - crop_width) // 2 * across, (height - crop_height) // 2 * down
        box = (left, top, left + crop_width * across, top + crop_height * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return self._crop(image.resize((crop_width, crop_height), self.resample, box=box))

    def _shrink_whole(self, image: Image.Image) -> Image.Image:
        longest, shortest = max(image.size), min(image.size)
        edge = int(min(_KEEP_LONGEST / (longest / shortest), _KEEP_SHORTEST))
        return image.resize(_with_shortest(*image.size, max(edge, 1)), self.resample)

    def _tiles(self, image: Image.Image, grid_pinpoints) -> list[Image.Image]:
        edge = self.size if isinstance(self.size, int) else min(self.size)
        side = self.crop_size[0]
        tiles = split_into_tiles(image, self._pinpoints(grid_pinpoints), side)
        return [self._shrink(tile) for tile in (image.resize((edge, edge)), *tiles)]

    def _pinpoints(self, given) -> list[tuple[int, int]]:
        side = self.crop_size[0]
        return read_pinpoints(given, side) if given else default_pinpoints(side)

    @classmethod
    def _from_config(cls, config: Any, where: str) -> "ImageProcessor":
        if not isinstance(config, dict):
            raise LlavaError(f"{where}: expected an object with the image processor's settings")
        kind = _kind(config)
        given = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        _check_steps(config, given, kind, where)
        known = _KINDS.get(kind, {}) | given | {"kind": kind}
        try:
            known["size"] = _read_size(known["size"])
            if isinstance(known["size"], int) and "height" in _KINDS.get(kind, _CLIP)["size"]:
                known["size"] = (known["size"], known["size"])
            cropped = known.get("do_center_crop", True)
            known["crop_size"] = _read_crop(known.get("crop_size", known["size"]) if cropped else known["size"])
            known["resample"] = int(Image.Resampling(known.get("resample", cls.resample)))
            known["rescale_factor"] = _finite(known.get("rescale_factor", cls.rescale_factor))
            for name in ("image_mean", "image_std"):
                if name in known:
                    known[name] = tuple(map(_finite, known[name]))
        except (TypeError, ValueError, KeyError) as error:
            raise LlavaError(
                f"{where}: one of size, crop_size, resample, rescale_factor, image_mean and image_std can't be read "
                f"({first_line(error)})"
            ) from error
        processor = cls(**known)
        if len(processor.image_mean) != 3 or len(processor.image_std) != 3 or 0 in processor.image_std:
            raise LlavaError(f"{where}: image_mean and image_std need three values each, none of image_std 0")
        return processor


def _kind(config: dict[str, Any]) -> str:
    """The class that a file names, whatever its variant; CLIP's if it names none."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor")
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _check_steps(config: dict[str, Any], given: dict[str, Any], kind: str, where: str) -> None:
    unknown = [name for name, value in config.items() if name.startswith("do_") and value and name not in _STEPS]
    if unknown:
        raise LlavaError(f"{where}: {unknown[0]} of {kind} isn't supported; known steps: {', '.join(_STEPS)}")
    missing = [name for name in _NEEDED if name not in given]
    if kind not in _KINDS and missing:
        raise LlavaError(
            f"{where}: {', '.join(missing)} of {kind} must be given in the file; defaults are known of "
            f"{', '.join(_KINDS)}"
        )


def find_settings(folder: Path) -> dict[str, Any] | None:
    """The image settings of a model folder: preprocessor_config.json, or a part of processor_config.json."""
    for name in (FILE_NAME, "processor_config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        settings = content.get("image_processor", content if name == FILE_NAME else None)
        if settings:
            return settings
    return None


def find_aspect_ratio(folder: Path) -> str | None:
    """How a model folder has images fitted into the square: config.json's word, or `pad` where its image processor pads
    them, as LLaVA-1.5's does; None where neither says."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    pads = (find_settings(folder) or {}).get("do_pad")
    return config.get("image_aspect_ratio") or ("pad" if pads else None)


def _with_shortest(width: int, height: int, edge: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter one is `edge`; the longer one is rounded down."""
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _read_size(size: Any) -> int | tuple[int, int]:
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    if isinstance(size, (int, float)):
        return _positive(size)
    return _positive(size[0]), _positive(size[1])


def _read_crop(size: Any) -> tuple[int, int]:
    size = _read_size(size)
    return (size, size) if isinstance(size, int) else size


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    return float(value)


def _positive(value: Any) -> int:
    if not math.isfinite(value) or int(value) < 1:
        raise ValueError(f"{value} is no number of pixels")
    if value > _MAX_SIDE:
        raise ValueError(f"{value} pixels; at most {_MAX_SIDE} are taken")
    return int(value)
