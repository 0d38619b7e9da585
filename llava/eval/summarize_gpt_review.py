"""Sum up judged chat answers: relative scores by question type and domain, of one or several scores files.

Without --scores-file it is the newest one below the current folder.

python -m llava.eval.summarize_gpt_review --scores-file scores.jsonl --scores-file other.jsonl
"""

import logging
import os
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, run, write_line
from llava.errors import LlavaError

logger = logging.getLogger(__name__)

_SKIPPED = {".venv", ".git", "node_modules", "__pycache__"}
_DEEPEST = 6
_FIRST_LINE = 1 << 16


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scores-file",
        dest="scores_files",
        action="append",
        default=None,
        help="what the scorer wrote; several stand side by side (default: the newest below this folder)",
    )
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_overwrite()
    return parser


def main(argv=None) -> int:
    from llava.eval.chat.summary import read_scores_file, summary_table
    from llava.records import write_json

    args = build_parser().parse_args(argv)
    files = args.scores_files or [newest_scores(Path.cwd())]
    check_outputs(args, files, "json")
    judged = [read_scores_file(path) for path in files]
    write_line(summary_table(judged))
    if args.json:
        write_json(args.json, [one.as_dict() for one in judged], overwrite=args.overwrite)
    return 0


def newest_scores(folder: Path) -> Path:
    """The newest file of judged answers below `folder`.

    Raises:
        LlavaError: there is none.
    """
    found = []
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [name for name in folders if name not in _SKIPPED and depth < _DEEPEST]
        found += [path for name in files if name.endswith(".jsonl") and _is_judged(path := Path(place, name))]
    if not found:
        raise LlavaError(f"no file of judged answers below {folder}; give --scores-file")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    logger.warning("summing up %s, the newest of %d; --scores-file names another", newest, len(found))
    return newest


def _is_judged(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return '"judgement"' in file.readline(_FIRST_LINE)
    except (OSError, UnicodeDecodeError):
        return False


if __name__ == "__main__":
    run(main)
