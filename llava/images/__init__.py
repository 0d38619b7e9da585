"""Any image to RGB, RGB to pixel values: the only place for either. Needs no torch."""

from llava.errors import ImageError
from llava.image_options import ImageOptions, ImageWithOptions
from llava.images.facts import ImageFacts
from llava.images.limits import UPLOAD_LIMITS, Limits
from llava.images.modes import png_bytes, png_data_url
from llava.images.opening import (
    describe_image,
    image_size,
    open_image,
    open_uploaded_image,
    read_upload,
    with_default_options,
)
from llava.images.processor import ImageProcessor

__all__ = [
    "UPLOAD_LIMITS",
    "ImageError",
    "ImageFacts",
    "ImageOptions",
    "ImageProcessor",
    "ImageWithOptions",
    "Limits",
    "describe_image",
    "image_size",
    "open_image",
    "open_uploaded_image",
    "png_bytes",
    "png_data_url",
    "read_upload",
    "with_default_options",
]
