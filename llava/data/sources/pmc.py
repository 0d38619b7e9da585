"""PubMed Central figures: captions as stage-1 records, one question per image, chosen by the caption's length.

Reads LLaVA-Med's llava_med_instruct_fig_captions.json, or any list of objects with pair_id (or image) and fig_caption
(or caption). Captions under 30 words are asked for briefly, longer ones in detail (LLaVA-Med paper, section 3).

python -m llava.data.convert pmc --captions llava_med_instruct_fig_captions.json \\
    --image-folder data/images --output-dir data/pmc
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.commandline import ArgumentParser, existing_file
from llava.constants import DEFAULT_IMAGE_TOKEN, FIGURE_DOMAINS
from llava.data.conversion import Conversion, ImageFolder
from llava.errors import LlavaError
from llava.record_content import first_given
from llava.records import Record, iter_records, read_json

NAME = "pmc"

MISSING_DEFAULT = "drop"

BRIEF = (
    "Describe this image briefly.",
    "Say in a few words what the figure shows.",
    "What does this image show, in short?",
    "Give a short caption for the image.",
    "Summarize the content of the image in a sentence.",
    "In brief: what can be seen here?",
    "Write a concise description of this biomedical image.",
    "What is shown in this figure? Answer shortly.",
    "Provide a compact explanation of the image.",
    "State the main content of this image.",
    "Caption this image concisely.",
)
DETAILED = (
    "Describe this image in detail.",
    "Explain thoroughly what the figure shows.",
    "Give a full description of the image.",
    "What can be seen in this image? Be as complete as you can.",
    "Write a detailed caption for this biomedical figure.",
    "Go through the image and describe everything of importance.",
    "Provide a comprehensive account of what is shown.",
    "Examine the image closely and report what it contains.",
    "Describe the findings in this image at length.",
    "Explain the content of the figure with all its details.",
    "What does this image show? Include every detail that matters.",
    "Characterize the image with a thorough description.",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--captions", required=True, help="JSON, JSONL or Parquet with the captions")
    parser.add_argument("--split", default="train", help="name of the output file")
    parser.add_argument("--brief-below", type=int, default=30, help="words from which the detailed questions are used")
    parser.add_argument("--questions", help='JSON of your own questions: {"brief": [...], "detailed": [...]}')
    parser.add_argument("--seed", type=int, default=0, help="of the choice of questions")


def convert(args, image_folder: ImageFolder) -> Conversion:
    path = existing_file(args.captions, "--captions file")
    questions = _read_questions(args.questions)
    conversion = Conversion("pmc", {}, [path], image_folder=image_folder, candidates=False)
    conversion.splits = {args.split: _records(path, questions, args.brief_below, args.seed, conversion)}
    return conversion


def choose_question(caption: str, key: str, questions: dict[str, list[str]], brief_below: int, seed: int) -> str:
    """The question for a caption: the list by its number of words, the place in the list by `key` and `seed` alone."""
    choice = questions["brief" if len(caption.split()) < brief_below else "detailed"]
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return choice[int.from_bytes(digest[:8], "big") % len(choice)]


def _records(
    path: Path, questions: dict[str, list[str]], brief_below: int, seed: int, conversion: Conversion
) -> Iterator[Record]:
    for key, row in _rows(path, conversion).items():
        caption = str(row["caption"] or "").strip()
        image = row["image"] or f"{key}.jpg"
        if not caption:
            conversion.left_out["empty caption"] += 1
        elif DEFAULT_IMAGE_TOKEN in caption:
            conversion.left_out[f"caption holds {DEFAULT_IMAGE_TOKEN}"] += 1
        elif conversion.accepts(image):
            question = choose_question(caption, key, questions, brief_below, seed)
            record = {
                "id": key,
                "image": image,
                "conversations": [
                    {"from": "human", "value": f"{question}\n{DEFAULT_IMAGE_TOKEN}"},
                    {"from": "gpt", "value": caption},
                ],
            }
            yield record | ({"domain": row["domain"]} if row["domain"] else {})


def _rows(path: Path, conversion: Conversion) -> dict[str, Record]:
    """Key → image, caption and domain of each pair; a pair listed under several domains is one with all of them."""
    rows: dict[str, Record] = {}
    for where, listed, entry in _entries(path):
        key = entry.get("pair_id") or entry.get("id") or entry.get("image")
        if not key:
            raise LlavaError(f'{where}: no "pair_id", "id" or "image"')
        domain = _domain(entry.get("domain"), listed)
        row = rows.get(str(key))
        if row is None:
            caption = first_given(entry, "fig_caption", "caption")
            rows[str(key)] = {"image": entry.get("image"), "caption": caption, "domain": domain}
        else:
            conversion.left_out["pair listed before"] += 1
            for name, is_there in (domain or {}).items():
                row["domain"] = {**(row["domain"] or {}), name: is_there or bool((row["domain"] or {}).get(name))}
    return rows


def _entries(path: Path) -> Iterator[tuple[str, str | None, Record]]:
    """(where, domain it is listed under, entry): the release's {domain: [entries]}, or records of any file form."""
    with path.open("rb") as file:
        is_object = path.suffix == ".json" and file.read(64).lstrip()[:1] == b"{"
    if not is_object:
        for index, entry in enumerate(iter_records(path)):
            yield f"{path} record {index}", None, entry
        return
    for domain, entries in read_json(path).items():
        if not isinstance(entries, list):
            raise LlavaError(f'{path}: "{domain}" holds {type(entries).__name__}, expected a list of captions')
        for index, entry in enumerate(entries):
            yield f'{path} "{domain}" record {index}', domain, entry


def _domain(own: Any, listed: str | None) -> dict[str, bool] | None:
    if isinstance(own, dict):
        return {name: bool(value) for name, value in own.items()}
    name = own if isinstance(own, str) else listed
    return {known: known == name for known in FIGURE_DOMAINS} if name in FIGURE_DOMAINS else None


def _read_questions(path: str | None) -> dict[str, list[str]]:
    if path is None:
        return {"brief": list(BRIEF), "detailed": list(DETAILED)}
    questions = read_json(path)
    for kind in ("brief", "detailed"):
        listed = questions.get(kind) if isinstance(questions, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
            raise LlavaError(f'{path}: "{kind}" has to be a list of questions')
    return questions
