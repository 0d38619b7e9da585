"""The table of recipes in docs/training.md: the launch scripts' flags through the dry run, predicted, not measured.

python scripts/recipe_table.py                        prints the table
python scripts/recipe_table.py --write docs/training.md   puts it between the file's two marks
"""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SCRIPTS = Path(__file__).resolve().parent
FIRST, LAST = "<!-- recipes -->", "<!-- end of recipes -->"
HEAD = """| recipe, predicted and **not measured** | script | GPUs | memory of each | MFU | hours |
|---|---|---|---|---|---|"""

STAND_IN = """#!/bin/sh
for arg in "$(basename "$0")" "$@"; do printf '%s\\0' "$arg" >> "$CALLS"; done
printf '\\n' >> "$CALLS"
"""


@dataclass(frozen=True)
class Recipe:
    """A row: the `number`th training that `script` starts, with `more` flags behind its own."""

    name: str
    script: str
    gpus: int
    gpu: str
    more: str = ""
    number: int = 0


PACKED = "--packing True --max_tokens_per_batch {} --torch_compile True"
RECIPES = [
    Recipe("LLaVA-Med v1.0, stage 1", "v1.0_stage1.sh", 8, "a100-40g"),
    Recipe("LLaVA-Med v1.0, stage 2", "v1.0_stage2.sh", 8, "a100-40g"),
    Recipe("LLaVA-Med v1.0, VQA-RAD, 15 epochs", "v1.0_vqa_rad.sh", 8, "a100-40g", "--num_train_epochs 15"),
    Recipe("stage 2, packs of 8192, compiled", "v1.0_stage2.sh", 8, "h100",
           PACKED.format(8192) + " --global_batch_size 16"),
    Recipe("stage 2 on 8 machines", "multi_node.sh", 64, "h100"),
    Recipe("Mistral, stage 1", "mistral.sh", 8, "h100"),
    Recipe("Mistral, stage 2, tower trained too", "mistral.sh", 8, "h100", number=1),
    Recipe("BabyDoctor 1, projector", "babydoctor.sh", 1, "a10"),
    Recipe("BabyDoctor 2, LoRA", "babydoctor.sh", 1, "a10", number=1),
    Recipe("BabyDoctor 3, QLoRA", "babydoctor.sh", 1, "a10", number=2),
    Recipe("BabyDoctor 3 in micro-batches of 2", "babydoctor.sh", 1, "a10",
           "--per_device_train_batch_size 2 --gradient_accumulation_steps 4", number=2),
    Recipe("VQA-RAD, 4-bit LoRA on a GPU of 24 GB", "one_small_gpu.sh", 1, "4090"),
    Recipe("stage 2 on one GPU of 80 GB, weights in bf16 alone", "one_80gb_gpu.sh", 1, "h100"),
    Recipe("stage 2 on one GPU of 141 GB, packs of 4096, compiled", "v1.0_stage2.sh", 1, "h200",
           PACKED.format(4096) + " --global_batch_size 4 --gradient_checkpointing False"),
]  # fmt: skip


def calls_of(script: Path, folder: Path) -> list[list[str]]:
    """The command lines that a script would run, found by running it with stand-ins (made in `folder`) for torchrun,
    deepspeed and python."""
    for name in ("torchrun", "deepspeed", "python", "python3", "scontrol"):
        path = folder / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
    # srun only starts the script that it is given.
    srun = folder / "srun"
    srun.write_text('#!/bin/sh\nshift\nexec sh "$@"\n')
    srun.chmod(0o755)
    log = folder / "calls"
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(log),
        "HEAD": "node0:29500",
        "NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "BESIDE": "",  # one line at a time
    }
    subprocess.run(["sh", str(script)], cwd=SCRIPTS.parent, env=environment, check=True)
    lines = [line.strip("\0").split("\0") for line in log.read_text().split("\n") if line]
    return [line for line in lines if line[0] != "scontrol"]


def training_flags(call: list[str]) -> list[str] | None:
    """The flags of a command line that starts a training; None of any other."""
    for position, arg in enumerate(call):
        if re.fullmatch(r"llava/train/train(_mem)?\.py", arg):
            return call[position + 1 :]
    return None


def flags_of(recipe: Recipe) -> list[str]:
    """The flags of a row's training."""
    with TemporaryDirectory() as folder:
        calls = [training_flags(call) for call in calls_of(SCRIPTS / recipe.script, Path(folder))]
    return [*[flags for flags in calls if flags is not None][recipe.number], *recipe.more.split()]


def row(recipe: Recipe) -> str:
    """A line of the table."""
    from llava.train.estimate.dry_run import dry_run
    from llava.train.estimate.report import short
    from llava.train.step.hardware import GPUS

    gpu = GPUS[recipe.gpu]
    found = dry_run(flags_of(recipe), gpu, recipe.gpus)
    memory = f"{found.peak_gb:.1f} GB" + ("" if found.fits else f", more than the {gpu.usable_gb:.1f} there are")
    more = f" `{recipe.more}`" if recipe.more else ""
    cells = [recipe.name, f"`scripts/{recipe.script}`{more}", f"{recipe.gpus} × {recipe.gpu}", memory]
    return f"| {' | '.join([*cells, f'{found.mfu:.0%}', short(found.hours)])} |"


def between_marks(text: str) -> str:
    """The table that stands in a document."""
    return text[text.index(FIRST) + len(FIRST) : text.index(LAST)].strip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a document, to replace its table")
    args = parser.parse_args()
    lines = [HEAD]
    for recipe in RECIPES:
        lines.append(row(recipe))
        print(lines[-1], file=sys.stderr, flush=True)
    table = "\n".join(lines)
    if args.write is None:
        print(table)
        return
    text = args.write.read_text(encoding="utf-8")
    args.write.write_text(text.replace(between_marks(text), table), encoding="utf-8")


if __name__ == "__main__":
    main()
