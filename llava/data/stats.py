"""What an instruct file holds, as an image: root verbs and their objects, domains, lengths, turns.

    python -m llava.data.stats instruct.json --output-dir runs/stats

The verbs and objects come from TextBlob's tagger and chunker (a lexicon, no download), so they are approximate, as
such figures always are; how many sentences gave no pair is counted and shown.
"""

from pathlib import Path

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError, amount, one_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("input", help="training records (JSON, JSONL or Parquet)")
    parser.add_argument("--output-dir", required=True, help="gets stats.png, stats.html and stats.json")
    parser.add_argument("--max-records", type=int, help="number of records to read from the start")
    parser.add_overwrite()
    return parser


def main(argv=None) -> int:
    from llava.data.stats_count import collect
    from llava.data.stats_figure import write_figures
    from llava.manifests import sha256_of, versions
    from llava.records import write_json

    args = build_parser().parse_args(argv)
    if args.max_records is not None and args.max_records < 1:
        raise LlavaError(f"--max-records {args.max_records}: give 1 or more")
    stats = collect(args.input, args.max_records)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "stats.json", stats.as_json(), overwrite=args.overwrite)
    read = {"input": args.input, "sha256": sha256_of(Path(args.input)), "max_records": args.max_records}
    page = write_figures(stats, folder, Path(args.input).name, {**read, "versions": versions()})
    domains = ", ".join(f"{name} ({count})" for name, count in stats.domains.most_common())
    domains = one_line(domains, 500) or "none given"
    write_line(f"{amount(stats.records, 'record')}, {amount(sum(stats.turns), 'turn')}, domains: {domains}")
    for name, pairs in stats.verbs.items():
        top = ", ".join(f"{verb} {noun} ({count})" for (verb, noun), count in pairs.most_common(5))
        top = one_line(top, 500)
        write_line(f"{name}: {top or 'no verb with an object found'}")
    write_line(f"wrote {page}")
    return 0


if __name__ == "__main__":
    run(main)
