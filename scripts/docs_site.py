"""What mkdocs.yml hooks in: pages that lie outside of docs/, and one of every command's help."""

import importlib
import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.structure.files import File, Files

from llava.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "data/README.md": "project/data.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security_policy.md",
    "CHANGELOG.md": "project/changes.md",
}
"""Files of the repository, and where they stand on the site."""


def on_files(files: Files, config) -> Files:
    """Add the pages that are made here."""
    for source, place in OUTSIDE.items():
        content = _site_links((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, place, content=content))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Let links of docs/ to those files lead to their pages."""
    name = page.file.src_uri
    return markdown if name.startswith("project/") else _site_links(markdown, f"docs/{name}")


def commands() -> str:
    """Each verb with its help, by task."""
    parts = [
        "# Commands\n",
        "Each is a verb of `llava-med`, and a module that runs by `python -m`. Dashes and underscores in flags are "
        "the same; a flag for True or False may stand alone.\n",
    ]
    for task, verbs in VERBS.items():
        parts.append(f"## {task.capitalize()}\n")
        for verb, module in verbs.items():
            shown = module.removesuffix(".__main__")
            parts.append(f"### {verb}\n\n`llava-med {verb}`, `python -m {shown}`\n")
            parts.append(f"```text\n{_help(verb, module)}```\n")
    return "\n".join(parts)


def _help(verb: str, module: str) -> str:
    os.environ["COLUMNS"] = "110"
    sys.argv = [f"llava-med {verb}"]
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return said.getvalue()


def _site_links(text: str, source: str) -> str:
    """The links of a repository's file as links between the site's pages."""
    here = Path(OUTSIDE.get(source, source.removeprefix("docs/"))).parent
    away = "../" * len(here.parts)

    def lead(match: re.Match) -> str:
        target, _, anchor = match[1].partition("#")
        if "://" in target or not target:
            return match[0]
        path = (ROOT / Path(source).parent / target).resolve()
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else target
        place = OUTSIDE.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if place is None or name.endswith(".py"):
            return "]" if name.endswith(".py") else f"]({away}index.md)"
        return f"]({away}{place}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", lead, text)
