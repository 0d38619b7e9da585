"""Documents keep their word: commands name modules and flags that exist, links lead somewhere."""

import re

import pytest

from tests.documented_commands import ROOT, commands_in, module_and_flags, unknown_flags

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])


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
