"""Archives that hold audio: tar shards, read by offset, and Parquet files with a column of bytes."""

import struct
import tarfile
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from speechtok.corpus.manifests import KEY_FIELDS, PATH_FIELDS, add_named_file
from speechtok.corpus.sources import (
    COMPRESSED_TARS,
    Listing,
    Rows,
    Utterance,
    escape,
    key_problem,
    normalise,
    split_extension,
    text_problem,
)
from speechtok.errors import AudioError, InputError

__all__ = ["read_cell", "scan_archive", "scan_shards"]

BYTES_COLUMNS = ("audio", "bytes", "wav")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
# headers are small; a longer read is a forged length, which would ask for any amount of memory
_LONGEST_READ = 1 << 20
_cells = Lock()


class _Headers:
    """The file as `tarfile` sees it: only header-sized reads."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_READ:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self.file.read(size)


def _add_tar(rows: Rows, file: str, relative: str, shard: str) -> int:
    """Add the audio members of one tar; returns the number of other members.

    With a shard name, keys that repeat in other shards get it as their folder.
    """
    if relative.lower().endswith(COMPRESSED_TARS):
        raise _compressed(file)
    ignored = 0
    last = -1
    try:
        with open(file, "rb") as raw:
            if raw.read(6).startswith(_MAGIC):
                raise _compressed(file)
            end = raw.seek(0, 2)
            raw.seek(0)
            headers: Any = _Headers(raw)
            damage = ""
            try:
                with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                    for member in tar:
                        # lengths below zero in a header would lead back and read for ever
                        if member.offset <= last or member.size < 0:
                            raise tarfile.ReadError("a header leads back")
                        last = member.offset
                        ignored += _add_member(rows, member, end, file, relative, shard)
                    # a broken header in the middle looks to tarfile like the end
                    raw.seek(tar.offset)
                    if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        damage = f"broken header at byte {tar.offset}"
            except (tarfile.TarError, ArithmeticError, EOFError, RecursionError, ValueError, struct.error) as error:
                damage = str(error) or type(error).__name__
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    if damage and last < 0:
        raise InputError(f"{file} is not a readable tar archive ({damage}); write it again")
    if damage:
        rows.reject("", relative, f"the archive is damaged: {damage}; members after that are lost")
    return ignored


def _compressed(file: str) -> InputError:
    return InputError(f"{file} is a compressed tar, which cannot be read by offset; decompress it to a .tar first")


def _add_member(rows: Rows, member: tarfile.TarInfo, end: int, file: str, relative: str, shard: str) -> int:
    if member.isdir():
        return 0
    if not split_extension(member.name)[1]:
        return 1
    path = f"{relative}/{member.name}"
    name = normalise(member.name)
    problem = text_problem(member.name)
    if problem or name is None or member.name.startswith("/"):
        rows.reject("", path, problem or "leaves the root")
        return 0
    if not member.isreg():
        problem = "is a link or special file inside the archive; pack the audio itself"
    elif member.issparse():
        problem = "is a sparse member; pack the archive without --sparse"
    elif member.offset_data + member.size > end:
        problem = "the archive ends inside this member"
    stem = split_extension(name)[0]
    names = (stem, name, f"{shard}/{stem}", f"{shard}/{name}") if shard else (stem, name)
    rows.add("", names, Utterance("", path, file, member.size, "tar", member.offset_data), problem)
    return 0


def _text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _columns(schema: pa.Schema, file: str) -> tuple[str, str, str]:
    """Names of the columns with bytes, with paths and with keys; '' where there is none."""
    fields = {field.name: field.type for field in schema}
    data = path = ""
    struct_type = fields.get("audio")
    if struct_type is not None and pa.types.is_struct(struct_type):
        inner = {field.name: field.type for field in struct_type}
        data = "audio.bytes" if _binary(inner.get("bytes", pa.null())) else ""
        path = "audio.path" if _text(inner.get("path", pa.null())) else ""
    data = data or next((name for name in BYTES_COLUMNS if name in fields and _binary(fields[name])), "")
    path = path or next((name for name in PATH_FIELDS if name in fields and _text(fields[name])), "")
    if not data and not path:
        raise InputError(
            f"{file} has the columns {', '.join(fields) or 'none'} but no audio; it needs a struct column audio with "
            f"bytes, a binary column {', '.join(BYTES_COLUMNS)}, or a text column path"
        )
    keys = (name for name in (*KEY_FIELDS, "file_name") if name in fields)
    return data, path, next((n for n in keys if _text(fields[n]) or pa.types.is_integer(fields[n])), "")


def _add_parquet(rows: Rows, file: str, relative: str, shard: str) -> None:
    """Add the rows of one Parquet file: bytes to be read from it, or the plain files it names."""
    try:
        # with a buffer, pages are read one by one where a look at the first is enough
        with pq.ParquetFile(file, buffer_size=1 << 16) as source:
            if b"speechtok.tokenizer" in (source.schema_arrow.metadata or {}):
                raise InputError(f"{file} holds units that speechtok wrote; name the audio they were made from")
            data, path, key = _columns(source.schema_arrow, file)
            wanted = [name for name in (path, key) if name]
            number = 0
            for group in range(source.num_row_groups):
                table = source.read_row_group(group, columns=wanted).flatten()
                count = source.metadata.row_group(group).num_rows
                column = "" if path and data and _all_null(source, group, data) else data
                paths = table.column(path).to_pylist() if path else [None] * count
                keys = table.column(key).to_pylist() if key else [None] * count
                for row, (given, name) in enumerate(zip(paths, keys, strict=True)):
                    where = f"{relative} row {number}" if shard else f"row {number}"
                    names = _names(given, name, key, number, shard)
                    if column:
                        inner = (given or "").strip("/") or names[0]
                        utterance = Utterance("", f"{relative}/{inner}", file, 0, "parquet", group, row, column)
                        rows.add(where, names, utterance, text_problem(inner))
                    elif given:
                        fixed = "" if name is None or key == "file_name" else str(name)
                        add_named_file(rows, where, given, str(Path(file).parent), fixed)
                    else:
                        rows.reject(where, relative, f"the column {path} is empty", malformed=True)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file} is not a readable Parquet file ({error}); write it again") from error


def _all_null(source: pq.ParquetFile, group: int, column: str) -> bool:
    """Whether a row group has no bytes at all, but names files instead.

    Reads pages up to the first cell with bytes. The metadata of the column would tell it without reading, but
    pyarrow aborts the process where they are damaged.
    """
    batches = source.iter_batches(batch_size=8, row_groups=[group], columns=[column])
    for batch in batches:
        cells = pa.Table.from_batches([batch]).flatten().column(column)
        if cells.null_count < len(cells):
            return False
    return True


def _names(given: str | None, name: Any, key: str, number: int, shard: str) -> tuple[str, ...]:
    """Possible keys of a row: its key column, or its path, or its number."""
    if name is not None and not key_problem(str(name)):
        stem = split_extension(str(name))[0] if key == "file_name" else str(name)
        return (stem,) if stem == str(name) else (stem, str(name))
    inner = normalise(given) if given and not text_problem(given) else None
    if inner is not None:
        stem = split_extension(inner)[0]
        return (stem,) if stem == inner else (stem, inner)
    return (f"{shard}/{number}" if shard else f"{number}",)


@lru_cache(maxsize=2)
def _group(file: str, _changed: tuple[int, int], group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(file) as source:
        return source.read_row_group(group, columns=[column]).flatten().column(column)


def read_cell(file: str, group: int, row: int, column: str, path: str) -> bytes:
    """Bytes of one cell; the last two row groups stay in memory, as rows are asked for in order.

    Raises
    ------
    AudioError
        If the file changed or is damaged, or the cell is empty.
    """
    try:
        state = Path(file).stat()
        with _cells:  # two threads that want the same row group should not both read it
            column_data = _group(file, (state.st_mtime_ns, state.st_size), group, column)
        cell = column_data[row]
    except (pa.ArrowException, OSError, IndexError, KeyError, ValueError) as error:
        raise AudioError(f"{path}: the Parquet file cannot be read ({error})") from error
    if not cell.is_valid:
        raise AudioError(f"{path}: the column {column} is empty in this row")
    data: bytes = cell.as_py()
    return data


def scan_archive(path: Path) -> Listing:
    """Audio of one tar or Parquet file.

    Raises
    ------
    InputError
        If it is compressed, not readable, or holds no audio.
    """
    rows = Rows()
    ignored = 0
    if path.name.lower().endswith(".parquet"):
        _add_parquet(rows, str(path), path.name, "")
    else:
        ignored = _add_tar(rows, str(path), path.name, "")
    if not rows or rows.malformed == len(rows):
        note = rows.first_reason()
        raise InputError(f"{path} holds no audio{f' ({note})' if note else ''}; name one with audio members or rows")
    return rows.listing(str(path.parent), ignored)


def scan_shards(root: str, shards: dict[str, list[str]], ignored: int, named: str) -> Listing:
    """Audio of a folder of shards, sorted by name.

    Parameters
    ----------
    root : str
        Absolute folder.
    shards : dict
        Relative paths under ``".tar"``, ``".parquet"`` and ``"compressed"`` (tars that are refused).
    ignored : int
        Files of the folder that are not audio, shards included.
    named : str
        The input as the user named it.

    Raises
    ------
    InputError
        If no shard is usable, or tar and Parquet shards are mixed.
    """
    if shards[".parquet"] and (shards[".tar"] or shards["compressed"]):
        raise InputError(f"{named} holds both tar and Parquet shards; name one kind, for instance with '*.tar'")
    rows = Rows()
    names = sorted([*shards[".parquet"], *shards[".tar"], *shards["compressed"]])
    ignored -= len(names)
    for relative in names:
        shard = relative.removesuffix(relative[relative.rfind(".") :])
        try:
            if text_problem(relative):
                raise InputError(text_problem(relative))
            if shards[".parquet"]:
                _add_parquet(rows, f"{root}/{relative}", relative, shard)
            else:
                ignored += _add_tar(rows, f"{root}/{relative}", relative, shard)
        except InputError as error:
            rows.reject("", relative, escape(str(error)), malformed=True)
    if not rows or rows.malformed == len(rows):
        raise InputError(f"{named} holds no audio ({rows.first_reason() or 'its shards are empty'}); check its shards")
    return rows.listing(root or "/", ignored)
