"""Each launch script is run with stand-ins for torchrun, deepspeed and python; its flags go through the parser."""

import json
import subprocess
from pathlib import Path

import pytest

from llava.train.arguments import boolean_flags, build_parser, read_flags
from llava.train.checks import check_values
from llava.train.legacy_flags import translate_flags
from scripts.recipe_table import FIRST, LAST, between_marks, calls_of, flags_of, row, training_flags
from scripts.recipe_table import RECIPES as ROWS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NOT_TRAINING = {"reproduce_paper.sh", "fetch_small_models.sh", "try_wheel.sh"}
RECIPES = sorted(path for path in [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")] if path.name not in NOT_TRAINING)


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


def table() -> list[str]:
    text = (SCRIPTS.parent / "docs/training.md").read_text(encoding="utf-8")
    return between_marks(text).splitlines()[2:]


def test_the_table_of_recipes_has_a_row_for_each():
    assert [line.split("|")[1].strip() for line in table()] == [recipe.name for recipe in ROWS]
    for line, recipe in zip(table(), ROWS, strict=True):
        assert f"| `scripts/{recipe.script}`" in line and f"| {recipe.gpus} × {recipe.gpu} |" in line
        assert "--output_dir" in flags_of(recipe)


@pytest.mark.long
def test_a_row_of_the_table_is_what_the_script_prints():
    place = [recipe.script for recipe in ROWS].index("one_small_gpu.sh")
    assert row(ROWS[place]) == table()[place]


def test_the_table_is_put_between_its_marks(tmp_path, monkeypatch):
    from scripts import recipe_table

    document = tmp_path / "document.md"
    document.write_text(f"before\n{FIRST}\n| old |\n{LAST}\nafter\n")
    monkeypatch.setattr(recipe_table, "row", lambda recipe: f"| {recipe.name} |")
    monkeypatch.setattr("sys.argv", ["recipe_table.py", "--write", str(document)])
    recipe_table.main()
    lines = document.read_text().splitlines()
    assert lines[:2] == ["before", FIRST] and lines[-2:] == [LAST, "after"]
    assert "| old |" not in lines and lines[4] == f"| {ROWS[0].name} |"
