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
from llava.data.caption_files import iter_captions
from llava.data.conversion import Conversion, ImageFolder, text_of
from llava.errors import LlavaError
from llava.records import Record, read_json

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
        caption = row["caption"]
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
    for where, listed, entry in iter_captions(path):
        names = [text_of(entry, name, where, optional=True) for name in ("pair_id", "id", "image")]
        key = next(filter(None, names), None)
        if key is None:
            raise LlavaError(f'{where}: no "pair_id", "id" or "image"')
        domain = _domain(entry.get("domain"), listed)
        row = rows.get(key)
        if row is None:
            name = "caption" if entry.get("fig_caption") is None else "fig_caption"
            caption = text_of(entry, name, where, optional=True)
            rows[key] = {"image": names[-1], "caption": caption, "domain": domain}
        else:
            conversion.left_out["pair listed before"] += 1
            for name, is_there in (domain or {}).items():
                row["domain"] = {**(row["domain"] or {}), name: is_there or bool((row["domain"] or {}).get(name))}
    return rows


def _domain(own: Any, listed: str | None) -> dict[str, bool] | None:
    if isinstance(own, dict):
        return {name: bool(value) for name, value in own.items()}
    names = own if isinstance(own, list) else [own if isinstance(own, str) else listed]
    found = {known: known in names for known in FIGURE_DOMAINS}
    return found if any(found.values()) else None


def _read_questions(path: str | None) -> dict[str, list[str]]:
    if path is None:
        return {"brief": list(BRIEF), "detailed": list(DETAILED)}
    questions = read_json(path)
    for kind in ("brief", "detailed"):
        listed = questions.get(kind) if isinstance(questions, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
            raise LlavaError(f'{path}: "{kind}" has to be a list of questions')
    return questions
