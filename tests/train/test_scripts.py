"""Each launch script is run with stand-ins for torchrun, deepspeed and python; its flags go through the parser."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from llava.train.arguments import boolean_flags, build_parser, read_flags
from llava.train.checks import check_values
from llava.train.legacy_flags import translate_flags

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NOT_TRAINING = {"reproduce_paper.sh"}
RECIPES = sorted(path for path in [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")] if path.name not in NOT_TRAINING)

STAND_IN = """#!/bin/sh
for arg in "$(basename "$0")" "$@"; do printf '%s\\0' "$arg" >> "$CALLS"; done
printf '\\n' >> "$CALLS"
"""


def calls_of(script: Path, folder: Path) -> list[list[str]]:
    """The command lines that a script would have run."""
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
    }
    subprocess.run(["sh", str(script)], cwd=SCRIPTS.parent, env=environment, check=True)
    lines = [line.strip("\0").split("\0") for line in log.read_text().split("\n") if line]
    return [line for line in lines if line[0] != "scontrol"]


def training_flags(call: list[str]) -> list[str] | None:
    for position, arg in enumerate(call):
        if re.fullmatch(r"llava/train/train(_mem)?\.py", arg):
            return call[position + 1 :]
    return None


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_flags_of_a_recipe_are_known_and_make_sense(script, tmp_path):
    flags = [found for call in calls_of(script, tmp_path) if (found := training_flags(call)) is not None]
    assert flags, "the script starts no training"
    for argv in flags:
        on_gpu, _ = translate_flags(argv, boolean_flags(), has_gpu=True)
        _, unknown = build_parser().parse_known_args(on_gpu)
        assert unknown == []
        arguments = read_flags([*without_deepspeed(argv), "--output_dir", str(tmp_path / "out")])
        check_values(arguments)
        assert arguments.training.num_train_epochs >= 1


def without_deepspeed(argv: list[str]) -> list[str]:
    """The flags but for --deepspeed, whose package need not be there; its file must be."""
    if "--deepspeed" not in argv:
        return argv
    position = argv.index("--deepspeed")
    config = json.loads((SCRIPTS.parent / argv[position + 1]).read_text())
    assert config["zero_optimization"]["stage"] in (2, 3)
    return argv[:position] + argv[position + 2 :]


def test_there_is_a_script_per_recipe():
    names = {path.name for path in RECIPES}
    assert names >= {
        "v1.0_stage1.sh",
        "v1.0_stage2.sh",
        "v1.0_vqa_rad.sh",
        "v1.0_slake.sh",
        "v1.0_pathvqa.sh",
        "biomedclip_stage2.sh",
        "mistral.sh",
        "babydoctor.sh",
        "multi_node.sh",
        "slurm.sbatch",
        "one_small_gpu.sh",
        "one_80gb_gpu.sh",
        "cpu.sh",
    }


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_scripts_are_posix_shell(script):
    subprocess.run(["sh", "-n", str(script)], check=True)
