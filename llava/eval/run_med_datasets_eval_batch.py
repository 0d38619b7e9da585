"""Answer LLaVA-Med questions with several processes at once, one per GPU (or group of CPU cores).

Each process answers a part of the questions into a file of its own; the parts are joined in the order of the
questions. Killed and started again, it goes on where each part was.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.commandline import EXIT_BAD_INPUT, ArgumentParser, existing_file, run, write_line
from llava.errors import LlavaError
from llava.eval.answers.command import add_answer_flags, add_api_answer_flags, check_flags


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_answer_flags(parser)
    add_api_answer_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    check_flags(args)
    from llava.eval.answers.ablation import QuestionImages
    from llava.eval.answers.questions import read_med_questions

    questions = read_med_questions(existing_file(args.question_file, "--question-file"))
    QuestionImages(args.image_folder, questions)  # a missing image is found before any process starts
    answers_file = Path(args.answers_file)
    parts = [part_path(answers_file, index, args.num_chunks) for index in range(args.num_chunks)]
    _run_parts(argv, parts)
    join_parts(parts, answers_file, [question.id for question in questions])
    write_line(str(answers_file))


def part_path(answers_file: Path, index: int, parts: int) -> Path:
    """Where part `index` of `parts` is answered."""
    return answers_file.with_name(f"{answers_file.stem}-chunk{index}-of-{parts}{answers_file.suffix}")


def join_parts(parts: Sequence[Path], answers_file: Path, order: Sequence) -> None:
    """Put the parts together under the final name, with a manifest, and remove them.

    Raises:
        LlavaError: an answer is missing, doubled or to a question that wasn't asked.
    """
    from llava.eval.answers.manifest import manifest_path, read_manifest, write_manifest
    from llava.records import read_records, write_records

    answers, manifests = [], []
    for part in parts:
        answers += read_records(part) if part.stat().st_size else []
        manifests.append(read_manifest(part) or {})
    got = [answer["question_id"] for answer in answers]
    if got != list(order):
        raise LlavaError(
            f"the {len(parts)} parts of {answers_file} hold {len(got)} answers ({len(set(map(str, got)))} different) "
            f"to {len(order)} questions, or not in their order; start anew with --overwrite"
        )
    write_records(answers_file, answers)
    first = next((manifest for manifest in manifests if manifest.get("model_id")), manifests[0])
    own = {"file", "sha256", "versions", "written", "fingerprint", "chunk", "counts", "seconds", "asked"}
    counts: dict[str, int] = {}
    for manifest in manifests:
        for name, count in manifest.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + count
    counts.pop("images", None)  # parts share images
    write_manifest(
        answers_file,
        **{key: value for key, value in first.items() if key not in own},
        asked=len(order),
        processes=len(parts),
        counts=counts,
        seconds=max((manifest.get("seconds", 0) for manifest in manifests), default=0),
    )
    for part in parts:
        part.unlink()
        manifest_path(part).unlink(missing_ok=True)


def _run_parts(argv: Sequence[str], parts: Sequence[Path]) -> None:
    """One process per part, all at once; the first that fails stops the others."""
    gpus = _gpus()
    processes = []
    try:
        for index, part in enumerate(parts):
            flags = [*argv, "--answers-file", str(part), "--chunk-idx", str(index)]
            command = [sys.executable, "-m", "llava.eval.model_vqa_med", *flags]
            environment = _environment(index, len(parts), gpus)
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        codes = _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    failed = [index for index, code in enumerate(codes) if code not in (0, None)]
    if failed:
        index = failed[0]
        if codes[index] == EXIT_BAD_INPUT:
            raise LlavaError(f"part {index} of {len(parts)} stopped at the error above; answers so far are kept")
        raise LlavaError(f"part {index} of {len(parts)} ended with code {codes[index]}; run again to go on")


def _wait(processes) -> list[int | None]:
    """Exit codes, once all have ended well or one hasn't (None: still running)."""
    import time

    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)


def _gpus() -> list[str]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _environment(index: int, parts: int, gpus: Sequence[str]) -> dict[str, str]:
    # One progress bar below the other; without GPUs the cores are shared out.
    environment = os.environ | {"TQDM_POSITION": str(index)}
    if gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // parts))} | environment


if __name__ == "__main__":
    run(main)
