"""Generated dialogues → training records: split into turns, cleaned by rule, `<image>` placed, validated.

What each rule dropped or changed is counted and said.

python -m llava.instruct.instruct_postprocess --input_path generated.jsonl --output_path instruct.json
"""

import random
from collections import Counter

from llava.commandline import ArgumentParser, check_outputs, run, write_line
from llava.constants import DEFAULT_IMAGE_TOKEN, FIGURE_DOMAINS
from llava.errors import LlavaError, amount
from llava.instruct.cleaning import RULES, clean_turns, split_turns
from llava.record_content import record_domains


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input_path", required=True, help="what instruct_generate wrote (JSONL or JSON)")
    parser.add_argument("--output_path", required=True, help="training records (.json, .jsonl or .parquet)")
    parser.add_argument("--seed", type=int, default=0, help="of the side on which <image> is put")
    parser.add_argument("--summary", help="also write the counts here (JSON)")
    parser.add_overwrite()
    return parser


def main(argv=None) -> int:
    from llava.records import iter_records, write_json, write_records, written_together

    args = build_parser().parse_args(argv)
    check_outputs(args, [args.input_path], "output_path", "summary")
    counts: Counter = Counter()
    records = []
    for index, row in enumerate(iter_records(args.input_path)):
        record = to_training_record(row, args.seed, counts, f"{args.input_path} record {index}")
        if record is not None:
            records.append(record)
    if not records:
        raise LlavaError(
            f"{args.input_path}: no dialogue is left after cleaning (of {counts['records_in']}: "
            f"{counts['refused']} refused by the writing model, {counts['records_left_empty']} left empty)"
        )
    with written_together():
        write_records(args.output_path, records, overwrite=args.overwrite)
        if args.summary:
            write_json(args.summary, dict(counts), overwrite=args.overwrite)
    write_line(summarise(counts))
    write_line(f"wrote {amount(len(records), 'record')} to {args.output_path}")
    return 0


def to_training_record(row: dict, seed: int, counts: Counter, where: str) -> dict | None:
    """One training record, or None if nothing is left of the dialogue; `counts` says why.

    The side of the first question on which `<image>` stands is drawn by seed and id, whatever the order of rows.
    """
    key = row.get("pair_id", row.get("id"))
    text = row.get("result")
    if key is None or not isinstance(text, str):
        raise LlavaError(f'{where}: expected "pair_id" and "result", as instruct_generate writes them')
    counts["records_in"] += 1
    if row.get("refused"):
        counts["refused"] += 1
        return None
    if DEFAULT_IMAGE_TOKEN in text:  # the record's own is put below
        counts["image_marks"] += text.count(DEFAULT_IMAGE_TOKEN)
        text = text.replace(DEFAULT_IMAGE_TOKEN, " ")
    turns = split_turns(text, counts, cut_off=row.get("finish_reason") == "length")
    counts["turns_in"] += len(turns)
    turns = clean_turns(turns, counts)
    if not turns:
        counts["records_left_empty"] += 1
        return None
    counts["turns_out"] += len(turns)
    counts["records_out"] += 1
    conversations = []
    for number, (question, answer) in enumerate(turns):
        if number == 0:
            parts = [DEFAULT_IMAGE_TOKEN, question]
            question = "\n".join(parts if random.Random(f"{seed} {key}").random() < 0.5 else parts[::-1])
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": str(key), "image": row.get("image") or f"{key}.jpg", "conversations": conversations}
    domain = row.get("domain")
    if isinstance(domain, dict):
        record["domain"] = domain
    elif named := record_domains(row):
        record["domain"] = {name: name in named for name in dict.fromkeys((*FIGURE_DOMAINS, *named))}
    return record


def summarise(counts: Counter) -> str:
    """What the rules did, in lines."""
    lines = [
        f"{amount(counts['records_in'], 'dialogue')} with {amount(counts['turns_in'], 'turn')} → "
        f"{amount(counts['records_out'], 'record')} with {amount(counts['turns_out'], 'turn')}",
        f"  refused by the writing model: {counts['refused']}, left empty: {counts['records_left_empty']}",
        f"  turns without a partner: {counts['unpaired']}, empty after cleaning: {counts['empty']}, "
        f"cut off at --max-answer-tokens: {counts['cut_off']}",
        f"  {DEFAULT_IMAGE_TOKEN} written by the model and taken out: {counts['image_marks']}",
    ]
    verbs = {"drop": "turns dropped", "cut": "texts changed"}
    lines += [f"  rule {rule.name}: {counts[rule.name]} {verbs[rule.action]}" for rule in RULES]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
