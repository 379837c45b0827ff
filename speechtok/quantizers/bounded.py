"""Byte streams that cannot grow past a bound: the plain or compressed content of a file that nobody vouches for."""

import io
from pathlib import Path
from typing import Any, BinaryIO

from speechtok.errors import FormatError

__all__ = ["MEND", "Source", "expansion_limit", "open_source"]

MEND = (
    "in an environment you trust, load the model and write numpy.save('centroids.npy', model.cluster_centers_), "
    "then read that file"
)

MAX_EXPANDED = 1 << 30  # bytes that a compressed file may expand to: 200 times 1000 centroids of 1280 float32
MAX_RATIO = 1000  # zlib cannot do better than about 1030; only constant data come near
ALWAYS_ALLOWED = 64 << 20  # bytes: a small file of constant data may pass the ratio
MAX_LZMA_MEMORY = 256 << 20  # bytes: the header of an xz file may ask for a dictionary of 4 GiB

_CHUNK = 1 << 20


def expansion_limit(size: int) -> int:
    """Bound the bytes that a compressed file of `size` bytes may expand to."""
    return min(MAX_EXPANDED, max(ALWAYS_ALLOWED, MAX_RATIO * size))


class _Inflated(io.RawIOBase):
    """The bytes inside a compressed file, made only as far as they are read."""

    def __init__(self, file: BinaryIO, engine: Any) -> None:
        self._file = file
        self._engine = engine  # of zlib, bz2 or lzma
        self._hungry = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        out = b""
        while not out and not self._engine.eof:
            data = getattr(self._engine, "unconsumed_tail", b"")  # zlib hands back what it had no room for
            if not data and self._hungry:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("the compressed data end early")
            out = self._engine.decompress(data, len(buffer))
            self._hungry = len(out) < len(buffer)
        buffer[: len(out)] = out
        return len(out)


class Source:
    """A byte stream of bounded length that never returns fewer bytes than asked for.

    Parameters
    ----------
    file
        The opened, decompressed stream.
    limit
        Bytes that may be read in all.
    path
        Named in errors.
    """

    def __init__(self, file: BinaryIO, limit: int, path: Path) -> None:
        self.path = path
        self._file = file
        self._limit = limit
        self._used = 0

    def tell(self) -> int:
        """Bytes read so far."""
        return self._used

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes."""
        if not 0 <= count <= self._limit - self._used:
            raise EOFError(f"{count} bytes are asked for where at most {self._limit - self._used} may follow")
        parts, missing = [], count
        while missing:  # in steps: a buffered reader would allocate all of a false length at once
            part = self._file.read(min(missing, _CHUNK))
            if not part:
                raise EOFError(f"the data end {missing} bytes early")
            parts.append(part)
            missing -= len(part)
        self._used += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readline(self) -> bytes:
        """Read to the end of a line, the newline included."""
        line = self._file.readline(self._limit - self._used)
        self._used += len(line)
        return line

    def finish(self) -> None:
        """Reach the checksum of a compressed file, where one byte past the pickle is enough to have it checked."""
        self._file.read(1)


def open_source(file: BinaryIO, size: int, path: Path) -> Source:
    """Open a plain or compressed pickle.

    Parameters
    ----------
    file
        The file, at its start.
    size
        Its length in bytes.
    path
        Named in errors.

    Returns
    -------
    Source
        The pickle, decompressed on the way (zlib, gzip, bz2, xz, lzma) and capped in length.

    Raises
    ------
    FormatError
        The compression is lz4 or that of joblib before 0.10.
    """
    head = file.read(6)
    file.seek(0)
    engine: Any
    if head.startswith(b"\x04\x22\x4d\x18"):
        raise FormatError(f"{path}: lz4 compression is not supported; write it again with joblib.dump(..., compress=3)")
    if head.startswith(b"ZF"):
        raise FormatError(f"{path}: this is a file of joblib before 0.10, which is not supported; {MEND}")
    if head.startswith(b"\x1f\x8b") or (head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0):
        import zlib

        engine = zlib.decompressobj(wbits=47)  # zlib or gzip, whichever the header says
    elif head.startswith(b"BZh"):
        import bz2

        engine = bz2.BZ2Decompressor()
    elif head.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        import lzma

        engine = lzma.LZMADecompressor(format=lzma.FORMAT_AUTO, memlimit=MAX_LZMA_MEMORY)
    else:
        return Source(file, size, path)
    return Source(io.BufferedReader(_Inflated(file, engine), _CHUNK), expansion_limit(size), path)
