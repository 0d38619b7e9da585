"""Write visual conversations from figure captions with a language model that never sees the images.

Every reply is on disk at once; killed, the same command asks for the rest. --dry-run shows a prompt and the cost.

python -m llava.instruct.instruct_generate --input_path captions.json --output_path generated.jsonl \\
    --max-size 60000 --use_inline_mentions True --api-model gpt-4o
"""

import logging
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, run, write_line
from llava.errors import LlavaError

logger = logging.getLogger(__name__)

ROUNDS = 3  # failed items are asked again after the rest, as in the reference


def build_parser() -> ArgumentParser:
    from llava.openai_api import add_api_flags

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input_path", required=True, help="figure captions (JSON, JSONL or Parquet)")
    parser.add_argument("--output_path", required=True, help="JSONL: one line a figure, resumed if interrupted")
    parser.add_bool("--use_inline_mentions", help="also give the sentences of the article that mention the figure")
    parser.add_argument("--max-size", type=int, help="figures at most, from the domains in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of figures")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the language model")
    parser.add_argument("--max-answer-tokens", type=int, default=1000, help="longest reply")
    parser.add_argument("--batch_size", type=int, help="old name of --concurrency")
    parser.add_overwrite()
    add_api_flags(parser)
    return parser


def main(argv=None) -> int:
    from llava.instruct.figures import in_turn, read_figures
    from llava.instruct.prompts import build_messages
    from llava.manifests import fingerprint_of, sha256_of, to_be_made, write_manifest
    from llava.openai_api import ChatJob, print_dry_run, run_jobs, settings_from_args
    from llava.resumable import ResumableJsonl

    args = build_parser().parse_args(argv)
    check_outputs(args, [args.input_path], "output_path")
    if args.batch_size is not None:
        args.concurrency = args.batch_size
    if args.max_size is not None and args.max_size < 1:
        raise LlavaError(f"--max-size is {args.max_size}; give 1 or more, or leave it out for all figures")
    if args.max_answer_tokens < 1:
        raise LlavaError(f"--max-answer-tokens is {args.max_answer_tokens}; give 1 or more")
    if not args.temperature >= 0:
        raise LlavaError(f"--temperature is {args.temperature}; give 0 or more")
    settings = settings_from_args(args)
    figures = in_turn(read_figures(args.input_path), args.max_size, args.seed)
    jobs = [
        ChatJob(
            figure.key,
            build_messages(figure, args.use_inline_mentions),
            temperature=args.temperature,
            max_tokens=args.max_answer_tokens,
        )
        for figure in figures
    ]
    if args.dry_run:
        print_dry_run(jobs, settings)
        return 0
    about = {
        "figures_sha256": sha256_of(Path(args.input_path)),
        "figures": len(figures),
        "use_inline_mentions": args.use_inline_mentions,
        "seed": args.seed,
        "temperature": args.temperature,
        "max_answer_tokens": args.max_answer_tokens,
        "model": settings.model,
    }
    generated = Path(args.output_path)
    if not to_be_made(generated, about, overwrite=args.overwrite):
        write_line(f"{generated} is complete already; --overwrite asks again")
        return 0
    by_key = {figure.key: figure for figure in figures}

    def to_record(job, result):
        figure = by_key[job.key]
        return {
            "pair_id": figure.key,
            "image": figure.image or f"{figure.key}.jpg",
            "domain": list(figure.domains),
            "fig_label": figure.label,
            "fig_caption": figure.caption,
            "result": result.text,
            "finish_reason": result.finish_reason,
            "refused": result.refused,
            "model": result.model,
        }

    with ResumableJsonl(generated, key="pair_id") as output:
        for number in range(ROUNDS):
            summary = run_jobs(jobs, settings, output, to_record, progress="writing conversations")
            logger.info("round %d: %s", number + 1, summary)
            if not summary.failed:
                break
        write_line(str(summary))
        if not summary.complete:
            write_line(f"not complete: {output.part} holds what was done; run the command again to go on")
            return 1
        output.finish([job.key for job in jobs], keep_part=True)
    write_manifest(generated, **about, fingerprint=fingerprint_of(about))
    write_line(f"wrote {args.output_path}")
    return 0


if __name__ == "__main__":
    run(main)
