"""Untrusted pickle files: lists, dicts, text and numbers come in; anything that names code is refused."""

import pickle
from pathlib import Path
from typing import Any

from llava.errors import LlavaError, library_errors
from llava.folders import check_file


def read_plain_pickle(path: str | Path) -> Any:
    """The content of a pickle made of built-in containers and values alone. No code of the file is ever run.

    Raises:
        LlavaError: the file names a class or function (and could so run code), or isn't a pickle.
    """
    path = Path(path)
    check_file(path)
    with path.open("rb") as file, library_errors(f"{path}: not a pickle of plain values"):
        return _PlainUnpickler(file, path).load()


class _PlainUnpickler(pickle._Unpickler):
    """Python's own, not the one in C: that makes a list as long as the largest number a file names a value by."""

    # Without that of arrays of bytes, which are made before it is known whether there are as many.
    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]

    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str):
        raise LlavaError(
            f"{self._path}: the pickle asks for {module}.{name}; only lists, dicts, text and numbers are read, "
            f"because a pickle that names code can run it. Don't open this file by other means"
        )

    def persistent_load(self, pid):
        raise LlavaError(f"{self._path}: the pickle refers to something outside it; only plain values are read")
