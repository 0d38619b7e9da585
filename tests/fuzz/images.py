"""Seeded mutations of real image files: `python -m tests.fuzz.images [--count N] [--seed N] [--json PATH]`.

Each file is opened in a process with 1.5 GB of memory and 5 seconds of processor time a file. It has to open, or to
be refused by an ImageError of one line that holds nothing of the file. Whatever else happens is a finding, with the
number that makes the same file again. Exit code 1 where there is one.
"""

import argparse
import gzip
import io
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

MEMORY = 1_500_000_000
SECONDS = 5
KINDS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "DICOM", "NIFTI")
_NOT_IN_TEXTS = re.compile(r"\n|0x[0-9a-f]{4}|\\x|BytesIO|<[a-z]|Unmistakable|4711|[\x00-\x08\x0e-\x1f\ufffd]")
_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def originals(kind: str) -> list[bytes]:
    """Small sound files of a kind, in several of its forms."""
    generator = np.random.default_rng(11)
    colour = Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    grey16 = Image.fromarray(generator.integers(0, 4000, (40, 48)).astype(np.uint16))
    if kind == "DICOM":
        return _dicoms()
    if kind == "NIFTI":
        return _niftis(generator)
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {
        "PNG": [(colour, {"exif": exif}), (colour.convert("RGBA"), {}), (colour.quantize(16), {}), (grey16, {})],
        "JPEG": [(colour, {"exif": exif}), (colour, {"progressive": True}), (colour.convert("CMYK"), {})],
        "TIFF": [
            *((colour, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
            (grey16, {}),
        ],
        "GIF": [
            (colour.quantize(16), {"save_all": True, "append_images": [colour.quantize(8)], "comment": b"x" * 600})
        ],
        "WEBP": [(colour, {"exif": exif}), (colour, {"lossless": True}), (colour.convert("RGBA"), {})],
        "BMP": [(colour, {}), (colour.quantize(16), {}), (colour.convert("1"), {})],
        "PPM": [(colour, {}), (grey16.convert("I;16"), {})],
    }[kind]
    return [_saved(image, kind, options) for image, options in forms]


def mutate(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """One to six changes: bytes, numbers, lengths, pieces lost, doubled, moved or of another file, an end cut off."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 7)):
        if not data:
            break
        # Headers are where a change tells most.
        end = len(data) if generator.random() < 0.5 else min(len(data), 600)
        place, length = int(generator.integers(end)), int(generator.integers(1, 64))
        match generator.integers(8):
            case 0 | 1:
                data[place] = generator.integers(256)
            case 2:
                data[place] ^= 1 << generator.integers(8)
            case 3:
                number = int(generator.choice(_INTERESTING))
                size = int(generator.choice([1, 2, 4]))
                order = "little" if generator.random() < 0.5 else "big"
                data[place : place + size] = (number & (1 << 8 * size) - 1).to_bytes(size, order)
            case 4:
                del data[place : place + length]
            case 5:
                data[place:place] = data[place : place + length] * int(generator.integers(1, 20))
            case 6:
                start = int(generator.integers(len(other)))
                data[place:place] = other[start : start + length]
            case 7 if generator.random() < 0.3:
                del data[place:]
    return bytes(data)


def run(kind: str, count: int, seed: int) -> dict:
    """{"kind", "files", "opened", "refused", "findings", "slowest_seconds", "peak_mb"} of `count` mutated files."""
    total = {"kind": kind, "files": 0, "opened": 0, "refused": 0, "findings": [], "slowest_seconds": 0.0, "peak_mb": 0}
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while total["files"] < count:
            start = total["files"]
            command = [sys.executable, "-m", "tests.fuzz.images", "--child", kind, str(start), str(count), str(seed)]
            done = subprocess.run([*command, str(progress)], capture_output=True, text=True)
            if done.returncode == 0:
                part = json.loads(done.stdout.splitlines()[-1])
            else:
                part = json.loads(progress.read_text())
                number = start + part["files"]
                part["files"] += 1
                part["findings"].append({"number": number, "what": f"the process ended with {done.returncode}"})
            for name in ("files", "opened", "refused", "findings"):
                total[name] += part[name]
            for name in ("slowest_seconds", "peak_mb"):
                total[name] = max(total[name], part[name])
    return total


def mutated(kind: str, start: int, count: int, seed: int) -> Iterator[bytes]:
    """The files `start` to `count`; each depends on its number and the seed alone."""
    files = originals(kind)
    for number in range(start, count):
        generator = np.random.default_rng([seed, KINDS.index(kind), number])
        first, second = generator.integers(len(files), size=2)
        content = mutate(files[first], files[second], generator)
        if kind == "NIFTI" and generator.random() < 0.3:
            content = gzip.compress(content, 1)
        if kind == "PNG" and generator.random() < 0.8:
            content = _with_sums(content)
        yield content


def _with_sums(png: bytes) -> bytes:
    """The chunks with right checksums, or a PNG decoder would look no further."""
    data, place = bytearray(png), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


def _child(kind: str, start: int, count: int, seed: int, progress: Path) -> None:
    from llava.images import ImageError, open_image

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for content in originals(kind):
        open_image(content)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = {"files": 0, "opened": 0, "refused": 0, "findings": [], "slowest_seconds": 0.0, "peak_mb": 0}
    descriptor = os.open(progress, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for content in mutated(kind, start, count, seed):
        words = json.dumps(part).encode()
        os.ftruncate(descriptor, os.pwrite(descriptor, words, 0))
        # Ends the process, also out of a decoder's own loop.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        began, what = time.process_time(), None
        try:
            image = open_image(content)
            part["opened"] += 1
            what = None if image.mode == "RGB" else f"opened as {image.mode}"
        except ImageError as error:
            part["refused"] += 1
            if _NOT_IN_TEXTS.search(str(error)) or "needs more memory" in str(error) or error.__cause__ is not None:
                what = f"text: {str(error)!r}"
        except Exception as error:  # noqa: BLE001 - that there is none is what this looks for
            what = f"{type(error).__name__}: {error}"[:300]
        signal.setitimer(signal.ITIMER_PROF, 0)
        if what is not None:
            part["findings"].append({"number": start + part["files"], "what": what})
        part["files"] += 1
        part["slowest_seconds"] = max(part["slowest_seconds"], round(time.process_time() - began, 2))
        part["peak_mb"] = max(part["peak_mb"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    print(json.dumps(part))


def _saved(image: Image.Image, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _dicoms() -> list[bytes]:
    from pydicom.data import get_testdata_file

    from tests.images.test_medical import HOUNSFIELD, dicom

    names = (
        "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm",
        "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_small_odd_jpeg.dcm", "SC_rgb_small_odd.dcm",
    )  # fmt: skip
    found = [get_testdata_file(name, download=False) for name in names]
    made = [dicom(HOUNSFIELD, WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=-1024)]
    return made + [Path(path).read_bytes() for path in found if path]


def _niftis(generator: np.random.Generator) -> list[bytes]:
    import nibabel

    values = generator.integers(0, 1000, (12, 10, 8)).astype(np.int16)
    affine = np.array([[0, -2, 0, 1], [1.5, 0, 0, 2], [0, 0, 3, 4], [0, 0, 0, 1.0]])
    return [
        nibabel.Nifti1Image(values, affine).to_bytes(),
        nibabel.Nifti1Image(values.astype(np.float32), np.diag([-1.0, 1, 1, 1])).to_bytes(),
        nibabel.Nifti2Image(values[..., None], np.eye(4)).to_bytes(),
        gzip.compress(nibabel.Nifti1Image(values, affine).to_bytes()),
    ]


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        kind, start, count, seed, progress = sys.argv[2:]
        _child(kind, int(start), int(count), int(seed), Path(progress))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="of files of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    results = []
    for kind in args.kind or KINDS:
        results.append(run(kind, args.count, args.seed))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "results": results}, indent=1) + "\n")
    return 1 if any(result["findings"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
