"""The commands that the published READMEs tell their readers to type, as found there, and what each is here.

python -m tests.drop_in.seed_commands    writes the table of docs/migration.md anew
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.documented_commands import ROOT

DOCUMENT = ROOT / "docs" / "migration.md"
FIRST, LAST = "<!-- published commands -->", "<!-- end of published commands -->"
TESTS = "tests/drop_in/test_seed_commands.py"
_STARTS = ("python ", "python3 ", "torchrun ", "sh ")


@dataclass(frozen=True)
class Published:
    """A command, known by words that it has (`words`, all of them); `name` is how the table calls it."""

    name: str
    words: tuple[str, ...]
    here: str
    test: str


COMMANDS = [
    Published(
        "`sh download_data.sh`",
        ("download_data.sh",),
        "the same; goes on where it broke off, checks checksums",
        "tests/data/test_download_data.py::test_all_files_whole_and_a_second_call_fetches_nothing",
    ),
    Published(
        "`python llava/instruct/instruct_generate.py`",
        ("instruct_generate.py",),
        "the same; key and address from the environment",
        "test_instruct_data_is_generated_and_cleaned",
    ),
    Published(
        "`python llava/instruct/instruct_postprocess.py`",
        ("instruct_postprocess.py",),
        "the same",
        "test_instruct_data_is_generated_and_cleaned",
    ),
    Published(
        "`python3 -m llava.model.apply_delta` (LLaVA)",
        ("apply_delta", "LLaVA-7b-delta-v0"),
        "the same; in a few hundred MB of memory",
        "test_deltas_are_added",
    ),
    Published(
        "`torchrun … llava/train/train_mem.py` (stage 1)",
        ("train_mem.py", "tune_mm_mlp_adapter"),
        "the same; `--fsdp`, `--tf32` are left out without a GPU, said",
        "test_the_three_trainings",
    ),
    Published(
        "`torchrun … llava/train/train_mem.py` (stage 2)",
        ("train_mem.py", "llama-med-vicuna-7b"),
        "the same; wandb without a login keeps the run on disk",
        "test_the_three_trainings",
    ),
    Published(
        "`python3 -m llava.model.apply_delta` (LLaVA-Med)",
        ("apply_delta", "llava_med"),
        "the same",
        "test_deltas_are_added",
    ),
    Published(
        "`python -m llava.serve.controller`",
        ("llava.serve.controller",),
        "the same; a secret is made that the other parts find by themselves",
        "test_controller_worker_message_and_page",
    ),
    Published(
        "`python -m llava.serve.model_worker … --num-gpus 2`",
        ("llava.serve.model_worker", "--num-gpus 2"),
        "the same; fewer GPUs are warned of",
        "test_controller_worker_message_and_page",
    ),
    Published(
        "`python -m llava.serve.model_worker`",
        ("llava.serve.model_worker",),
        'the same; prints "Uvicorn running on …"',
        "test_controller_worker_message_and_page",
    ),
    Published(
        "`python -m llava.serve.test_message`",
        ("llava.serve.test_message",),
        "the same",
        "test_controller_worker_message_and_page",
    ),
    Published(
        "`python -m llava.serve.gradio_web_server`",
        ("llava.serve.gradio_web_server",),
        "the same; on this machine alone unless `--host` says otherwise",
        "test_controller_worker_message_and_page",
    ),
    Published(
        "`python model_vqa.py`",
        ("model_vqa.py",),
        "the same, from the repository's root or `llava/eval`; greedy",
        "test_chat_answers_are_judged_and_summed_up",
    ),
    Published(
        "`python llava/eval/eval_multimodal_chat_gpt_score.py`",
        ("eval_multimodal_chat_gpt_score.py",),
        "the same; asks for the published deployment unless another is named",
        "test_chat_answers_are_judged_and_summed_up",
    ),
    Published(
        "`python summarize_gpt_review.py`",
        ("summarize_gpt_review.py",),
        "the same; sums up the newest scores below the folder",
        "test_chat_answers_are_judged_and_summed_up",
    ),
    Published(
        "`torchrun … llava/train/train_mem.py` (VQA)",
        ("train_mem.py", "vqa_rad"),
        "the same",
        "test_the_three_trainings",
    ),
    Published(
        "`python llava/eval/run_med_datasets_eval_batch.py`",
        ("run_med_datasets_eval_batch.py",),
        "the same; joins the parts itself",
        "test_vqa_is_answered_and_scored",
    ),
    Published(
        "`python llava/eval/model_vqa_med.py`",
        ("model_vqa_med.py",),
        "the same",
        "test_vqa_is_answered_and_scored",
    ),
    Published(
        "`python llava/eval/run_eval_batch.py`",
        ("run_eval_batch.py",),
        "the same; finds the questions by the answers' manifests",
        "test_vqa_is_answered_and_scored",
    ),
    Published(
        "`python llava/eval/run_eval.py`",
        ("run_eval.py",),
        "the same",
        "test_vqa_is_answered_and_scored",
    ),
]


def commands_of(folder: Path) -> list[str]:
    """Every command of this project in the published texts, each once, lines joined as the shell would."""
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            line = re.sub(r"\s+", " ", line).strip()
            if line.startswith(_STARTS) and re.search(r"llava|download_data|model_vqa|summarize", line):
                found.setdefault(line)
    return list(found)


def row_of(command: str) -> Published | None:
    """The first row whose words a command all has."""
    return next((row for row in COMMANDS if all(word in command for word in row.words)), None)


def table() -> str:
    """The rows in Markdown, in the order of the READMEs."""
    lines = ["| published | here | run as written by |", "|---|---|---|"]
    for row in COMMANDS:
        test = row.test if "::" in row.test else f"{TESTS}::{row.test}"
        lines.append(f"| {row.name} | {row.here} | `{test}` |")
    return "\n".join(lines)


def documented() -> str:
    """The table as the document has it."""
    return DOCUMENT.read_text(encoding="utf-8").split(FIRST)[1].split(LAST)[0].strip()


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(FIRST)
    DOCUMENT.write_text(f"{before}{FIRST}\n{table()}\n{LAST}{rest.split(LAST)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
