"""Any image to RGB, RGB to pixel values: the only place for either. Needs no torch."""

from llava.errors import ImageError
from llava.images.limits import UPLOAD_LIMITS, Limits
from llava.images.opening import open_image, open_uploaded_image, png_data_url, read_upload
from llava.images.processor import ImageProcessor

__all__ = [
    "UPLOAD_LIMITS",
    "ImageError",
    "ImageProcessor",
    "Limits",
    "open_image",
    "open_uploaded_image",
    "png_data_url",
    "read_upload",
]
