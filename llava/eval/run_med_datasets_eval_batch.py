"""Answer LLaVA-Med questions with several processes at once, one per GPU (or group of CPU cores).

Each process answers a part of the questions into a file of its own; the last one joins the parts in the order of the
questions. Killed and started again, it goes on where each part was. On several machines, `--shard i/n` (or torchrun)
says which part each of them has, and the last one of all joins them.

python -m llava.eval.run_med_datasets_eval_batch --num-chunks 8 --model-path CHECKPOINT --question-file test.json \\
    --image-folder images --answers-file answers.jsonl
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.commandline import EXIT_BAD_INPUT, ArgumentParser, existing_file, run, write_line
from llava.errors import LlavaError
from llava.eval.answers.command import add_answer_flags, add_api_answer_flags, answer_file, check_flags

if TYPE_CHECKING:
    from llava.eval.answers.shards import Shard


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
    from llava.eval.answers.shards import Shard, discard, shard_of
    from llava.manifests import manifest_path

    shards = (shard_of(args) or Shard(0, 1)).split(args.num_chunks)
    questions = read_med_questions(existing_file(args.question_file, "--question-file"))
    QuestionImages(args.image_folder, questions)  # a missing image is found before any process starts
    answers_file = Path(args.answers_file)
    if args.dry_run and (args.api_base or args.azure_endpoint):  # here, of all questions: nobody reads what parts print
        args.chunk_idx, args.num_chunks = 0, 1
        answer_file(args, questions, questions)
        return
    if args.overwrite:
        discard(answers_file, shards)
    _run_parts(argv, shards)
    if answers_file.is_file() and manifest_path(answers_file).is_file():
        write_line(str(answers_file))


def _run_parts(argv: Sequence[str], shards: Sequence["Shard"]) -> None:
    """One process per part, all at once; the first that fails stops the others. The last one joins the parts."""
    gpus = _gpus()
    processes = []
    try:
        for place, shard in enumerate(shards):
            flags = [*argv, "--shard", str(shard), "--num-chunks", "1", "--overwrite", "false"]
            command = [sys.executable, "-m", "llava.eval.model_vqa_med", *flags]
            environment = _environment(place, len(shards), gpus)
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        codes = _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    failed = [place for place, code in enumerate(codes) if code not in (0, None)]
    if failed:
        place = failed[0]
        part = f"part {shards[place].index} of {shards[place].count}"
        if codes[place] == EXIT_BAD_INPUT:
            raise LlavaError(f"{part} stopped at the error above; answers so far are kept")
        raise LlavaError(f"{part} ended with code {codes[place]}; run again to go on")


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
    # torchrun starts several such commands on a machine, and says in LOCAL_RANK which one this is.
    first = parts * int(environment.pop("LOCAL_RANK", 0))
    if gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": gpus[(first + index) % len(gpus)]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // parts))} | environment


if __name__ == "__main__":
    run(main)
