"""Check a file of training records before hours of training depend on it.

    python -m llava.data.validate train.json --image-folder images --tokenizer LLM --template v1 --fix train_clean.json

Every record is looked at: its form; with --image-folder its images, opened with all cores; with --tokenizer its
length and what is left to learn after truncation. Faults make the exit code 1, notes don't. --fix writes a copy that
has none: what can be put right is, other faulty records are left out.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.data.sample_form import SampleForm, add_form_flags, form_of
from llava.errors import LlavaError, amount, one_line
from llava.processes import process_pool
from llava.records import Record, iter_records, write_json, write_records, written_together
from llava.tokenization.image_tokens import SCHEMES

EXIT_FAULTS = 1
_CHUNK = 128
_CHUNKS_AHEAD = 4

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """What to check apart from the form."""

    image_folder: Path | None = None
    tokenizer: Path | None = None
    form: SampleForm = field(default_factory=SampleForm)
    max_length: int = 2048

    @property
    def is_heavy(self) -> bool:
        """Whether a record costs enough to be handed to another process."""
        return self.image_folder is not None or self.tokenizer is not None


@dataclass
class Report:
    """Counts over one file, and the first cases of each kind."""

    keep_first: int = 5
    records: int = 0
    faulty: int = 0
    repaired: int = 0
    kinds: Counter = field(default_factory=Counter)
    first: dict[str, list[dict]] = field(default_factory=dict)
    lengths: Counter = field(default_factory=Counter)
    _ids: set[int] = field(default_factory=set)

    def add(self, record: Record, findings: list) -> bool:
        """Count a record; returns whether it is faulty."""
        number, self.records = self.records, self.records + 1
        # Only hashes are kept: a million ids as text would take several times as much.
        known, name = len(self._ids), record.get("id")
        if name is not None:
            self._ids.add(hash(str(name)))  # as text, by which answers are joined; -1 and -2 have one hash
            if len(self._ids) == known:
                findings = [*findings, ("duplicate_id", "")]
        if not findings:
            return False
        from llava.data.record_checks import FAULTS

        kinds = dict(reversed(findings))
        self.kinds.update(kinds.keys())
        for kind, detail in kinds.items():
            first = self.first.setdefault(kind, [])
            if len(first) < self.keep_first:
                first.append({"record": number, "id": name, "detail": detail})
        is_faulty = not kinds.keys().isdisjoint(FAULTS)
        self.faulty += is_faulty
        return is_faulty

    def as_json(self) -> dict[str, Any]:
        from llava.data.record_checks import FAULTS, NOTES

        def section(meanings: dict[str, str]) -> dict:
            return {
                kind: {"meaning": meaning, "records": self.kinds[kind], "first": self.first[kind]}
                for kind, meaning in meanings.items()
                if self.kinds[kind]
            }

        report = {
            "records": self.records,
            "faulty": self.faulty,
            "repaired": self.repaired,
            "faults": section(FAULTS),
            "notes": section(NOTES),
        }
        if self.lengths:
            report["positions"] = _spread(self.lengths)
        return report


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("input", help="JSON, JSONL or Parquet")
    parser.add_argument("--image-folder", help="open every image; without it images aren't looked at")
    parser.add_argument("--tokenizer", help="a model folder; tokenise every record as training would")
    add_form_flags(parser)
    parser.add_argument("--model-max-length", type=int, default=2048, help="positions, images included")
    parser.add_bool(
        "--mm-use-im-start-end", default=None, help="<im_start> and <im_end> stand around images; default: as the model"
    )
    parser.add_argument("--image-tokens", choices=SCHEMES, help="patch: v1.0; default: as the model, else placeholder")
    parser.add_argument("--fix", metavar="PATH", help="write a copy without faults (.json, .jsonl or .parquet)")
    parser.add_argument("--report", metavar="PATH", help="write the report as JSON")
    parser.add_argument("--first", type=int, default=5, help="cases to show of each kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes for images and tokens")
    parser.add_overwrite()
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    path = existing_file(args.input, "record file")
    options = _options(args)
    check_outputs(args, [path], "fix", "report")
    report = Report(args.first)
    with written_together():
        if args.fix:
            write_records(args.fix, validate(path, report, options, args.workers, fix=True), overwrite=args.overwrite)
        else:
            deque(validate(path, report, options, args.workers), maxlen=0)
        if not report.records:
            raise LlavaError(f"{path}: there are no records in it")
        content = {"file": str(path), **report.as_json()}
        if options.tokenizer:
            content["tokenised_with"] = str(options.form)
        if args.report:
            write_json(args.report, content, overwrite=args.overwrite)
    _show(content, args.fix)
    return EXIT_FAULTS if report.faulty else 0


def validate(
    path: Path, report: Report, options: Options | None = None, workers: int = 1, fix: bool = False
) -> Iterator[Record]:
    """Check every record of a file and count in `report`; yields the good ones, and with `fix` the repaired ones.

    Memory doesn't grow with the file but for 40 bytes per id.
    """
    from llava.bars import tqdm
    from llava.data.record_checks import repair

    options = options or Options()
    records = tqdm(iter_records(path), unit=" records", disable=None, mininterval=0.5)
    for record, findings, length in _checked(records, options, workers):
        if length is not None:
            report.lengths[length] += 1
        is_faulty = report.add(record, findings)
        if not is_faulty and not (fix and findings):
            yield record
        elif fix:
            fixed = repair(record, findings)
            if fixed is not None:
                report.repaired += is_faulty
                yield fixed


Checked = tuple[Record, list, int | None]
"""(record, findings, positions if tokenised)."""


def _checked(records: Iterable[Record], options: Options, workers: int) -> Iterator[Checked]:
    from llava.data.record_checks import check_form

    if not options.is_heavy:
        for record in records:
            yield record, check_form(record), None
        return
    records = iter(records)
    chunks = iter(lambda: list(islice(records, _CHUNK)), [])
    if workers <= 1:
        check = _make_checker(options)
        for chunk in chunks:
            yield from zip(chunk, *zip(*check(chunk)), strict=True)
        return
    with process_pool(workers, _start_worker, (options,)) as pool:
        # A window of chunks under way: results come in order, and memory stays small.
        pending: deque = deque()
        for chunk in chunks:
            pending.append((chunk, pool.submit(_check_chunk, chunk)))
            if len(pending) > workers * _CHUNKS_AHEAD:
                yield from _unpack(*pending.popleft())
        while pending:
            yield from _unpack(*pending.popleft())


def _unpack(chunk: list[Record], future) -> Iterator[Checked]:
    for record, (findings, length) in zip(chunk, future.result(), strict=True):
        yield record, findings, length


_worker_check: Callable[[list[Record]], list]


def _start_worker(options: Options) -> None:
    global _worker_check
    _worker_check = _make_checker(options)


def _check_chunk(chunk: list[Record]) -> list:
    return _worker_check(chunk)


def _make_checker(options: Options) -> Callable[[list[Record]], list]:
    """A function from records to (findings, positions or None) of each."""
    from llava.data.record_checks import FAULTS, ImageCheck, LengthCheck, check_form

    images = ImageCheck(options.image_folder) if options.image_folder else None
    lengths = None
    if options.tokenizer:
        from llava.model.tokenizer import load_tokenizer

        tokenizer, form = load_tokenizer(options.tokenizer), options.form
        form.image_tokens.check(tokenizer)
        lengths = LengthCheck(tokenizer, form.template, form.image_tokens, options.max_length, form.features_per_image)

    def check(records: list[Record]) -> list:
        results = []
        for record in records:
            findings = check_form(record)
            if images is not None:
                findings += images(record)
            length = None
            if lengths is not None and not any(finding.kind in FAULTS for finding in findings):
                seen = len(lengths.lengths)
                findings += lengths(record)
                length = lengths.lengths.pop() if len(lengths.lengths) > seen else None
            results.append((findings, length))
        return results

    return check


def _options(args) -> Options:
    for name in ("model_max_length", "workers"):
        if getattr(args, name) < 1:
            raise LlavaError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    options = Options(
        image_folder=existing_dir(args.image_folder, "--image-folder") if args.image_folder else None,
        max_length=args.model_max_length,
    )
    if not args.tokenizer:
        for name in ("template", "features_per_image", "mm_use_im_start_end", "image_tokens"):
            if getattr(args, name) is not None:
                raise LlavaError(f"--{name.replace('_', '-')} is about lengths: give --tokenizer too, or leave it out")
        return options
    folder = existing_dir(args.tokenizer, "--tokenizer")
    form = form_of(folder, args.template, args.features_per_image, args.image_tokens, args.mm_use_im_start_end)
    return replace(options, tokenizer=folder, form=form)


def _spread(lengths: Counter) -> dict[str, float]:
    """Smallest, quantiles, largest and mean of a histogram of lengths."""
    total, ordered = sum(lengths.values()), sorted(lengths.items())

    def quantile(share: float) -> int:
        seen = 0
        for length, count in ordered:
            seen += count
            if seen >= share * total:
                return length
        return ordered[-1][0]

    mean = sum(length * count for length, count in ordered) / total
    names = {"median": 0.5, "90 %": 0.9, "99 %": 0.99}
    return {
        "smallest": ordered[0][0],
        **{name: quantile(share) for name, share in names.items()},
        "largest": ordered[-1][0],
        "mean": round(mean, 1),
    }


def _show(report: dict[str, Any], fixed: str | None) -> None:
    write_line(f"{report['file']}: {amount(report['records'], 'record')}, {report['faulty']:,} faulty")
    for title in ("faults", "notes"):
        for kind in report[title].values():
            write_line(f"  {title[:-1]}: {amount(kind['records'], 'record')}: {kind['meaning']}")
            for case in kind["first"] if title == "faults" else ():
                detail = f": {one_line(case['detail'], 300)}" if case["detail"] else ""
                write_line(f"    record {case['record']} (id {one_line(repr(case['id']), 100)}){detail}")
    if "positions" in report:
        write_line(f"  tokenised with {report['tokenised_with']}")
        write_line("  positions: " + ", ".join(f"{name} {value}" for name, value in report["positions"].items()))
    if fixed:
        left_out = report["faulty"] - report["repaired"]
        written = report["records"] - left_out
        write_line(f"{fixed}: {amount(written, 'record')}; {report['repaired']:,} put right, {left_out:,} left out")


if __name__ == "__main__":
    run(main)
