"""Have a language model judge chat answers against the stored reference answers, one row a question.

Every reply is on disk at once; killed, the same command asks for the rest. --dry-run shows a prompt and the cost.

python -m llava.eval.eval_multimodal_chat_gpt_score --question-file llava_med_eval_qa50_qa.jsonl \\
    --answers-file answers.jsonl --scores-file scores.jsonl --api-model gpt-4o
"""

import logging
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, run, write_line
from llava.errors import LlavaError, amount
from llava.openai_api import add_api_flags

logger = logging.getLogger(__name__)

DEFAULT_SCORES = "gpt4-eval-for-individual-answers.jsonl"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--question-file",
        "--question_input_path",
        dest="question_file",
        required=True,
        help="questions with the reference answers",
    )
    parser.add_argument(
        "--answers-file", "--input_path", dest="answers_file", required=True, help="the model's answers"
    )
    parser.add_argument(
        "--scores-file",
        "--output_path",
        dest="scores_file",
        default=DEFAULT_SCORES,
        help="where judgements go, a line each",
    )
    parser.add_bool("--swap", help="ask in both orders, and report how far they agree")
    parser.add_overwrite()
    add_api_flags(parser)
    return parser


def main(argv=None) -> int:
    from llava.eval.chat.judge import build_job, repair_job
    from llava.manifests import fingerprint_of, sha256_of, to_be_made, write_manifest
    from llava.openai_api import print_dry_run, run_jobs, settings_from_args
    from llava.resumable import ResumableJsonl

    args = build_parser().parse_args(argv)
    check_outputs(args, [args.question_file, args.answers_file], "scores_file")
    settings = settings_from_args(args)
    pairs = join_by_id(args.question_file, args.answers_file)
    orders = (False, True) if args.swap else (False,)
    jobs = [build_job(question, answer, swapped) for question, answer in pairs for swapped in orders]
    if args.dry_run:
        print_dry_run(jobs, settings)
        return 0
    about = {
        "questions_sha256": sha256_of(Path(args.question_file)),
        "answers_sha256": sha256_of(Path(args.answers_file)),
        "both_orders": args.swap,
        "judge_model": settings.model,
    }
    scores = Path(args.scores_file)
    if not to_be_made(scores, about, overwrite=args.overwrite):
        write_line(f"{scores} is complete already; --overwrite judges again")
        return 0
    pair_of = {build_job(*pair, swapped).key: (*pair, swapped) for pair in pairs for swapped in orders}

    def to_record(job, result):
        return score_row(*pair_of[job.key], result)

    with ResumableJsonl(scores, key="judgement") as output:
        summary = run_jobs(jobs, settings, output, to_record, follow_up=repair_job, progress="judging")
        write_line(str(summary))
        if not summary.complete:
            write_line(f"not complete: {output.part} holds what was done; run the command again to go on")
            return 1
        output.finish([job.key for job in jobs], keep_part=True)
    write_manifest(scores, **about, fingerprint=fingerprint_of(about))
    write_line(f"wrote {args.scores_file}; sum it up with: llava-med judge-summary")
    return 0


def join_by_id(question_file: str, answers_file: str) -> list[tuple[dict, dict]]:
    """(question, answer) pairs in the order of the questions.

    Raises:
        LlavaError: questions without an answer, answers twice or to unknown questions; the ids are named.
    """
    questions = _by_id(question_file, ("text", "gpt4_answer"))
    answers = _by_id(answers_file, ("text",))
    missing = [key for key in questions if key not in answers]
    unknown = [key for key in answers if key not in questions]
    if missing or unknown:
        raise LlavaError(
            f"{answers_file}: {amount(len(missing), 'question')} of {question_file} without an answer "
            f"(first: {missing[:3]}), "
            f"{amount(len(unknown), 'answer')} to no question (first: {unknown[:3]})"
        )
    return [(question, answers[key]) for key, question in questions.items()]


def score_row(question: dict, answer: dict, swapped: bool, result) -> dict:
    """The line of the scores file: the question, both answers, the judge's reply and the scores read from it.

    `scores` is (reference's, model's) whatever the order of asking; null where the reply can't be read.
    """
    from llava.eval.chat.judge import are_read, judgement_key, read_scores

    scores = read_scores(result.text)
    kept = ("question_id", "type", "domain", "fig_label", "fig_caption", "gpt4_answer")
    return {
        "judgement": judgement_key(question["question_id"], swapped),
        **{name: question.get(name) for name in kept},
        "question": question["text"],
        "answer": answer["text"],
        "model_id": answer.get("model_id"),
        "swapped": swapped,
        "gpt_eval": result.text,
        "scores": list(scores[::-1] if swapped else scores) if are_read(scores) else None,
        "refused": result.refused,
        "judge_model": result.model,
    }


def _by_id(path: str, needed: tuple[str, ...]) -> dict:
    from llava.record_content import as_text
    from llava.records import iter_records

    rows: dict = {}
    for index, row in enumerate(iter_records(path)):
        lacking = [name for name in ("question_id", *needed) if row.get(name) is None]
        if lacking:
            raise LlavaError(f"{path} record {index}: no {' and no '.join(lacking)}")
        if parts := [name for name in needed if isinstance(row[name], (list, dict))]:
            kind = type(row[parts[0]]).__name__
            raise LlavaError(f'{path} record {index}: "{parts[0]}" is a {kind}; expected a text')
        key = str(row["question_id"])  # one writer's 17 is another's "17"
        if key in rows:
            raise LlavaError(f"{path} record {index}: question_id {row['question_id']!r} stands there twice")
        rows[key] = {**row, **{name: as_text(row[name]) for name in needed}}
    if not rows:
        raise LlavaError(f"{path}: holds no rows")
    return rows


if __name__ == "__main__":
    run(main)
