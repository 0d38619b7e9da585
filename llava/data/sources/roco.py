"""ROCO: radiology figures with their captions (Pelka et al. 2018), as the roco-instruct records of BabyDoctor.

Captions may span lines. Each record keeps its licence. `dlinks.txt` holds shell commands: the address is parsed out
of each, and nothing is ever run.

python -m llava.data.convert roco --folder roco-dataset/data/train/radiology --output-dir data/roco
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llava.commandline import ArgumentParser, existing_dir, existing_file
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.conversion import Conversion, ImageFolder, is_inside
from llava.data.sources.tables import read_lines, read_table
from llava.errors import LlavaError
from llava.folders import is_file
from llava.records import Record, write_records

NAME = "roco"

MISSING_DEFAULT = "drop"
QUESTION = "The following image is a radiology scan. Deeply analyze and diagnose this image."
URLS_FILE = "image_urls.jsonl"

_RECORD_START = re.compile(r"^(ROCO_(\d+))\t", re.MULTILINE)
_URL = re.compile(r"""(?:https?|ftp)://[^\s'"`;|&<>$(){}\\]+""")


class Licence(NamedTuple):
    """A row of licences.txt: the image's name at PubMed Central, and its licence as the file writes it."""

    source_name: str
    code: str


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--folder", required=True, help="holds captions.txt and licences.txt (and dlinks.txt, images/)")
    parser.add_argument("--split", default="train", help="name of the output file")
    parser.add_argument("--licence", help='keep only these, by comma: "CC BY,CC0" ("NO-CC CODE" is one too)')
    parser.add_argument("--question", default=QUESTION, help="asked about every image")
    parser.add_bool("--write-urls", help=f"write {URLS_FILE} from dlinks.txt, for llava.data.download_images")


def default_image_folder(args) -> Path | None:
    folder = Path(args.folder) / "images"
    return folder if folder.is_dir() else None


def convert(args, image_folder: ImageFolder) -> Conversion:
    folder = existing_dir(args.folder, "--folder")
    captions = existing_file(folder / "captions.txt", "captions")
    licences_file = existing_file(folder / "licences.txt", "licences")
    licences = read_licences(licences_file)
    conversion = Conversion("roco", {}, [captions, licences_file], image_folder=image_folder, candidates=False)
    wanted = {code.strip() for code in args.licence.split(",")} if args.licence else None
    if wanted and (unknown := wanted - {licence.code for licence in licences.values()}):
        known = ", ".join(sorted({licence.code for licence in licences.values()}))
        raise LlavaError(f"--licence {', '.join(sorted(unknown))}: not in {licences_file}; there are: {known}")
    if args.write_urls:
        dlinks = existing_file(folder / "dlinks.txt", "download links")
        conversion.sources.append(dlinks)
        write_records(
            Path(args.output_dir) / URLS_FILE, _url_records(dlinks, licences, conversion), overwrite=args.overwrite
        )
    conversion.splits = {args.split: _records(captions, licences, wanted, args.question, image_folder, conversion)}
    return conversion


def read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """(ROCO id, caption) in the file's order; lines that don't start a record belong to the caption before them."""
    text = "\n".join(read_lines(path))
    starts = list(_RECORD_START.finditer(text))
    if not starts:
        raise LlavaError(f"{path}: no line begins with ROCO_<number> and a tab")
    for start, following in zip(starts, [*starts[1:], None]):
        yield start[1], text[start.end() : following.start() if following else len(text)].strip()


def read_licences(path: Path) -> dict[str, Licence]:
    """The licence of each ROCO id."""
    rows = read_table(path, ["ROCO_ID", "PMC_ID", "CC"], ",")
    return {row["ROCO_ID"]: Licence(row["PMC_ID"].strip(), row["CC"].strip()) for _, row in rows}


def read_links(path: Path, left_out: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """(ROCO id, address of the article's tar) from dlinks.txt; the commands around the addresses are text, no more.
    Lines without an address are counted in `left_out`."""
    for line in read_lines(path):
        name, _, command = line.partition("\t")
        if re.fullmatch(r"ROCO_\d+", name.strip()) and (url := _URL.search(command)):
            # PubMed Central serves the same tree over HTTPS.
            yield name.strip(), re.sub(r"^ftp://ftp\.ncbi\.", "https://ftp.ncbi.", url[0])
        elif line.strip() and left_out is not None:
            left_out[f"no address in dlinks.txt (for {URLS_FILE})"] += 1


def _records(
    captions: Path,
    licences: dict[str, Licence],
    wanted: set[str] | None,
    question: str,
    image_folder: ImageFolder,
    conversion: Conversion,
) -> Iterator[Record]:
    for name, caption in read_captions(captions):
        licence = licences.get(name, Licence("", "unknown"))
        if wanted is not None and licence.code not in wanted:
            conversion.left_out[f"licence {licence.code}"] += 1
        elif not caption:
            conversion.left_out["empty caption"] += 1
        elif DEFAULT_IMAGE_TOKEN in caption:
            conversion.left_out[f"caption holds {DEFAULT_IMAGE_TOKEN}"] += 1
        else:
            image = _file_name(name, licence, image_folder)
            if image_folder.accept(image):
                yield {
                    "id": name.removeprefix("ROCO_"),
                    "image": image,
                    "conversations": [
                        {"from": "human", "value": f"{question}\n{DEFAULT_IMAGE_TOKEN}"},
                        {"from": "gpt", "value": caption},
                    ],
                    "licence": licence.code,
                    "source": licence.source_name,
                }


def _file_name(name: str, licence: Licence, image_folder: ImageFolder) -> str:
    """Images are named by ROCO id or as at PubMed Central, depending on how they were fetched."""
    usual = f"{name}.jpg"
    there = image_folder.folder
    if there is not None and not (there / usual).is_file():
        other = licence.source_name
        if other and is_inside(other) and is_file(there / other):
            return other
    return usual


def _url_records(dlinks: Path, licences: dict[str, Licence], conversion: Conversion) -> Iterator[Record]:
    for name, url in read_links(dlinks, conversion.left_out):
        # "PMC4608653_cro-0008-0385-g01.jpg" is the member "PMC4608653/cro-0008-0385-g01.jpg" of the article's tar.
        article, underscore, member = licences.get(name, Licence("", "")).source_name.partition("_")
        if underscore:
            yield {"pair_id": name, "pmc_tar_url": url, "image_file_path": f"{article}/{member}"}
        else:
            conversion.left_out[f"no name at PubMed Central in licences.txt (for {URLS_FILE})"] += 1
