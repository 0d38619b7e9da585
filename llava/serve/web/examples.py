"""Small drawn images for the page's examples: schematic, of nobody, made when asked for."""

import io

from PIL import Image, ImageDraw, ImageFilter

SIZE = 336

EXAMPLES = (
    ("chest", "Is there a bright round spot in the left or the right half of the image?"),
    ("slice", "What shape is the bright area, and where is it?"),
)


def draw_example(name: str) -> bytes:
    """PNG bytes of one of `EXAMPLES`."""
    image = {"chest": _chest, "slice": _slice}[name]()
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(2)).save(buffer, "PNG")
    return buffer.getvalue()


def _chest() -> Image.Image:
    image = Image.new("L", (SIZE, SIZE), 12)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((40, 24, 296, 330), 70, fill=120)
    for left, right in ((64, 152), (184, 272)):
        draw.ellipse((left, 60, right, 270), fill=38)
        for top in range(78, 260, 30):
            draw.arc((left - 8, top, right + 8, top + 60), 200, 340, fill=82, width=5)
    draw.rectangle((158, 30, 178, 320), fill=165)
    draw.ellipse((140, 180, 222, 280), fill=150)
    draw.ellipse((84, 140, 112, 168), fill=190)
    return image


def _slice() -> Image.Image:
    image = Image.new("L", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(image)
    draw.ellipse((46, 22, 290, 314), fill=215)
    draw.ellipse((58, 34, 278, 302), fill=92)
    draw.line((168, 40, 168, 296), fill=60, width=3)
    draw.ellipse((128, 120, 160, 210), fill=35)
    draw.ellipse((176, 120, 208, 210), fill=35)
    draw.ellipse((210, 84, 252, 118), fill=205)
    return image
