"""In place of `llava.serve.decoding.process`: what a broken or hostile decoder could do, by the image's first pixel.

1 hangs, 2 dies, 3 replies with another size than it sends, 4 takes all memory; else the image is filled with the
number of the process.
"""

import os
import time

from PIL import Image

from llava.serve.decoding import process as decoding_process


def open_as_ordered(content, **options):
    from llava.images import open_image

    image = open_image(content, **options)
    order = image.getpixel((0, 0))[0]
    if order == 1:
        time.sleep(600)
    if order == 2:
        os._exit(3)
    if order == 3:
        return Liar()
    if order == 4:
        bytearray(4 << 30)
    number = os.getpid()
    return Image.new("RGB", image.size, (number & 255, number >> 8 & 255, number >> 16 & 255))


class Liar:
    size = (30_000, 30_000)

    def tobytes(self):
        return b"short"


if __name__ == "__main__":
    decoding_process.open_image = open_as_ordered
    decoding_process.main()
