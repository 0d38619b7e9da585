"""A checkpoint folder that appears under its name only when it is complete.

`stage` gives a hidden folder beside the target. It becomes the target when the block ends well, stays for the
next attempt when the run is killed or stopped, and vanishes when it fails.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import LlavaError

log = logging.getLogger(__name__)

_LOCK = "lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def staging_folder(target: Path) -> Path:
    """Where `target` is put together."""
    return target.parent / f".{target.name}.part"


def check_target(target: str | Path, overwrite: bool = False) -> Path:
    """`target` as an absolute path that may be written.

    Raises:
        LlavaError: it is a file, or a folder with something in it and `overwrite` isn't set.
    """
    target = Path(target).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise LlavaError(f"{target}: is a file; give a folder to write to")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise LlavaError(f"{target}: the folder isn't empty; give another one, or --overwrite to replace it")
    return target


def check_space(target: Path, needed: int, what: str = "the result") -> None:
    """Fail unless the disk of `target` has `needed` bytes free, those of an earlier attempt included.

    Raises:
        LlavaError: how much is needed, how much is free, and where.
    """
    place = _existing_parent(target)
    free = shutil.disk_usage(place).free + _allocated(staging_folder(target))
    if needed > free:
        raise LlavaError(
            f"not enough disk space for {target}: {what} takes {_size(needed)}, {place} has {_size(free)} free; "
            f"free {_size(needed - free)} or choose a target on another disk"
        )


@contextmanager
def stage(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """The folder in which to put `target` together; one process at a time.

    Raises:
        LlavaError: `check_target`'s, another process is writing the same target, the disk is full.
    """
    target = check_target(target, overwrite)
    folder = staging_folder(target)
    existed = _existing_parent(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        raise LlavaError(f"{folder}: can't be written ({error.strerror}); choose another target") from error
    try:
        _take(lock, target)
        try:
            yield folder
            _move_in(folder, target)
        except (KeyboardInterrupt, SystemExit):
            log.warning("stopped; what is done is kept in %s, run the same command again to go on", folder)
            raise
        except BaseException as error:
            _remove(folder, existed)
            if isinstance(error, OSError):
                raise unwritable(error, target) from error
            raise
    finally:
        lock.close()


def unwritable(error: OSError, target: Path) -> LlavaError:
    """The error of a write to `target` that the system refused, in words."""
    where = error.filename or target
    if error.errno in _NO_ROOM:
        return LlavaError(
            f"{where}: no room to write {target} ({error.strerror}); nothing was left behind; "
            f"free some space (or raise the limit on file size) and run again"
        )
    return LlavaError(f"{where}: {error.strerror or error}; {target} was not written")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names of files) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take(lock, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise LlavaError(f"{target}: another process is writing it; wait for it or choose another target") from error


def _move_in(folder: Path, target: Path) -> None:
    """Everything flushed, then one rename; what stood there before goes last."""
    (folder / _LOCK).unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    old = None
    if target.is_dir():
        if any(target.iterdir()):
            old = target.parent / f".{target.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.replace(old)
        else:
            target.rmdir()
    folder.replace(target)
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _remove(folder: Path, existed: Path) -> None:
    """Remove the folder, and the parents that were made for it."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if parent == existed:
            break
        with contextlib.suppress(OSError):
            parent.rmdir()


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def _allocated(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"
