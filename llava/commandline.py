"""What every command shares: flag spelling, booleans, one-line errors, exit codes, logging to stderr.

A command module holds `build_parser() -> ArgumentParser` and `main(argv=None) -> int | None`, and ends in
`if __name__ == "__main__": run(main)`. Heavy imports (torch, transformers) go inside `main`, so that
`--help` answers at once.
"""

import argparse
import copy
import errno
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import NoReturn

from llava.errors import LlavaError, for_terminal, one_line
from llava.folders import expanded

EXIT_BAD_INPUT = 2
TRUE_WORDS = frozenset({"true", "t", "yes", "y", "1", "on"})
"""What says True as a flag's value, in lower case."""
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC}
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")
MOST_TRACEBACK_LINES = 200
_LAUNCHERS = ("python -m llava", "llava-med ", "torchrun ")


def parse_bool(text: str | bool) -> bool:
    """Read True/False, yes/no, 1/0 (any case), as the training scripts of this family write them."""
    if isinstance(text, bool):
        return text
    value = text.strip().lower()
    if value in TRUE_WORDS:
        return True
    if value in {"false", "f", "no", "n", "0", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps a description's lines, names a default where it tells something, and a flag by one of two spellings."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = list({name.replace("_", "-"): name for name in action.option_strings[::-1]}.values())
        shown.option_strings.reverse()
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        tells = action.default not in (None, [], "") and action.default is not False  # 0 does, and equals False
        return super()._get_help_string(action) if tells else action.help


class ArgumentParser(argparse.ArgumentParser):
    """argparse where underscores and dashes in flags are the same and no flag may be shortened.

    `add_bool` adds a flag that takes True/False and also stands alone. `--debug` is always there: it shows
    tracebacks. The description is a docstring; its paragraph that begins with a command is shown last, as the example.
    Flags stand in groups by what they are for (`group_of`), unless a command gives a group itself.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("prog", command_name())
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        purpose, self.example = split_example(kwargs.pop("description", None) or "")
        if self.example:
            kwargs.setdefault("epilog", f"example:\n  {_as_called(self.example)}")
        kwargs["description"] = purpose
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")

    def add_bool(self, *flags: str, default: bool | None = False, help: str | None = None, **kwargs):
        return self.add_argument(
            *flags,
            nargs="?",
            const=True,
            default=default,
            type=parse_bool,
            metavar="BOOL",
            help=help,
            **kwargs,
        )

    def add_overwrite(self):
        return self.add_bool("--overwrite", help="replace output that is there already and differs")

    def _add_action(self, action):
        if not action.option_strings:
            return super()._add_action(action)
        title = group_of(action)
        group = next((one for one in self._action_groups if one.title == title), None)
        return (group or self.add_argument_group(title))._add_action(action)

    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints all flags before it."""
        complain(f"error: {message}; see --help")
        sys.exit(EXIT_BAD_INPUT)

    def format_help(self) -> str:
        places = {title: place for place, title in enumerate(_ORDER)}
        self._action_groups.sort(key=lambda group: places.get(group.title or "", places[_OPTIONS]))
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([self._spell(arg) for arg in args], namespace)

    def _spell(self, arg: str) -> str:
        """The known spelling of a flag written with the other kind of separator; `~/` after its `=`, which shells
        leave as it is, is the home folder."""
        if not arg.startswith("--") or arg == "--":
            return arg
        flag, equals, value = arg.partition("=")
        if value.startswith("~/"):
            value = os.path.expanduser(value)
        wanted = flag.replace("_", "-")
        spellings = (known for known in self._option_string_actions if known.replace("_", "-") == wanted)
        known = flag if flag in self._option_string_actions else next(spellings, flag)
        return known + equals + value


_REQUIRED, _OPTIONS, _WRITTEN, _DEVICE, _GENERAL = (
    "required",
    "options",
    "what is written",
    "device and speed",
    "general",
)
_ORDER = ("positional arguments", _REQUIRED, _OPTIONS, _WRITTEN, _DEVICE, _GENERAL)
_OF_GROUPS = {
    _WRITTEN: "output output_dir sources answers_file scores_file save json report fix clean_train per_item summary "
    "missing_list title pdf format name_files write_urls max_shard_size",
    _DEVICE: "device dtype load_8bit load_4bit batch_size workers processes num_workers threads num_gpus connections",
    _GENERAL: "help debug overwrite",
}


def group_of(action: argparse.Action) -> str:
    """The title of the group in which a flag is shown."""
    if action.required:
        return _REQUIRED
    return next((title for title, names in _OF_GROUPS.items() if action.dest in names.split()), _OPTIONS)


def split_example(docstring: str) -> tuple[str, str]:
    """(what a docstring says, the command that one of its paragraphs is, or "")."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    commands = [text for text in paragraphs if text.lstrip().startswith(_LAUNCHERS)]
    example = inspect.cleandoc(commands[0]) if commands else ""
    return "\n\n".join(text for text in paragraphs if text not in commands), example


def _as_called(example: str) -> str:
    """An example with the verb that was typed in place of the module that it names."""
    name = command_name()
    return re.sub(r"^python -m \S+", name, example) if name.startswith("llava-med ") else example


def command_name() -> str:
    """How this process was called: `llava-med VERB`, `python -m MODULE`, or a file's name."""
    name = os.path.basename(sys.argv[0])  # a verb's is no path
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or name.startswith("llava-med"):
        return name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` as a command: bad input is one line on stderr and exit code 2, Ctrl-C is 130."""
    debug = "--debug" in sys.argv
    setup_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr: what its encoding lacks is shown as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except LlavaError as error:
        if debug:
            raise
        complain(f"error: {error}")
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        complain("stopped")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # Of a file that was named, or of one next to it; what has no name is a fault of ours.
        if debug or error.errno not in _REFUSED or error.filename is None:
            raise
        complain(f"error: {error.filename}: {error.strerror}; choose another place")
        sys.exit(EXIT_BAD_INPUT)
    except BrokenExecutor:  # a RuntimeError too
        if debug:
            raise
        complain(
            "error: a process of this command was ended from outside, most likely as the machine's memory is used up; "
            "end what else uses it, or give fewer --workers or --processes"
        )
        sys.exit(EXIT_BAD_INPUT)
    except (RuntimeError, MemoryError) as error:  # torch's are RuntimeErrors, of the GPU and of the CPU
        if debug or not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        reason = str(error).split("\n")[0] or "the machine's memory is used up"
        complain(
            f"error: out of memory: {reason[:300]}; end what else uses the device, or take smaller batches "
            "(`llava-med estimate` tells what a training needs)"
        )
        sys.exit(EXIT_BAD_INPUT)
    except BaseException as error:
        # A panic of a library written in Rust: a checkpoint's tokenizer that fails at a text, most likely.
        if debug or type(error).__name__ != "PanicException":
            raise
        complain(f"error: a library gave up: {error!s:.300}; is the checkpoint's tokenizer.json sound?")
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code or 0)


def complain(text: str) -> None:
    """One line for whoever started the command; it isn't a result, so it goes to stderr."""
    print(" ".join(text.split("\n")), file=sys.stderr)  # noqa: T201


def setup_logging(level: int = logging.INFO) -> None:
    """Log to stderr, so that stdout holds results alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("httpx", "httpx2", "httpcore", "PIL", "matplotlib", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class SafeFormatter(logging.Formatter):
    """Log lines that no one else can write: what a client named, as a model, may hold line ends, or megabytes.

    The module that was started is called by its name, not `__main__`.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        if record.name == "__main__":
            record.name = _started_module()
        return super().formatMessage(record)

    def formatException(self, ei) -> str:
        lines = super().formatException(ei).splitlines()
        # The last lines say what happened; indented, none of them looks like the beginning of a record.
        return "\n".join("  " + one_line(line) for line in lines[-MOST_TRACEBACK_LINES:])


def _started_module() -> str:
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).stem if spec is None else spec.name.removesuffix(".__main__")


def write_line(text: str = "") -> None:
    """A line of a command's result, on stdout: the one place of the library that prints."""
    print(for_terminal(text), flush=True)  # noqa: T201


def existing_file(path: str | Path, what: str) -> Path:
    """`path` if it is a file, else a LlavaError that names it."""
    path = expanded(path)
    if not path.is_file():
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise LlavaError(f"{what} is a {kind}, not a file: {path}" if path.exists() else f"{what} not found: {path}")
    return path


def existing_dir(path: str | Path, what: str) -> Path:
    """`path` if it is a folder, else a LlavaError that names it."""
    path = expanded(path)
    if not path.is_dir():
        raise LlavaError(f"{what} is not a folder: {path}")
    return path


def check_outputs(args: argparse.Namespace, read: Iterable[str | Path | None], *flags: str) -> None:
    """A LlavaError if a file that a flag names is one of those that are `read`, or that another flag names."""
    taken = {Path(path).resolve() for path in read if path}
    for flag in flags:
        given = getattr(args, flag)
        if given is None:
            continue
        path = Path(given).resolve()
        if path in taken:
            name = flag.replace("_", "-")
            raise LlavaError(f"--{name} {given}: it is read, or written by another flag; give another name")
        taken.add(path)
