"""Folders that appear under their name only when they are whole: the one place that publishes a folder.

A folder is put together aside, in a hidden one whose name ends in `.part`, by one process at a time. When it is
complete it is flushed to the disk, and then either takes the target's place (`stage`) or has its files moved into
a folder that keeps what else it holds, the file that marks the folder as complete last (`stage_files`). Writers of
several processes use the two steps themselves: `publish_folder` and `publish_files`.

Also how a path that somebody gave is read (`expanded`, `is_file`, `other_form_note`).
"""

import contextlib
import ctypes
import errno
import filecmp
import logging
import os
import shutil
import stat
import unicodedata
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import LlavaError

log = logging.getLogger(__name__)

PART = ".part"
"""What the name of everything unfinished ends in, files and folders."""
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
"""Weight files of a checkpoint and their indexes: those of an earlier save make a folder that holds two models."""

_LOCK = "lock"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _NO_SPACE | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EIO}


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False also for a name that is too long for one, at which `Path.is_file` raises."""
    return os.path.isfile(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with the home folder in place of `~`; the name of no user's stays as it is (`Path.expanduser` raises)."""
    return Path(os.path.expanduser(path))


def in_other_form(path: Path) -> bool:
    """Whether there is a file whose path differs by its Unicode form alone: macOS writes é as two characters (NFD)."""
    found = Path(path.parts[0]) if path.parts else path
    for part in path.parts[1:]:
        forms = [part] if part.isascii() else [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        found = next((found / form for form in forms if os.path.lexists(found / form)), found / part)
    return found != path and is_file(found)


_OTHER_FORM = (
    "is there under a name in another Unicode form (NFC, NFD): rename the file, or write the name as it is there"
)
_OTHER_FORMS = (
    "are there under names in another Unicode form (NFC, NFD): rename the files, or write the names as they are there"
)


def other_form_note(missing: Collection[Path]) -> str:
    """What to add to a message on files that aren't there: how many are, under a name in another Unicode form."""
    found = sum(map(in_other_form, missing))
    if not found:
        return ""
    if len(missing) == 1:
        return f"; it {_OTHER_FORM}"
    return f"; 1 of them {_OTHER_FORM}" if found == 1 else f"; {found:,} of them {_OTHER_FORMS}"


def part_of(target: Path) -> Path:
    """Where `target` is put together: next to it, so that it can be renamed."""
    return target.parent / f".{target.name}{PART}"


def part_in(folder: Path) -> Path:
    """Where files for `folder` are put together: inside it, so that they can be moved though it is a mount point."""
    return folder / f".{folder.absolute().name}{PART}"


def final_name(folder: Path) -> str:
    """The name that a folder has or, where it is still put together, will have."""
    return folder.name.removeprefix(".").removesuffix(PART)


def model_name(path: str | Path) -> str:
    """What a checkpoint is called: its path's or hub id's last part; of a run's `checkpoint-N` with the run's name."""
    parts = [part for part in expanded(path).parts if part not in ("/", ".", "..")]
    if not parts:
        parts = list(Path(path).resolve().parts[-2:])
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def check_file(path: Path) -> None:
    """A LlavaError unless `path` is a file: a device or a pipe has no end, or none yet."""
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "a device or a pipe, not a file"
        raise LlavaError(f"{path}: {kind if path.exists() else 'no such file'}")


def check_target(target: str | Path, overwrite: bool = False) -> Path:
    """`target` as an absolute path that may be written.

    Raises:
        LlavaError: it is a file, or a folder with something in it and `overwrite` isn't set.
    """
    target = expanded(target).absolute()
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
    free = shutil.disk_usage(place).free + _allocated(part_of(target))
    if needed > free:
        raise LlavaError(
            f"not enough disk space for {target}: {what} takes {_size(needed)}, {place} has {_size(free)} free; "
            f"free {_size(needed - free)} or choose a target on another disk"
        )


@contextmanager
def stage(target: str | Path, *, overwrite: bool = False, resume: Iterable[str] = ()) -> Iterator[Path]:
    """The folder in which to put `target` together; it takes the target's place when the block ends well.

    Args:
        resume: patterns of the files with which a later attempt goes on. They stay when the block is stopped
            (Ctrl-C) or killed; all else of an earlier attempt is removed before the block begins, and everything
            when the block fails.

    Raises:
        LlavaError: `check_target`'s, another process is writing the same target, the disk is full.
    """
    target, resume = check_target(target, overwrite), tuple(resume)
    with _part(part_of(target), target, resume) as part:
        yield part
        publish_folder(part, target)


@contextmanager
def stage_files(folder: str | Path, *, last: str, stale: Iterable[str] = (), overwrite: bool = True) -> Iterator[Path]:
    """A folder in which to put files together that are moved into `folder` when the block ends well.

    Args:
        last, stale: as for `publish_files`.
        overwrite: replace files of other content; `last` may always be.

    Raises:
        LlavaError: `folder` is a file or holds other content that may not be replaced, another process is writing to
            it, the disk is full.
    """
    folder = check_target(folder, overwrite=True)
    with _part(part_in(folder), folder) as part:
        yield part
        if not overwrite:
            for path in part.iterdir():
                if path.name not in (last, _LOCK):
                    refuse_other_content(path, folder / path.name)
        publish_files(part, folder, last=last, stale=stale)


def publish_folder(part: Path, target: Path) -> None:
    """Flush `part` and give it the name `target`; a folder that stood there goes when the new one has its name."""
    (part / _LOCK).unlink(missing_ok=True)
    sync_tree(part)
    if not target.is_dir():
        part.replace(target)
        sync(target.parent)
        return
    # Not `part` any more: a later attempt would go on with what is in it, which may be the old folder's.
    other = target.parent / f".{target.name}.other{PART}"
    shutil.rmtree(other, ignore_errors=True)
    part.replace(other)
    if not _exchange(other, target):
        target.replace(part)
        other.replace(target)
        part.replace(other)
    sync(target.parent)
    shutil.rmtree(other)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's name at once; False where the system or the disk can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def publish_files(part: Path, folder: Path, *, last: str, stale: Iterable[str] = ()) -> None:
    """Flush `part`, move its files into `folder`, and remove `part`. Files of other names stay.

    Args:
        last: the file without which the folder counts as unfinished. An older one goes first, the new one comes last.
        stale: patterns of files that don't fit the new ones, removed.
    """
    (part / _LOCK).unlink(missing_ok=True)
    sync_tree(part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / last).unlink(missing_ok=True)
    remove_stale(folder, stale)
    for path in sorted(part.iterdir(), key=lambda path: (path.name == last, path.name)):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    part.rmdir()
    sync(folder)


def refuse_other_content(new: Path, there: Path) -> None:
    """Fail if the file `there` exists and holds anything else than `new`.

    Raises:
        LlavaError: what to do about it.
    """
    if there.exists() and not (there.is_file() and filecmp.cmp(new, there, shallow=False)):
        raise LlavaError(f"{there} is there and holds something else; give another name, or --overwrite to replace it")


def remove_stale(folder: Path, patterns: Iterable[str], keep: Iterable[str] = ()) -> None:
    """Remove the files of `folder` that match a pattern, except those named in `keep`."""
    keep = set(keep)
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink()


def remove_parts(folder: Path) -> None:
    """Remove the folders that a killed process was putting together in `folder`; each is named in a warning."""
    for part in folder.glob(f".*{PART}"):
        if part.is_dir():
            log.warning("%s was left unfinished by an earlier run; removed", part)
            shutil.rmtree(part, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush `folder`, all files below it and their names to the disk, each as readable as the user's files are."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            open_to_others(path)
        sync(path)


def open_to_others(path: Path) -> None:
    """Give a file the mode that the umask lets new files have; some libraries write private ones."""
    # Taken from a new file: the umask can be read only by setting it, for all threads.
    new = path.parent / f".{uuid.uuid4().hex}{PART}"
    with new.open("x") as file:
        mode = os.fstat(file.fileno()).st_mode
    new.unlink(missing_ok=True)
    path.chmod(stat.S_IMODE(mode))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _part(part: Path, target: Path, resume: tuple[str, ...] = ()) -> Iterator[Path]:
    """`part`, made or taken over from an attempt that was killed, and locked; it goes when the block fails."""
    from filelock import FileLock, Timeout

    existed = _existing_parent(part)
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = FileLock(part / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LlavaError(f"{target}: another process is writing it; wait for it or choose another target") from error
    except OSError as error:
        raise LlavaError(f"{part}: can't be written ({error.strerror}); choose another target") from error
    try:
        _clear(part, (_LOCK, *resume))
        yield part
    except BaseException as error:
        if resume and isinstance(error, KeyboardInterrupt | SystemExit):
            log.warning("stopped; what is done is kept in %s, run the same command again to go on", part)
            raise
        _remove(part, existed)
        if isinstance(error, OSError):
            raise _unwritable(error, target) from error
        raise
    finally:
        lock.release()


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if any(path.match(pattern) for pattern in keep):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(part: Path, existed: Path) -> None:
    """Remove the folder, and the parents that were made for it."""
    shutil.rmtree(part, ignore_errors=True)
    for parent in part.parents:
        if parent == existed:
            break
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextmanager
def writing(target: Path, kept: str = "no part of it was left") -> Iterator[None]:
    """What the system refuses to write in the block is said in words; `kept` says what became of the work.

    Raises:
        LlavaError: `target` has no room, or can't be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise _unwritable(error, target, kept) from error


def _unwritable(error: OSError, target: Path, kept: str = "no part of it was left") -> LlavaError:
    """The error of a write to `target` that the system refused, in words."""
    where = error.filename or target
    if error.errno in _NO_SPACE:
        return LlavaError(
            f"{where}: no room to write {target} ({error.strerror}); {kept}; "
            f"free some space (or raise the limit on file size) and run again"
        )
    return LlavaError(f"{where}: {error.strerror or error}; {target} was not written")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def _allocated(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"
