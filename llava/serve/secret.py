"""The shared secret that keeps everybody else from controller and workers.

The first process that needs it makes it in a file that only its user can read; the other processes of the same user
read it by themselves, so the usual commands work on one machine. Other machines get it by flag or environment.
"""

import os
import secrets
import stat
from argparse import ArgumentParser, Namespace
from pathlib import Path

from llava.errors import LlavaError

VARIABLE = "LLAVA_SERVE_SECRET"
HEADER = "x-llava-secret"


def add_secret_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--secret-file", help=f"file that holds the shared secret (default: ${VARIABLE}, else {_path()})"
    )
    group.add_argument(
        "--open-to-everyone",
        action="store_true",
        help="run without a secret: anybody who reaches the port can register workers and ask",
    )


def secret_from_args(args: Namespace) -> str | None:
    """The secret to demand and to send; None only with --open-to-everyone.

    Raises:
        LlavaError: the file is missing, empty or readable by others.
    """
    if args.open_to_everyone:
        return None
    if args.secret_file:
        return _read(Path(args.secret_file))
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]
    return _read(_made(_path()))


def headers(secret: str | None) -> dict[str, str]:
    """What a client sends along."""
    return {HEADER: secret} if secret else {}


def _path() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "llava" / "serve-secret"


def _made(path: Path) -> Path:
    """`path`, made with a new secret if it isn't there; two processes that start at once agree on one."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    try:
        os.link(temporary, path)  # fails if another process was first: then its secret counts
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        value = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise LlavaError(f"secret file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LlavaError(f"secret file {path} is no text; remove it and a new one is made") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LlavaError(f"secret file {path} can be read by others; run: chmod 600 {path}")
    if not value:
        raise LlavaError(f"secret file {path} is empty; remove it and a new one is made")
    return value
