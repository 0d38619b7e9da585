"""Commands as documents write them: found in text, told apart by module, their flags held against the real parsers."""

import importlib
import re
import shlex
from pathlib import Path

from llava.__main__ import find_module

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = {"llava-med", "python", "python3", "torchrun", "deepspeed", "sh", "PYTHONPATH=."}
TRAIN = {"llava.train.train", "llava.train.train_mem"}


def commands_in(text: str) -> list[list[str]]:
    """Words of every command that starts with one of the launchers, continuation lines joined."""
    text = re.sub(r"\\\s*\n", " ", text)
    found = []
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        first = line.split(" ", 1)[0]
        if first not in LAUNCHERS or ("llava" not in line and "model_vqa.py" not in line and "summarize" not in line):
            continue
        line = re.split(r"\s+(?:#|\|)\s*", line)[0].replace("…", "").replace("...", "")
        try:
            words = shlex.split(line.replace("&gt;", ">"))
        except ValueError:
            continue
        found.append(words)
    return found


def module_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, words behind it) of a command of this project, None for another."""
    if words[0] == "llava-med":
        module = find_module(words[1]).removesuffix(".__main__") if not words[1].startswith("-") else "llava"
        return module, words[2:]
    for position, word in enumerate(words):
        if word == "-m" and words[position + 1].startswith("llava"):
            return words[position + 1], words[position + 2 :]
        if word.endswith(".py"):
            path = word if word.startswith(("llava/", "./llava/", "benchmarks/")) else f"llava/eval/{Path(word).name}"
            path = path.removeprefix("./")
            if path.startswith("benchmarks/"):
                return None
            return path.removesuffix(".py").replace("/", "."), words[position + 1 :]
    return None


def unknown_flags(module: str, words: list[str]) -> list[str]:
    """The flags among `words` that the module's command doesn't know."""
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    if module in TRAIN:
        from llava.train.arguments import boolean_flags, build_parser
        from llava.train.legacy_flags import translate_flags

        translated, _ = translate_flags(words, boolean_flags(), has_gpu=True)
        flags = [word.split("=")[0] for word in translated if word.startswith("--")]
        parser = build_parser()
    else:
        parser = importlib.import_module(module if not _is_package(module) else f"{module}.__main__").build_parser()
        for word in words:
            subparsers = getattr(parser, "_subparsers", None)
            choices = subparsers._group_actions[0].choices if subparsers else {}
            if word in choices:
                parser = choices[word]
    known = {name.replace("_", "-") for name in parser._option_string_actions}
    if module == "llava.train.estimate_memory":  # beside its own flags it takes the recipe's
        flags = [flag for flag in flags if flag.replace("_", "-") not in known]
        return unknown_flags("llava.train.train", [word for word in words if word.split("=")[0] in flags])
    return [flag for flag in flags if flag.replace("_", "-") not in known]


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()
