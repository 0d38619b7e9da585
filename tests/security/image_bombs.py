"""Small or ordinary-sized files that cost gigabytes or minutes where they are opened plainly.

Each is made on the spot. `BOMBS` maps a name to what makes the bytes; `open_plainly` is the deliberately vulnerable
stand-in, which hands them to the library that reads such files.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

_EXPLICIT, _IMPLICIT, _DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"
_JPEG, _J2K, _RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"


def open_plainly(content: bytes) -> None:
    """What a program does that trusts its input."""
    if content[128:132] == b"DICM":
        import pydicom

        dataset = pydicom.dcmread(io.BytesIO(content))
        for keyword in ("VOILUTSequence", "WindowCenter"):
            dataset.get(keyword)
        values = dataset.pixel_array
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pydicom.pixels.apply_color_lut(values, dataset)
    elif content[:2] == b"\x1f\x8b" or content[344:348] == b"n+1\0":
        import nibabel

        if content[:2] == b"\x1f\x8b":
            content = zlib.decompressobj(wbits=31).decompress(content)
        nibabel.Nifti1Image.from_bytes(content).get_fdata()
    else:
        from PIL import ImageOps

        Image.MAX_IMAGE_PIXELS = None
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image).convert("RGB")
            getattr(image, "n_frames", 1)


def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
    """Of DICOM, explicit little endian."""
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UC", b"UT"):
        return struct.pack("<HH2sHL", group, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


def short(group: int, number: int, value: int) -> bytes:
    return element(group, number, b"US", struct.pack("<H", value))


def dicom(syntax: str, body: bytes, meta: bytes = b"") -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + meta + element(2, 0x10, b"UI", uid) + body


def image_module(rows: int, columns: int, bits: int = 8, before: bytes = b"", components: int = 1) -> bytes:
    colours = [element(0x28, 4, b"CS", b"MONOCHROME2 ")]
    if components == 3:
        colours = [element(0x28, 4, b"CS", b"RGB "), short(0x28, 6, 0)]
    return b"".join(
        [
            short(0x28, 2, components),
            *colours,
            short(0x28, 0x10, rows),
            short(0x28, 0x11, columns),
            short(0x28, 0x100, bits),
            short(0x28, 0x101, bits),
            short(0x28, 0x102, bits - 1),
            short(0x28, 0x103, 0),
            before,
        ]
    )


def encapsulated(frame: bytes) -> bytes:
    frame += b"\0" * (len(frame) % 2)
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) + struct.pack("<HHL", 0xFFFE, 0xE000, len(frame)) + frame
    end = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + items + end


def encoded(kind: str, size: tuple[int, int] = (64, 64), mode: str = "L", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 7).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_in_dicom() -> bytes:
    """A frame of 64 × 64 by the header, of 60,000 × 60,000 by its own."""
    frame = bytearray(encoded("JPEG"))
    place = frame.index(b"\xff\xc0")
    frame[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)
    return dicom(_JPEG, image_module(64, 64) + encapsulated(bytes(frame)))


def _j2k(side: int) -> bytes:
    frame = bytearray(encoded("JPEG2000", no_jp2=True))
    frame[8:16] = struct.pack(">LL", side, side)
    frame[24:32] = struct.pack(">LL", side, side)
    return bytes(frame)


def j2k_in_dicom() -> bytes:
    return dicom(_J2K, image_module(64, 64) + encapsulated(_j2k(40_000)))


def large_j2k_in_dicom() -> bytes:
    """As large as its header says, in a few hundred bytes."""
    return dicom(_J2K, image_module(20_000, 20_000) + encapsulated(_j2k(20_000)))


def zeros_deflated(mebibytes: int, wbits: int) -> bytes:
    """So many MiB of zeros, a thousand times smaller (blocks that don't refer to each other can be repeated)."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    whole = block * (mebibytes // 16) + zlib.compressobj(9, wbits=-15).flush()
    return whole if wbits < 0 else b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + whole + bytes(8)


def deflated_dicom() -> bytes:
    """The transfer syntax stands behind a long element, beyond where one would look for it."""
    return dicom(_DEFLATED, zeros_deflated(4096, -15), element(2, 1, b"OB", bytes(8000)))


def items_in_dicom() -> bytes:
    """Three million items of a sequence that nobody asked for."""
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 3_000_000
    sequence = struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF) + items + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return dicom(_EXPLICIT, sequence + image_module(8, 8) + element(0x7FE0, 0x10, b"OB", bytes(64)))


def tables_in_dicom() -> bytes:
    """The same in one that is asked for, and that pydicom parses only then."""
    table = element(0x28, 0x3010, b"SQ", struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 3_000_000)
    return dicom(_EXPLICIT, image_module(8, 8, before=table) + element(0x7FE0, 0x10, b"OB", bytes(64)))


def values_in_dicom() -> bytes:
    """A window centre of ten million values."""
    window = struct.pack("<HHL", 0x28, 0x1050, 20_000_000) + b"1\\" * 10_000_000
    return dicom(_IMPLICIT, _implicit_image(window))


def character_sets_in_dicom() -> bytes:
    names = struct.pack("<HHL", 8, 5, 66_000_000) + b"ISO_IR 100\\" * 6_000_000
    return dicom(_IMPLICIT, names + _implicit_image())


def _implicit_image(before_pixels: bytes = b"") -> bytes:
    values = {2: 1, 0x10: 8, 0x11: 8, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    numbers = [struct.pack("<HHLH", 0x28, number, 2, value) for number, value in values.items()]
    colour = struct.pack("<HHL", 0x28, 4, 12) + b"MONOCHROME2 "
    pixels = struct.pack("<HHL", 0x7FE0, 0x10, 64) + bytes(64)
    return b"".join([numbers[0], colour, *numbers[1:], before_pixels, pixels])


def rle_in_dicom() -> bytes:
    """64 × 64 pixels whose runs go on for 2 GB."""
    frame = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\x07" * (16 << 20)
    return dicom(_RLE, image_module(64, 64) + encapsulated(frame))


def jpeg_scans() -> bytes:
    """A progressive JPEG with its scans repeated."""
    content = encoded("JPEG", (10_000, 9_000), progressive=True)
    first = content.index(b"\xff\xda", content.index(b"\xff\xc2"))
    second = content.index(b"\xff\xda", first + 2)
    third = content.index(b"\xff\xda", second + 2)
    return content[:second] + content[second:third] * 4000 + content[second:]


def jpeg_segments() -> bytes:
    content = encoded("JPEG")
    return content[:2] + b"\xff\xfe\0\2" * 15_000_000 + content[2:]


def jpeg_fill_bytes() -> bytes:
    content = encoded("JPEG")
    return content[:2] + b"\xff" * 100_000_000 + content[2:]


def jpeg_exif() -> bytes:
    """Pillow joins EXIF segments, each time anew."""
    content = encoded("JPEG")
    segment = b"\xff\xe1\xff\xff" + (b"Exif\0\0II*\0\x08\0\0\0\0\0").ljust(65533, b"\0")
    return content[:2] + segment * 1500 + content[2:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png_chunks() -> bytes:
    content = encoded("PNG")
    return content[:33] + png_chunk(b"tIME", b"") * 5_000_000 + content[33:]


def png_text() -> bytes:
    """Many texts of less than Pillow's cap each: 64 MiB of them, and the image is refused."""
    content = encoded("PNG")
    text = b"".join(png_chunk(b"zTXt", b"key%d\0\0" % place + zlib.compress(bytes(1_000_000))) for place in range(80))
    return content[:33] + text + content[33:]


def gif_comments() -> bytes:
    content = encoded("GIF")
    start = content.index(b",")
    return content[:start] + (b"!\xfe" + (b"\xff" + b"x" * 255) * 190_000 + b"\0") + content[start:]


def tiff(entries: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """Little endian; entries are (tag, type, count, value or offset), `data` follows the header's 8 bytes."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + directory + bytes(4)


def tiff_tags() -> bytes:
    """Three thousand tags that all point at the same four megabytes."""
    plain = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    plain += [(277, 3, 1, 1), (278, 4, 1, 8), (279, 4, 1, 64)]
    return tiff([*plain, *((40_000 + place, 7, 4 << 20, 8) for place in range(3000))], bytes(4 << 20))


def tiff_tile() -> bytes:
    """8 × 8 pixels in one tile of 40,000 × 40,000."""
    tile = b"\x78\x9c" + zeros_deflated(1536, -15) + bytes(4)
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, len(tile))]
    return tiff(entries, tile)


def tiff_strips() -> bytes:
    """Millions of strips for eight rows."""
    offsets = np.full(4_000_000, 8, "<u4").tobytes()
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(278, 4, 1, 1), (273, 4, 4_000_000, 8), (279, 4, 4_000_000, 8)]
    return tiff(entries, offsets)


def bmp_rle() -> bytes:
    """Empty rows, each filled byte by byte in Python."""
    content = bytearray(encoded("BMP", (4, 4), "P"))
    (start,) = struct.unpack_from("<L", content, 10)
    content[18:26] = struct.pack("<ll", 12_000, 8_000)
    content[30:34] = struct.pack("<L", 1)
    return bytes(content[:start]) + b"\x01\x07\0\0" * 8000 + b"\0\1"


def ppm_plain() -> bytes:
    return b"P3 4000 4000 255\n" + b"1 " * (3 * 4000 * 4000)


def ppm_scaled() -> bytes:
    return b"P6 5000 5000 100\n" + bytes(3 * 5000 * 5000)


def ppm_comment() -> bytes:
    return b"P6 #" + b"x" * 100_000_000 + b"\n8 8 255\n" + bytes(192)


def nifti(shape: tuple[int, ...] = (8, 8, 8), extensions: bytes = b"", kind: int = 2) -> bytes:
    """Of zeros; without the voxels where they would be many."""
    header = bytearray(348)
    header[:4] = struct.pack("<i", 348)
    header[40 : 42 + 2 * len(shape)] = struct.pack(f"<{1 + len(shape)}h", len(shape), *shape)
    header[42 + 2 * len(shape) : 56] = struct.pack("<h", 1) * (7 - len(shape))
    header[70:74] = struct.pack("<hh", kind, 8)
    header[76:108] = struct.pack("<8f", *[1] * 8)
    header[108:112] = struct.pack("<f", 352 + len(extensions))
    header[344:348] = b"n+1\0"
    count = int(np.prod(shape))
    voxels = bytes(count) if count < 1 << 20 else b""
    return bytes(header) + (b"\1\0\0\0" if extensions else bytes(4)) + extensions + voxels


def nifti_extensions() -> bytes:
    return nifti(extensions=struct.pack("<ii", 16, 6).ljust(16, b" ") * 4_000_000)


def nifti_zeros() -> bytes:
    """Gigabytes behind a volume of a few voxels."""
    return zeros_gzip(nifti(), 4096)


def zeros_gzip(begin: bytes, mebibytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    start = packer.compress(begin) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + start + zeros_deflated(mebibytes, -15) + bytes(8)


def nifti_far_slice() -> bytes:
    """A volume of 3.9 GB whose middle slice stands far behind."""
    return zeros_gzip(nifti((1400, 1400, 2000)), 3840)


BOMBS = {
    function.__name__: function
    for function in (
        jpeg_in_dicom, j2k_in_dicom, large_j2k_in_dicom, deflated_dicom, items_in_dicom, tables_in_dicom,
        values_in_dicom, character_sets_in_dicom, rle_in_dicom, jpeg_scans, jpeg_segments, jpeg_fill_bytes, jpeg_exif,
        png_chunks, png_text, gif_comments, tiff_tags, tiff_tile, tiff_strips, bmp_rle, ppm_plain, ppm_scaled,
        ppm_comment, nifti_extensions, nifti_zeros, nifti_far_slice,
    )
}  # fmt: skip


# Sound images, as large as they may be, of what takes a decoder longest: noise.


def webp_lossy_at_cap() -> bytes:
    return _noise_webp(quality=75, method=1)


def webp_lossless_at_cap() -> bytes:
    return _noise_webp(lossless=True, quality=0, method=0)


def webp_with_alpha_at_cap() -> bytes:
    return _noise_webp("RGBA", quality=75, alpha_quality=100, method=1)


def _noise_webp(mode: str = "RGB", **options) -> bytes:
    """50 million pixels; one stripe of noise again and again, which the encoder doesn't notice."""
    side = 7071
    stripe = np.random.default_rng(0).integers(0, 256, (256, side, len(mode)), np.uint8)
    values = np.tile(stripe, (-(-side // 256), 1, 1))[:side]
    buffer = io.BytesIO()
    Image.fromarray(values, mode).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def lossless_jpeg_at_cap(bits: int = 16, components: int = 1) -> bytes:
    """Every difference of 15 bits, behind a code of one bit: 16 bits for each sample, none of them a marker."""
    side = int((40_000_000 / components) ** 0.5)
    table = b"\x00" + bytes([1, *[0] * 15]) + bytes([15 if bits == 16 else 7])
    frame = _jpeg_frame(0xC3, bits, side, components)
    scan = bytes([components, *(byte for place in range(components) for byte in (place + 1, 0)), 1, 0, 0])
    values = np.random.default_rng(0).integers(0, 0xFE, side * side * components * bits // 8, np.uint8)
    values[:: bits // 8] &= 0x7F
    return _jpeg_in_dicom(
        "1.2.840.10008.1.2.4.70", bits, side, components, [(0xC4, table), frame, (0xDA, scan)], values.tobytes()
    )


def lossless_jpeg_in_colour_at_cap() -> bytes:
    return lossless_jpeg_at_cap(8, 3)


def jpeg_ls_at_cap(bits: int = 16, components: int = 1) -> bytes:
    """Any bits at all are a JPEG-LS."""
    side = int((40_000_000 / components) ** 0.5)
    frame = _jpeg_frame(0xF7, bits, side, components)
    scan = bytes([components, *(byte for place in range(components) for byte in (place + 1, 0)), 0, components > 1, 0])
    values = np.random.default_rng(0).integers(0, 0xFE, 4 * side * side * components, np.uint8)
    return _jpeg_in_dicom("1.2.840.10008.1.2.4.80", bits, side, components, [frame, (0xDA, scan)], values.tobytes())


def jpeg_ls_in_colour_at_cap() -> bytes:
    return jpeg_ls_at_cap(8, 3)


def jpeg2000_at_cap() -> bytes:
    """Samples of 16 bits, each a little more than two bytes of data."""
    import openjpeg

    values = np.random.default_rng(0).integers(0, 1 << 16, (4300, 4300), np.uint16)
    frame = openjpeg.utils.encode_array(values, bits_stored=16, photometric_interpretation=2)
    return dicom(_J2K, image_module(4300, 4300, 16) + encapsulated(bytes(frame)))


def _jpeg_frame(marker: int, bits: int, side: int, components: int) -> tuple[int, bytes]:
    parts = b"".join(bytes([place + 1, 0x11, 0]) for place in range(components))
    return marker, struct.pack(">BHHB", bits, side, side, components) + parts


def _jpeg_in_dicom(syntax: str, bits: int, side: int, components: int, segments, data: bytes) -> bytes:
    head = b"".join(struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content for marker, content in segments)
    frame = b"\xff\xd8" + head + data + b"\xff\xd9"
    return dicom(syntax, image_module(side, side, bits, components=components) + encapsulated(frame))


AT_CAP = {
    function.__name__: function
    for function in (
        webp_lossy_at_cap, webp_lossless_at_cap, webp_with_alpha_at_cap, lossless_jpeg_at_cap,
        lossless_jpeg_in_colour_at_cap, jpeg_ls_at_cap, jpeg_ls_in_colour_at_cap,
        jpeg2000_at_cap,
    )
}  # fmt: skip
