"""Split conversations that are longer than the model's maximum into several records that fit.

    python -m llava.data.split_long_conversation --in-file train.json --out-file split.json \\
        --model-name-or-path LLM --max-length 2048

Cuts are made between an answer and the next question; the roles decide which is which. Every piece of a conversation
about an image shows the image again, in its first question; ids become `<id>_<first turn>`, and
`record<number>_<first turn>` where a record has none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.sample_form import add_form_flags, form_of
from llava.errors import LlavaError, amount
from llava.record_content import plain_entries, with_entries
from llava.records import Record, iter_records, write_records


@dataclass
class Counts:
    """What was split, and what couldn't be."""

    records: int = 0
    split: int = 0
    pieces: int = 0
    too_long: int = 0
    """Pieces that can't be split further (one question and answer) and are longer than the maximum."""
    unanswered: int = 0
    """Questions without an answer, at the end of a conversation; left out."""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--in-file", required=True, help="JSON, JSONL or Parquet")
    parser.add_argument("--out-file", required=True, help=".json, .jsonl or .parquet")
    parser.add_argument("--begin", type=int, default=0, help="first record to take")
    parser.add_argument("--end", type=int, help="first record not to take any more")
    parser.add_argument("--model-name-or-path", required=True, help="folder with the tokenizer")
    parser.add_argument("--max-length", type=int, default=2048, help="positions, images included")
    add_form_flags(parser)
    parser.add_overwrite()
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    path = existing_file(args.in_file, "--in-file")
    end = args.end if args.end is not None and args.end >= 0 else None
    if args.begin < 0 or (end is not None and end <= args.begin):
        raise LlavaError(f"--begin {args.begin} --end {args.end}: no record lies between them")
    if args.max_length < 1:
        raise LlavaError(f"--max-length {args.max_length}: give 1 or more")
    check_outputs(args, [path], "out_file")
    length_of = _length_function(args)
    counts = Counts()
    records = islice(iter_records(path), args.begin, end)
    pieces = split_all(records, length_of, args.max_length, counts, args.begin)
    write_records(args.out_file, pieces, overwrite=args.overwrite)
    write_line(
        f"{args.out_file}: {amount(counts.records, 'record')} became {counts.pieces:,}; split: {counts.split:,}, "
        f"pieces of one question and answer longer than {args.max_length:,} positions: {counts.too_long:,}, "
        f"{amount(counts.unanswered, 'unanswered question')} left out"
    )
    return 0


def split_all(
    records: Iterator[Record],
    length_of: Callable[[Record], int],
    max_length: int,
    counts: Counts,
    begin: int = 0,
) -> Iterator[Record]:
    """The records, long ones in pieces of at most `max_length` positions wherever that is possible.

    `begin` is the number of the first record, by which pieces are called whose record has no id.

    Raises:
        LlavaError: there are no records.
    """
    for number, record in enumerate(records, begin):
        counts.records += 1
        name = f"record{number}" if record.get("id") is None else str(record["id"])
        for piece in _pieces(record, name, length_of, max_length, counts):
            counts.pieces += 1
            yield piece
    if not counts.records:
        raise LlavaError(f"--in-file holds no record number {begin}")


def _pieces(
    record: Record, name: str, length_of: Callable[[Record], int], max_length: int, counts: Counts
) -> Iterator[Record]:
    if length_of(record) <= max_length:
        yield record
        return
    entries = plain_entries(record)
    first = next((number for number, turn in enumerate(entries) if turn["from"] == "human"), len(entries))
    opening = entries[:first]
    pairs = [entries[place : place + 2] for place in range(first, len(entries) - 1, 2)]
    if not pairs:
        counts.too_long += 1
        yield record
        return
    counts.unanswered += (len(entries) - first) % 2
    starts = _starts(record, opening, pairs, length_of, max_length)
    counts.split += len(starts) > 1
    for start, end in zip(starts, [*starts[1:], len(pairs)]):
        piece = _piece(record, opening, pairs, start, end)
        if length_of(piece) > max_length:
            counts.too_long += 1
        if len(starts) > 1:
            piece["id"] = f"{name}_{len(opening) + 2 * start if start else 0}"
        yield piece


Pair = list[dict]
"""A question and its answer."""


def _starts(
    record: Record, opening: list[dict], pairs: list[Pair], length_of: Callable[[Record], int], max_length: int
) -> list[int]:
    """The first pair of each piece; every piece takes as many pairs as fit, and at least one."""
    starts = [0]
    for end in range(2, len(pairs) + 1):
        if end - starts[-1] > 1 and length_of(_piece(record, opening, pairs, starts[-1], end)) > max_length:
            starts.append(end - 1)
    return starts


def _piece(record: Record, opening: list[dict], pairs: list[Pair], start: int, end: int) -> Record:
    """Pairs `start` to `end`. What the assistant says before any question stays with the first piece; a system turn
    holds for all."""
    before = [turn for turn in opening if start == 0 or turn["from"] == "system"]
    turns = [dict(turn) for pair in pairs[start:end] for turn in pair]
    # Each image's mark stands where it was; a piece that doesn't hold it asks about the image all the same.
    total = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for pair in pairs for turn in pair)
    here = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if here < total:
        marks = "\n".join([DEFAULT_IMAGE_TOKEN] * total)
        for turn in turns:
            if DEFAULT_IMAGE_TOKEN in turn["value"]:
                turn["value"] = turn["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        turns[0]["value"] = f"{marks}\n{turns[0]['value']}"
    return with_entries(record, [*before, *turns])


def _length_function(args) -> Callable[[Record], int]:
    from llava.model.tokenizer import load_tokenizer
    from llava.tokenization import encode_conversation

    folder = existing_dir(args.model_name_or_path, "--model-name-or-path")
    form = form_of(folder, args.template, args.features_per_image)
    tokenizer = load_tokenizer(folder)
    form.image_tokens.check(tokenizer)

    def length_of(record: Record) -> int:
        try:
            encoded = encode_conversation(
                record, form.template, tokenizer, form.image_tokens, features_per_image=form.features_per_image
            )
        except LlavaError as error:
            raise LlavaError(
                f'{args.in_file} id "{record.get("id")}": {error}; see llava.data.validate --fix'
            ) from error
        return len(encoded.input_ids)

    return length_of


if __name__ == "__main__":
    run(main)
