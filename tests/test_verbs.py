"""`llava-med VERB`: every command module has a verb, help imports none of them, mistakes are one line."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava.__main__ import VERBS, find_module, main
from llava.constants import RESEARCH_NOTICE
from llava.errors import LlavaError
from tests.test_flags import command_modules

KNOWN = {verb: module for group in VERBS.values() for verb, module in group.items()}
WITHOUT_VERB = {
    "llava.__main__",
    "llava.train.train_mem",  # `train --attn_implementation`
    "llava.demo.language_model",  # steps of the demo
    "llava.demo.tokenizer",
    "llava.demo.tower",
}


def test_every_command_has_a_verb():
    assert sorted(KNOWN.values()) == sorted(set(command_modules()) - WITHOUT_VERB)
    assert len(KNOWN) == sum(map(len, VERBS.values()))


def run_script(*words, code="from llava.__main__ import script; script()"):
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_help_lists_verbs_by_task_and_imports_no_command():
    code = """
import atexit, sys
from llava.__main__ import script
heavy = {"torch", "numpy", "transformers", "pydantic", "fastapi", "aiohttp"}
atexit.register(lambda: print("imported:", sorted(heavy & set(sys.modules))))
script()
"""
    done = run_script("--help", code=code)
    assert done.returncode == 0 and "imported: []" in done.stdout
    places = [done.stdout.index(f"{task}:") for task in VERBS]
    assert places == sorted(places) and RESEARCH_NOTICE in done.stdout
    for verb in KNOWN:
        assert any(line.split()[:1] == [verb] and len(line.split()) > 3 for line in done.stdout.splitlines()), verb


@pytest.mark.parametrize("verb", ["score", "convert", "export"])
def test_a_verb_takes_its_commands_flags(verb):
    done = run_script(verb, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: llava-med {verb} ") and "--debug" in done.stdout
    assert f"example:\n  llava-med {verb} " in done.stdout and "python -m" not in done.stdout.split("example:")[1]
    done = run_script(verb, "--no-such-flag")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_verb_does_what_its_module_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava-med"])
    (tmp_path / "records.json").write_text('[{"id": "7", "conversations": []}]')
    assert main(["validate", str(tmp_path / "records.json"), "--report", str(tmp_path / "report.json")]) == 1
    assert "7" in capsys.readouterr().out and (tmp_path / "report.json").is_file()


def test_the_version_is_said():
    done = run_script("--version")
    assert done.returncode == 0 and done.stdout == f"llava-med {llava.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "meant"),
    [
        *[(verb, "answer or score") for verb in ("eval", "evaluate")],
        *[(verb, "train") for verb in ("finetune", "fine_tune")],
        *[(verb, "ask or answer") for verb in ("predict", "infer")],
    ],
)
def test_verbs_of_others_lead_to_ours(verb, meant):
    with pytest.raises(LlavaError, match=rf"no verb '{verb}'; did you mean {meant}\?$"):
        find_module(verb)


def test_mistakes_are_one_line():
    done = run_script("chta")
    assert done.returncode == 2 and done.stderr == "error: llava-med has no verb 'chta'; did you mean chat?\n"
    done = run_script()
    assert done.returncode == 2 and "VERB" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(LlavaError, match="llava-med --help lists them"):
        find_module("xyzzy")
    assert run_script("validate", "/nowhere.json").returncode == 2


def test_messages_name_the_verb_that_a_user_types():
    """Docstrings name modules: of a command's example the verb takes the place as it is shown."""
    verbs = {module.removesuffix(".__main__"): verb for verb, module in KNOWN.items()}
    found = []
    for path in sorted(Path(llava.__file__).parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for text in (node for node in texts if id(node) not in alone):
            modules = re.findall(r"python -m (llava\.[a-z_.]*[a-z])", text.value)
            found += [(path.name, text.lineno, verbs[name]) for name in modules if name in verbs]
    assert found == []
