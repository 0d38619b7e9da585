"""`open_image`: a file, bytes, a data URL or a Pillow image as RGB; DICOM and NIfTI too.

Error texts are our own words: a decoder's can hold memory addresses or a patient's data.
"""

import base64
import binascii
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from llava.errors import ImageError, LlavaError
from llava.folders import expanded
from llava.image_options import NO_OPTIONS, ImageOptions, ImageWithOptions
from llava.images.facts import ImageFacts
from llava.images.headers.containers import Container, read_container
from llava.images.headers.frames import MOST_FRAMES, count_frames
from llava.images.headers.kinds import HEAD, image_file, image_kind, kind_of_head, unreadable
from llava.images.limits import UPLOAD_LIMITS, Limits, plain_errors
from llava.images.modes import to_rgb
from llava.images.slides import is_slide, read_slide, slide_facts

log = logging.getLogger(__name__)

# Nothing is given back (`*+`): the time would be the square of the length.
_DATA_URL = re.compile(r"data:[\w.+-]*+/?[\w.+-]*+(?:;[\w-]++=[\w.+-]++)*+;base64,", re.IGNORECASE)
_WEB_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SLOW_DECODER = 25.0
"""Cost of a pixel in those of Pillow's decoders that are written in Python (RLE in BMP, plain PPM)."""
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientations ask for."""
_LYING = (5, 6, 7, 8)
"""Those by which width and height change places."""


class _How(NamedTuple):
    """What is asked of an image; `options` are those that its kind has to take."""

    limits: Limits
    frame: int | None
    window: str | tuple[float, float] | None
    axis: int
    draft: int | None = None
    options: ImageOptions = NO_OPTIONS


_Made = TypeVar("_Made")
_Make = Callable[[str, Any, str, _How], _Made]


def open_image(
    source: str | os.PathLike | bytes | Image.Image | ImageWithOptions,
    *,
    limits: Limits | None = None,
    frame: int | None = None,
    window: str | tuple[float, float] | None = None,
    axis: int = 2,
    draft: int | None = None,
) -> Image.Image:
    """Open an image as RGB (mode "RGB", upright by its EXIF orientation, first frame of an animation).

    Args:
        source: path, file content, `data:` URL, or a Pillow image; or one of these with its options, which then stand
            in place of the arguments frame, window and axis.
        limits: caps on size; `Limits()` by default.
        frame: of a multi-frame DICOM, or the slice of a volume, the middle one by default; a slide's level, from 1.
        window: for DICOM and NIfTI, (centre, width) or a CT preset's name (`llava.images.windows`).
        axis: of a volume, along which slices are counted: 0 sagittal, 1 coronal, 2 axial.
        draft: decode a JPEG at a half, a quarter or an eighth of its size, as long as both sides have so many pixels:
            faster, and the pixels differ a little from those of the whole image made smaller.

    Raises:
        ImageError: missing file, unknown or broken content, an image beyond the limits, an address of the
            web (nothing is fetched). Nothing else, whatever a decoder raises, and never a byte of the file.
        LlavaError: a missing extra for DICOM or NIfTI; a frame, window or axis that there isn't; options that files of
            this kind don't take.
    """
    return _shown(source, _How(limits or Limits(), frame, window, axis, draft), _pixels)


def image_size(source: str | os.PathLike | bytes | Image.Image | ImageWithOptions) -> tuple[int, int]:
    """(width, height) in pixels of what `open_image` makes of the same source, by the file's header: of a slide alone
    pixels are read.

    Raises:
        ImageError, LlavaError: as `open_image`, but of damaged pixels, and of a frame or slice that there isn't.
    """
    return _shown(source, _How(Limits(), None, None, 2), _size)


def _shown(source: Any, how: _How, make: _Make[_Made]) -> _Made:
    """What `make` makes of the image, by its kind and content: of a volume the file, of a slide its thumbnail, of `rgb`
    the image as shown."""
    source, how = _taken_apart(source, how)
    limits = how.limits
    if isinstance(source, Image.Image):
        how.options.check_kind("image", "image")
        limits.check_size(*source.size, "image")
        with plain_errors("image", "the image is damaged or cut off"):
            rgb = to_rgb(ImageOps.exif_transpose(source))
        return make("rgb", rgb, "image", how)
    if isinstance(source, (bytes, bytearray, memoryview)):
        content, name = bytes(source), "image"
        limits.check_bytes(len(content), name)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        content, name = read_upload(source, limits), "image"
    elif isinstance(source, str) and _WEB_ADDRESS.match(source):
        raise ImageError("images aren't fetched from the web; download it and give the file, or a data: URL")
    elif isinstance(source, (str, os.PathLike)):
        return _open_file(expanded(source), str(source), how, make)
    else:
        raise ImageError(f"an image is a path, bytes, a data: URL or a Pillow image, not {type(source).__name__}")
    return _open(io.BytesIO(content), len(content), name, how, make)


def _taken_apart(source: Any, how: _How) -> tuple[Any, _How]:
    if not isinstance(source, ImageWithOptions):
        return source, how
    if (how.frame, how.window, how.axis) != (None, None, 2):
        raise LlavaError("an image that has options of its own takes no frame, window or axis beside them")
    own = source.options
    axis = 2 if own.axis is None else own.axis
    return source.source, how._replace(frame=own.index, window=own.grey, axis=axis, options=own)


def describe_image(
    source: str | os.PathLike | bytes | ImageWithOptions,
    *,
    limits: Limits | None = None,
    frame: int | None = None,
    window: str | tuple[float, float] | None = None,
    axis: int = 2,
) -> ImageFacts:
    """What is in a file (its path, its content or a `data:` URL), and what `open_image` shows of it with these options.

    Raises:
        ImageError, LlavaError: as `open_image`.
    """
    return open_and_describe(source, limits=limits, frame=frame, window=window, axis=axis)[1]


def open_and_describe(
    source: str | os.PathLike | bytes | ImageWithOptions,
    *,
    limits: Limits | None = None,
    frame: int | None = None,
    window: str | tuple[float, float] | None = None,
    axis: int = 2,
) -> tuple[Image.Image, ImageFacts]:
    """`open_image` and `describe_image` in one: the file is read and decoded once."""
    return _shown(source, _How(limits or Limits(), frame, window, axis), _pixels_and_facts)


def _open_file(path: Path, name: str, how: _How, make: _Make[_Made]) -> _Made:
    with image_file(path) as file:
        if is_slide(path, file, name) and (shown := read_slide(path, name, how.limits, level=how.frame)) is not None:
            how.options.check_kind("slide", name)
            return make("slide", shown, name, how)
        return _open(file, os.fstat(file.fileno()).st_size, name, how, make)


def _open(file: BinaryIO, size: int, name: str, how: _How, make: _Make[_Made]) -> _Made:
    """`file` holds `size` bytes. A volume is read where it lies, everything else whole."""
    limits = how.limits
    try:
        head = file.read(HEAD)
        file.seek(0)
        if not head:
            raise ImageError(f"{name}: the image is empty (0 bytes)")
        kind = kind_of_head(head, name)
        how.options.check_kind(kind, name)
        if kind == "nifti":
            return make(kind, file, name, how)
        limits.check_bytes(size, name)
        # The size may have changed since: never read more than one byte beyond the cap.
        content = file.read(limits.max_bytes + 1)
        limits.check_bytes(len(content), name)
    except OSError as error:
        raise unreadable(name, error) from None
    return make(kind, content, name, how)


def _pixels(kind: str, content: Any, name: str, how: _How) -> Image.Image:
    """The image as RGB."""
    if kind == "rgb":
        return content
    if kind == "slide":
        return content.image
    if kind == "nifti":
        from llava.images.nifti import read_nifti

        return read_nifti(content, name, how.limits, index=how.frame, axis=how.axis, window=how.window)
    if kind == "dicom":
        from llava.images.dicom import read_dicom

        return read_dicom(content, name, how.limits, frame=how.frame, window=how.window)
    return _decode(content, name, how.limits, how.draft)


def _size(kind: str, content: Any, name: str, how: _How) -> tuple[int, int]:
    """(width, height), without the pixels."""
    if kind == "rgb":
        return content.size
    if kind == "slide":
        return content.image.size
    if kind == "nifti":
        from llava.images.nifti import nifti_size

        return nifti_size(content, name, how.limits, axis=how.axis)
    if kind == "dicom":
        from llava.images.dicom import dicom_size

        return dicom_size(content, name, how.limits)
    with _decoder(content, name, how.limits) as (image, container):
        return _upright_size(image, container)


def _pixels_and_facts(kind: str, content: Any, name: str, how: _How) -> tuple[Image.Image, ImageFacts]:
    """The image as RGB, and what is told of it."""
    if kind == "rgb":
        return content, ImageFacts("image", content.width, content.height, shown=["as RGB"])
    if kind == "slide":
        return content.image, slide_facts(content, is_asked=how.frame is not None)
    if kind == "nifti":
        from llava.images.nifti import read_and_describe_nifti

        return read_and_describe_nifti(content, name, how.limits, index=how.frame, axis=how.axis, window=how.window)
    if kind == "dicom":
        from llava.images.dicom import read_and_describe_dicom

        return read_and_describe_dicom(content, name, how.limits, frame=how.frame, window=how.window)
    with _decoder(content, name, how.limits) as (image, container):
        facts = _facts(image, container, count_frames(container.kind, content))
        if ignored := [name for name in ("window", "frame") if getattr(how, name) is not None]:
            facts.shown.append(f"no {' or '.join(ignored)} can be chosen of it")
        return _upright(image, container), facts


def _facts(image: Image.Image, container: Container, frames: int) -> ImageFacts:
    """Of Pillow's image, of which only the header has been read."""
    facts = ImageFacts(container.kind, *_upright_size(image, container), frames, 0, f"mode {image.mode}")
    if frames > 1:
        said = f"more than {MOST_FRAMES:,}" if frames > MOST_FRAMES else frames
        facts.shown.append(f"the first of {said} frames")
    if container.orientation != 1:
        facts.orientation = f"EXIF {container.orientation}"
        facts.shown.append("turned upright as its EXIF orientation says")
    if image.mode == "F" or image.mode.startswith("I"):
        facts.shown.append("grey of more than 8 bits, scaled by the bits in use")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        facts.shown.append("transparency over white")
    facts.shown.append("as RGB")
    return facts


def with_default_options(images: Sequence[Any], defaults: ImageOptions) -> list[Any]:
    """The images, each with those of `defaults` that its kind of file takes and about which it says nothing itself.

    How many take none is logged; an image that can't be read stays as it is, for whoever opens it.
    """
    if not defaults:
        return list(images)
    shown, without = [], 0
    for image in images:
        source, own = (image.source, image.options) if isinstance(image, ImageWithOptions) else (image, NO_OPTIONS)
        options = own.or_else(defaults.for_kind(_kind_of(source)))
        without += not options
        shown.append(ImageWithOptions(source, options) if options else image)
    if without:
        log.warning("%d of %d images take nothing of %s; they are shown as they are", without, len(shown), defaults)
    return shown


def _kind_of(source: Any) -> str:
    try:
        if isinstance(source, str) and source[:5].lower() == "data:":
            source = read_upload(source, Limits())
        if isinstance(source, Image.Image):
            return "image"
        if isinstance(source, bytes):
            return image_kind(source)
        path = expanded(source)
        with image_file(path) as file:
            return "slide" if is_slide(path, file, str(source)) else image_kind(path)
    except ImageError:
        return "image"


def open_uploaded_image(
    source: bytes | str | ImageWithOptions, *, limits: Limits = UPLOAD_LIMITS, **options: Any
) -> Image.Image:
    """As `open_image` for what a client sent: bytes, a `data:` URL or bare base64, never a path or an address."""
    return open_image(read_sent(source, limits), limits=limits, **options)


def read_sent(source: bytes | str | ImageWithOptions, limits: Limits = UPLOAD_LIMITS) -> bytes | ImageWithOptions:
    """`read_upload` of an image that may have options, which it keeps."""
    if isinstance(source, ImageWithOptions):
        return ImageWithOptions(read_upload(source.source, limits), source.options)
    return read_upload(source, limits)


def read_upload(source: bytes | str, limits: Limits = UPLOAD_LIMITS) -> bytes:
    """The content of what a client sent: bytes, a `data:` URL or bare base64.

    Raises:
        ImageError: neither of them, too long, empty.
    """
    if isinstance(source, str):
        return _from_base64(source, limits)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise ImageError("an image has to be sent as a data: URL or as base64")
    limits.check_bytes(len(source), "image")
    return bytes(source)


def _from_base64(text: str, limits: Limits) -> bytes:
    start = 0
    if text[:5].lower() == "data:":
        match = _DATA_URL.match(text)
        if match is None:
            raise ImageError("a data: URL of an image has the form data:image/png;base64,…; this one hasn't")
        start = match.end()
    elif _WEB_ADDRESS.match(text):
        raise ImageError("images aren't fetched from the web; send a data: URL or base64")
    limits.check_bytes((len(text) - start) * 3 // 4 - 2, "image")
    try:
        content = base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the image isn't valid base64") from None
    if not content:
        raise ImageError("the image is empty (0 bytes)")
    return content


def _decode(content: bytes, name: str, limits: Limits, draft: int | None) -> Image.Image:
    with _decoder(content, name, limits) as (image, container):
        if draft is not None:
            image.draft(None, (draft, draft))
        return _upright(image, container)


def _upright(image: Image.Image, container: Container) -> Image.Image:
    """As RGB, turned as its orientation says."""
    image.load()
    rgb = to_rgb(image)
    if container.is_white_zero and image.mode.startswith(("I", "F")):  # of fewer bits Pillow turns them itself
        rgb = ImageOps.invert(rgb)
    method = _TRANSPOSED.get(container.orientation)
    return rgb.copy() if method is None else rgb.transpose(method)


def _upright_size(image: Image.Image, container: Container) -> tuple[int, int]:
    return image.size[::-1] if container.orientation in _LYING else image.size


@contextmanager
def _decoder(content: bytes, name: str, limits: Limits) -> Iterator[tuple[Image.Image, Container]]:
    """Pillow's image, of which only the header is read yet, and its file; errors within are our own."""
    with plain_errors(name, "the image is damaged or cut off"):
        container = read_container(content, name, limits)
        if container is None:
            raise _unknown(name, limits)
        try:
            image = Image.open(io.BytesIO(container.content), formats=(container.kind,))
        except UnidentifiedImageError:
            raise _unknown(name, limits) from None
        except Image.DecompressionBombError:
            raise ImageError(f"{name}: more pixels than an image may have ({limits.max_pixels:,})") from None
        with image:
            is_slow = any(tile.codec_name in Image.DECODERS for tile in image.tile)
            limits.check_size(*image.size, name, _SLOW_DECODER if is_slow else 2.0 if container.kind == "WEBP" else 1.0)
            yield image, container


def _unknown(name: str, limits: Limits) -> ImageError:
    return ImageError(f"{name}: not an image that can be read (known: {', '.join(limits.formats)}, DICOM, NIfTI)")
