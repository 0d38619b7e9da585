"""Wanted members out of a tar.gz that is still arriving, without ever trusting what the archive says of itself.

Headers are parsed by `tarfile.TarInfo`; the walk from one to the next is done here, because tarfile's own reads
a long name or an extended header of any size into memory. Only regular files are given out, as byte streams: names,
links, devices and modes in an archive never reach the file system.
"""

import tarfile
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = tarfile.BLOCKSIZE
LONGEST_HEADER = 1 << 20
_LONGEST_LENGTH = 8
"""Digits of a record's length in an extended header."""
_READ = (b"path", b"size")
"""Of an extended header."""
_CHUNK = 1 << 16
_PIECE = 1 << 13
_GZIP = 16 + zlib.MAX_WBITS


class ArchiveError(Exception):
    """The archive can't be read on; the text is a reason fit for the list of failures. `permanent`: it was made so."""

    def __init__(self, reason: str, permanent: bool = False):
        super().__init__(reason)
        self.permanent = permanent


class Source(Protocol):
    """Where compressed bytes come from; `read` gives what there is next, and none at the end."""

    async def read(self) -> bytes: ...


@dataclass
class Member:
    """A member of an archive. The bytes of a regular file are read with `chunks`, before the next member."""

    name: str
    size: int
    is_file: bool
    kind: str
    """In words: "regular file", "symbolic link", …"""
    _reader: "TarReader"

    def chunks(self) -> AsyncIterator[bytes]:
        """The content in pieces of at most 64 KiB, exactly `size` bytes in all."""
        return self._reader.content()


class TarReader:
    """Walks the members of a gzipped tar stream.

    Args:
        source: the compressed bytes.
        max_unpacked: unpacked bytes after which an ArchiveError is raised, however few arrived.
    """

    def __init__(self, source: Source, max_unpacked: int):
        self._source = source
        self._gzip = zlib.decompressobj(_GZIP)
        self._received = memoryview(b"")
        self._packed = b""
        self._has_begun = self._was_full = False
        self._unpacked = memoryview(b"")
        self._left = max_unpacked
        self._content = 0
        self._padding = 0

    async def __aiter__(self) -> AsyncIterator[Member]:
        """The members in order.

        Raises:
            ArchiveError: a damaged or bottomless archive.
            EOFError: the stream ends in the middle.
        """
        long_name: str | None = None
        extended: dict[str, str] = {}
        started = False
        while True:
            await self._skip(self._content + self._padding)
            self._content = self._padding = 0
            block = await self._exactly(BLOCK, may_end=True)
            if not block and not started:
                raise ArchiveError("the archive is empty")
            if not block or not block.strip(b"\0"):
                return
            started = True
            info = self._header(block)
            self._claim(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _text((await self._small_content()).rstrip(b"\0"))
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended = _pax_records(await self._small_content())
            elif info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                await self._small_content()
            else:
                if info.isreg():
                    self._claim(_pax_size(extended, info.size))
                else:
                    # Other kinds have no content of their own, whatever size they claim (as in tarfile).
                    self._content = self._padding = 0
                name = (long_name or extended.get("path") or info.name).removeprefix("./")
                long_name, extended = None, {}
                yield Member(name, self._content, info.isreg(), _kind(info), self)

    def _claim(self, size: int) -> None:
        if size < 0:
            raise ArchiveError("damaged archive: a member of negative size")
        self._content, self._padding = size, -size % BLOCK

    async def content(self) -> AsyncIterator[bytes]:
        while self._content:
            chunk = await self._read(min(_CHUNK, self._content))
            if not chunk:
                raise EOFError
            self._content -= len(chunk)
            yield chunk

    def _header(self, block: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ArchiveError("damaged archive: not a tar header") from error
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise ArchiveError("the archive holds a sparse file, which is not read", permanent=True)
        return info

    async def _small_content(self) -> bytes:
        """The content of a header that continues another; its declared size is untrusted."""
        if self._content > LONGEST_HEADER:
            raise ArchiveError("the archive has an extended header of more than 1 MiB", permanent=True)
        return b"".join([chunk async for chunk in self.content()])

    async def _exactly(self, size: int, may_end: bool = False) -> bytes:
        block = b""
        while len(block) < size:
            chunk = await self._read(size - len(block))
            if not chunk:
                if may_end and not block:
                    return b""
                raise EOFError
            block += chunk
        return block

    async def _skip(self, size: int) -> None:
        while size:
            chunk = await self._read(min(_CHUNK, size))
            if not chunk:
                raise EOFError
            size -= len(chunk)

    async def _read(self, size: int) -> bytes:
        """At most `size` unpacked bytes; none at the end."""
        if not self._unpacked:
            await self._unpack()
        chunk, self._unpacked = bytes(self._unpacked[:size]), self._unpacked[size:]
        return chunk

    async def _unpack(self) -> None:
        """Have some unpacked bytes, 64 KiB at most, however few packed ones they come from; none at the end."""
        if self._left <= 0:
            raise ArchiveError("the archive unpacks to more than the cap", permanent=True)
        chunk = b""
        while not chunk:
            if self._gzip.eof and not await self._begin_next():
                return
            # A full chunk may have left some unpacked in zlib, though all of the packed was read.
            if not self._packed and not self._was_full:
                self._packed = await self._receive()
                if not self._packed and self._has_begun:
                    raise EOFError
                if not self._packed:
                    return
            self._has_begun = True
            try:
                chunk = self._gzip.decompress(self._packed, _CHUNK)
            except zlib.error as error:
                raise ArchiveError("damaged archive: not gzip data") from error
            self._packed, self._was_full = self._gzip.unconsumed_tail, len(chunk) == _CHUNK
        self._left -= len(chunk)
        self._unpacked = memoryview(chunk)

    async def _receive(self) -> bytes:
        """The next packed bytes, few at a time: zlib copies what is left of them at each call."""
        if not self._received:
            self._received = memoryview(await self._source.read())
        piece, self._received = bytes(self._received[:_PIECE]), self._received[_PIECE:]
        return piece

    async def _begin_next(self) -> bool:
        """Go on with the gzip stream after the one that has ended; False if only zeros follow, or nothing."""
        self._packed = self._gzip.unused_data.lstrip(b"\0")
        while not self._packed:
            more = await self._receive()
            if not more:
                return False
            self._packed = more.lstrip(b"\0")
        self._gzip = zlib.decompressobj(_GZIP)
        return True


def _pax_records(content: bytes) -> dict[str, str]:
    """What is read of an extended header: lines of `<length> <key>=<value>`."""
    records: dict[str, str] = {}
    place = 0  # not cut off record by record: a header may hold 250,000 of them
    while place < len(content):
        length, _, _ = content[place : place + _LONGEST_LENGTH + 1].partition(b" ")
        if not length.isdigit() or len(length) > _LONGEST_LENGTH or not 0 < int(length) <= len(content) - place:
            raise ArchiveError("damaged archive: not an extended header")
        record = content[place : place + int(length)]
        place += int(length)
        key, _, value = record[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        if key in _READ:
            records[_text(key)] = _text(value)
    return records


def _pax_size(records: dict[str, str], size: int) -> int:
    """The true size of a member that is too large for the old header's field."""
    claimed = records.get("size")
    if claimed is None:
        return size
    if not claimed.isascii() or not claimed.isdigit() or len(claimed) > 19:
        raise ArchiveError("damaged archive: a member of no size")
    return int(claimed)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _kind(info: tarfile.TarInfo) -> str:
    if info.isreg():
        return "regular file"
    if info.issym():
        return "symbolic link"
    if info.islnk():
        return "hard link"
    if info.isdir():
        return "directory"
    return "device" if info.isdev() else "special file"
