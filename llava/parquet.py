"""Parquet files in parts that fit into memory: a file of 200 kB may hold 60 GB, one text named by every row."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import LlavaError, library_errors

if TYPE_CHECKING:
    import pyarrow

MOST_ROW = 1 << 30
"""Bytes of a row."""
_PART = 64 << 20
"""Bytes of a part, unless a row alone has more."""


def parquet_schema(path: Path) -> "pyarrow.Schema":
    """Names and types of the columns.

    Raises:
        LlavaError: not a whole Parquet file.
    """
    import pyarrow.parquet

    with library_errors(f"{path}: not a whole Parquet file"):
        return pyarrow.parquet.read_schema(path)


def iter_parquet(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """The rows in order, some 64 MiB at a time.

    Raises:
        LlavaError: not a whole Parquet file; a row of more than 1 GiB.
    """
    from pyarrow.parquet import ParquetFile

    schema = parquet_schema(path)
    with library_errors(f"{path}: not a whole Parquet file"):
        with ParquetFile(path) as file:
            columns = map(file.schema.column, range(len(file.schema)))
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        # As they are stored, each text once, until it is known how much they are.
        with ParquetFile(path, read_dictionary=texts) as file:
            for group in range(file.num_row_groups):  # each has texts of its own
                for batch in file.iter_batches(row_groups=[group]):
                    for part in _parts(batch, path):
                        yield part.cast(schema)


def _parts(batch: Any, path: Path) -> Iterator[Any]:
    size, half = sum(map(_bytes, batch.columns)), batch.num_rows // 2
    if size > _PART and half:
        yield from _parts(batch.slice(0, half), path)
        yield from _parts(batch.slice(half), path)
    elif size > MOST_ROW:
        raise LlavaError(f"{path}: a row of {size:,} bytes isn't read; at most {MOST_ROW:,} are")
    else:
        yield batch


def _bytes(column: Any) -> int:
    """Of the values, each text as often as it is named."""
    import pyarrow
    from pyarrow import compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return column.indices.nbytes
        return compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(map(_bytes, column.flatten()))
    if pyarrow.types.is_nested(kind):
        return _bytes(column.flatten())
    return column.nbytes


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kinds = types.is_string, types.is_binary, types.is_large_string, types.is_large_binary
    return any(is_one(kind) for is_one in kinds)
