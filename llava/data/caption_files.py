"""Files of figure captions: LLaVA-Med's, which lists figures by domain, or records in any file form."""

from collections.abc import Iterator
from pathlib import Path

from llava.errors import LlavaError, one_line
from llava.folders import check_file
from llava.records import Record, first_bytes, iter_jsonl, iter_records, read_json

_FIGURE_KEYS = {"pair_id", "id", "image"}


def iter_captions(path: Path) -> Iterator[tuple[str, str | None, Record]]:
    """(where it is, domain it is listed under, entry) of each figure of `{domain: [entry, …]}`; of records of any
    other form the domain is None.

    Raises:
        LlavaError: the file can't be read, a domain holds no list, or an entry is no object.
    """
    content = _one_object(path)
    if content is None:
        for index, entry in enumerate(iter_records(path)):
            yield f"{path} record {index}", None, entry
    elif not content.keys().isdisjoint(_FIGURE_KEYS):
        yield f"{path} record 0", None, content
    else:
        for domain, entries in content.items():
            where = f'{path} "{one_line(domain, 100)}"'
            if not isinstance(entries, list):
                raise LlavaError(f"{where} holds {type(entries).__name__}, expected a list of captions")
            for index, entry in enumerate(entries):
                if not isinstance(entry, dict):
                    raise LlavaError(f"{where} record {index}: expected an object, got {type(entry).__name__}")
                yield f"{where} record {index}", domain, entry


def _one_object(path: Path) -> Record | None:
    """The object that the whole file is; None if it is a list, lines or Parquet."""
    check_file(path)
    head = first_bytes(path)
    if not head.startswith(b"{") or head[1:].lstrip()[:1] not in (b'"', b"}") or path.suffix == ".jsonl":
        return None
    lines = iter_jsonl(path)
    try:
        _, first = next(lines)
    except LlavaError:
        return read_json(path)  # an object of several lines, or of one that is longer than lines are
    try:
        return first if next(lines, None) is None else None
    except LlavaError:
        return None  # said with the line's number when the lines are read
