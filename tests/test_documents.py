"""Documents are true: they name modules, flags and files that exist, and their links lead somewhere."""

import ast
import importlib
import json
import re
from functools import cache
from itertools import pairwise

import pytest

from tests.documented_commands import ROOT, commands_in, module_and_flags, unknown_flags

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")])


def cases(paths):
    for path in paths:
        for words in commands_in(path.read_text(encoding="utf-8", errors="replace")):
            found = module_and_flags(words)
            if found:
                yield pytest.param(*found, id=f"{path.stem}:{found[0]}")


@pytest.mark.parametrize(("module", "words"), cases(DOCUMENTS))
def test_commands_of_the_documents(module, words):
    assert unknown_flags(module, words) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_in_backticks_exists(path):
    """Paths (`llava/…`), dotted names (`llava.…`), and files named alone (`NAME.py`)."""
    assert [word for word in named_in(path.read_text()) if not exists(word)] == []


def test_what_does_not_exist_is_found():
    text = "`llava/model/nothing.py`, `nothing_here.py`, `no_such.sh`\n"
    text += "```sh\npython llava/gone.py\n```\n`llava.records.Nothing`"
    assert [word for word in named_in(text) if not exists(word)] == [
        "llava/model/nothing.py",
        "nothing_here.py",
        "no_such.sh",
        "llava.records.Nothing",
    ]
    there = "`llava/eval/metrics/`, `benchmarks/NAME.py`, `python -m llava.demo`, `cpu.sh`, `llava.images.open_image`"
    assert len(named_in(there)) == 5 and all(exists(word) for word in named_in(there))


CODE = [*DOCUMENTS, *sorted(ROOT.glob("llava/notebook/*.ipynb"))]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_what_examples_import_exists(path):
    """`from llava… import …` in code blocks of documents and in cells of notebooks, which no linter follows."""
    assert [name for block in python_in(path) for name in imports_of(block) if not exists(name)] == []


def test_imports_that_lead_nowhere_are_found():
    code = "from llava.images import open_image, gone\nif True:\n    import llava.lost\nimport json"
    assert [name for name in imports_of(code) if not exists(name)] == ["llava.images.gone", "llava.lost"]
    assert sum(len(imports_of(block)) for path in CODE for block in python_in(path)) >= 10


def python_in(path) -> list[str]:
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        blocks = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    else:
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"^[!%].*$", "", block, flags=re.MULTILINE) for block in blocks]


def imports_of(code: str) -> list[str]:
    """The dotted names of this project that a piece of Python imports."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith("llava.")]


def named_in(text: str) -> list[str]:
    """The words in backticks, outside of code blocks, that name code of this repository."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    words = [word.rstrip(".,:;") for span in re.findall(r"`([^`]+)`", text) for word in span.split()]
    patterns = r"(?:llava|tests|scripts|benchmarks|docs)/[\w./*-]*", r"llava(?:\.\w+)+", r"[\w-]+\.(?:py|sh)"
    return [word for word in words if any(re.fullmatch(pattern, word) for pattern in patterns)]


def exists(word: str) -> bool:
    """Whether a path (NAME and * stand for any name), a dotted name or a file of that name is there."""
    if "/" in word:
        return any(ROOT.glob(word.rstrip("/").replace("NAME", "*")))
    if not word.startswith("llava."):
        return word in file_names()
    module, attributes = word, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
    for attribute in attributes:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


@cache
def file_names() -> frozenset[str]:
    folders = ("llava", "tests", "scripts", "benchmarks")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*.*")) | {
        path.name for path in ROOT.glob("*.*")
    }


@pytest.mark.parametrize("name", ["docs/tutorial.md", "data/README.md"])
def test_what_a_reader_makes_of_own_images_is_ignored_by_git(name):
    text = (ROOT / name).read_text().split("## Training and VQA records")[0]
    places = [
        word
        for words in commands_in(text)
        for flag, word in pairwise(words)
        if flag in {"--output-dir", "--output_dir", "--output", "--save", "--table", "--sources", "--answers-file"}
    ]
    assert len(places) >= 3
    assert {"data/*", "checkpoints/", "runs/"} <= set((ROOT / ".gitignore").read_text().splitlines())
    assert [place for place in places if not place.startswith(("data/", "checkpoints/", "runs/"))] == []


def test_commands_of_the_published_releases(shared_dir):
    """Every command in the model cards and READMEs that this project follows is accepted as written."""
    folder = shared_dir / "seeds"
    if not folder.is_dir():
        pytest.skip(f"no published documents at {folder}")
    checked, refused = 0, []
    for path in sorted(folder.glob("*.txt")):
        for words in commands_in(path.read_text(encoding="utf-8", errors="replace")):
            found = module_and_flags(words)
            if found:
                checked += 1
                if unknown := unknown_flags(*found):
                    refused.append((path.name, found[0], unknown))
    assert not refused
    assert checked >= 15
