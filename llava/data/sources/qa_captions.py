"""Captions out of question-answer records: one per image, a sentence for each of its questions.

For training small base models on a set that has no captions. `captions` holds image and caption; `text` holds the
same questions asked about the caption in place of the image, for a language model that sees no images yet; `blind`
holds them without image and caption, for the baseline that only knows what is usually answered; `joined` holds several
questions of an image in one conversation about it, so that its features are computed once for all of them. `kinds` has
fields of a record (`--kind question_type`) in place of its question; `parts` has every question whole and again
with some of its words. What is asked tells less there, so that the answer can't be learned without the image.

python -m llava.data.convert qa-captions --records train.json --image-folder images --output-dir data/captions
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, existing_file
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.conversion import Conversion, ImageFolder, clean_text
from llava.errors import LlavaError
from llava.record_content import images_of, question_answer_pairs, read_turns
from llava.records import Record, iter_records

NAME = "qa-captions"
LEAST_SHARE = 0.25  # of a question's words in `parts`, drawn for each part between this and all


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--records", required=True, help="LLaVA-Med records with images (of the training split only)")
    parser.add_argument("--question", default="Describe the picture.", help="asked about every image")
    parser.add_argument("--turns", type=int, default=8, help="most questions of a conversation of the split joined")
    parser.add_argument("--min-images", type=int, default=1, help="least number of images that share a kept sentence")
    parser.add_argument("--kind", action="append", default=[], help="split kinds: a field in place of the question")
    parser.add_argument(
        "--parts", type=int, default=0, help="split parts: times that each question is in it, one whole"
    )
    parser.add_argument("--field", action="append", default=[], help="a field of the records to say too (image_organ)")


def convert(args, image_folder: ImageFolder) -> Conversion:
    path = existing_file(args.records, "--records file")
    if args.turns < 1:
        raise LlavaError(f"--turns is {args.turns}; give 1 or more")
    if args.parts < 0:
        raise LlavaError(f"--parts is {args.parts}; give 0 or more")
    conversion = Conversion("qa-captions", {}, [path], image_folder=image_folder, candidates=False)
    by_image, said, by_kind = _read(path, image_folder, args.field, args.kind)
    conversion.splits = {
        "captions": _captions(said, args.question, args.min_images, conversion),
        "text": _conversations(by_image),
        "blind": _conversations(by_image, with_caption=False),
        "joined": _joined(by_image, args.turns),
    }
    if args.kind:
        conversion.splits["kinds"] = _kinds(by_kind)
    if args.parts:
        conversion.splits["parts"] = _parts(by_image, args.parts)
    return conversion


def statement(question: str, answer: str) -> str:
    """Question and answer as one sentence without a full stop inside: "is the liver enlarged: no."."""
    plain = [re.sub(r"[.?!:]+", " ", text).strip().lower() for text in (question, answer)]
    return f"{' '.join(plain[0].split())}: {' '.join(plain[1].split())}."


Pairs = dict[str, list[tuple[str, str]]]


def _kinds(by_kind: Pairs) -> Iterator[Record]:
    for image, pairs in by_kind.items():
        for number, (kind, answer) in enumerate(pairs):
            yield _one_turn(f"{image} {number} kind", image, kind, answer)


def _parts(by_image: Pairs, times: int) -> Iterator[Record]:
    draw = random.Random(0)
    for image, pairs in by_image.items():
        for number, (asked, answer) in enumerate(pairs):
            words = asked.split()
            if not words:
                raise LlavaError(f"image {image!r:.200}: a question without words has no parts; leave --parts out")
            yield _one_turn(f"{image} {number} whole", image, asked, answer)
            for turn in range(1, times):
                share = draw.uniform(LEAST_SHARE, 1)
                part = [word for word in words if draw.random() < share] or [draw.choice(words)]
                yield _one_turn(f"{image} {number} part {turn}", image, " ".join(part), answer)


def _one_turn(id: str, image: str, asked: str, answer: str) -> Record:
    turns = [{"from": "human", "value": f"{asked}\n{DEFAULT_IMAGE_TOKEN}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}


def _read(path: Path, image_folder: ImageFolder, fields: list[str], kind: list[str]) -> tuple[Pairs, Pairs, Pairs]:
    """(question, answer) pairs of each image, in the order of the file; the same with `fields` before them; and with
    the fields `kind` in place of the question."""
    by_image: Pairs = {}
    said: Pairs = {}
    by_kind: Pairs = {}
    for index, record in enumerate(iter_records(path)):
        where = f"{path} record {index} ({record.get('id')!r})"
        image, pairs = _asked(record, where)
        missing = [field for field in kind if record.get(field) is None]
        if missing:
            raise LlavaError(f"{where} has no {missing[0]!r}, which --kind names; give fields that every record has")
        if image_folder.accept(image):
            by_image.setdefault(image, []).extend(pairs)
            said.setdefault(image, []).extend([*_named(record, fields), *pairs])
            asked = ", ".join(": ".join(pair) for pair in _named(record, kind))
            by_kind.setdefault(image, []).extend((asked, answer) for _, answer in pairs)
    return by_image, said, by_kind


def _named(record: Record, fields: list[str]) -> list[tuple[str, str]]:
    """(name, value) of the fields that a record has, as text."""
    return [(field.replace("_", " "), clean_text(record[field])) for field in fields if record.get(field) is not None]


def _asked(record: Record, where: str) -> tuple[str, list[tuple[str, str]]]:
    """The image of a record, and its questions and answers without the mark of the image."""
    try:
        asked = question_answer_pairs(read_turns(record))
    except LlavaError as error:
        raise LlavaError(f"{where}: {error}") from error
    images = images_of(record, where)
    if not asked or len(images) != 1 or not isinstance(images[0], str):
        raise LlavaError(f"{where}: expected the name of one image, a question and an answer")
    return images[0], [(_without_image(asks), _without_image(answer)) for asks, answer in asked]


def _without_image(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def _captions(said: Pairs, question: str, min_images: int, conversion: Conversion) -> Iterator[Record]:
    sentences = {image: list(dict.fromkeys(statement(*pair) for pair in pairs)) for image, pairs in said.items()}
    shared = Counter(sentence for own in sentences.values() for sentence in own)
    for image, own in sentences.items():
        caption = " ".join(sentence for sentence in own if shared[sentence] >= min_images)
        if caption:
            yield _one_turn(image, image, question, caption)
        else:
            conversion.left_out[f"no sentence that {min_images} images share (captions)"] += 1


def _conversations(by_image: Pairs, with_caption: bool = True) -> Iterator[Record]:
    for image, pairs in by_image.items():
        caption = " ".join(dict.fromkeys(statement(*pair) for pair in pairs)) + "\n" if with_caption else ""
        for number, (asked, answer) in enumerate(pairs):
            turns = [{"from": "human", "value": caption + asked}, {"from": "gpt", "value": answer}]
            yield {"id": f"{image} {number}", "conversations": turns}


def _joined(by_image: Pairs, most: int) -> Iterator[Record]:
    for image, pairs in by_image.items():
        for start in range(0, len(pairs), most):
            turns = []
            for asked, answer in pairs[start : start + most]:
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            turns[0]["value"] += f"\n{DEFAULT_IMAGE_TOKEN}"
            yield {"id": f"{image} {start}", "image": image, "conversations": turns}
