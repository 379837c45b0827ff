"""Write rows in the formats that other toolkits read, each file whole or not at all."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from speechtok.corpus.rows import Row, write_part
from speechtok.errors import FormatError, OutputError
from speechtok.units import run_lengths

__all__ = ["Context", "Files", "flat_ids", "runs"]

ROWS_PER_PART = 10_000
ARRAY_COLUMNS = ("units", "durations", "starts", "ends")


@dataclass(frozen=True)
class Context:
    """What the writers know beside the rows.

    Parameters
    ----------
    description : dict
        Contents of ``tokenizer.json``.
    root : str
        Absolute folder that relative paths start from.
    """

    description: dict[str, Any]
    root: str

    @property
    def vocab_size(self) -> int:
        """Number of ids of each codebook."""
        size = self.description.get("vocab_size")
        if not isinstance(size, int) or size < 1:
            raise FormatError("the description of the tokenizer lacks vocab_size; pass the contents of tokenizer.json")
        return size


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written ({error.strerror or error}); free some space, or choose a folder you may write to"
    )


class _Sink:
    """A file under a hidden temporary name; `close` makes its bytes durable."""

    def __init__(self, final: Path) -> None:
        self.final = final
        # the same name every time, so that a run after a crash replaces what the crash left; short whatever the key
        self.temporary = final.with_name(f".{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}.tmp")
        self._file: BinaryIO | None = None

    def open(self) -> "_Sink":
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.temporary.open("wb")
        except OSError as error:
            raise _failed(self.final, error) from error
        return self

    def write(self, data: bytes) -> int:
        if self._file is None:
            raise OutputError(f"{self.final} is closed")
        try:
            return self._file.write(data)
        except OSError as error:
            raise _failed(self.final, error) from error

    def tell(self) -> int:
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        if self._file is None:
            return
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _failed(self.final, error) from error
        finally:
            self._file = None

    def discard(self) -> None:
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            self.temporary.unlink()


class Files:
    """Files of one folder that appear together, under their names, when the block ends well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sinks: list[_Sink] = []

    def create(self, name: str) -> _Sink:
        """Open a new file; the name is relative to the folder and '/'-separated."""
        return self.reserve(name).open()

    def reserve(self, name: str) -> _Sink:
        """Name a file that something else writes to its temporary path."""
        sink = _Sink(self.folder / name)
        self._sinks.append(sink)
        return sink

    def paths(self) -> list[Path]:
        """List the final paths in the order of creation."""
        return [sink.final for sink in self._sinks]

    def __enter__(self) -> "Files":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done: list[_Sink] = []
        try:
            if kind is None:
                for sink in self._sinks:
                    sink.close()
                for sink in self._sinks:
                    try:
                        sink.temporary.replace(sink.final)
                    except OSError as problem:
                        raise _failed(sink.final, problem) from problem
                    done.append(sink)
        finally:
            for sink in self._sinks[len(done) :]:
                sink.discard()


def flat_ids(row: Row) -> NDArray[np.int32]:
    """Ids of a row with one codebook: int32 [T] frames, or segments of a segment tokenizer."""
    ids = row.ids
    return ids if ids.ndim == 1 else ids[0]


def runs(row: Row) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Get the runs of a row with one codebook: int32 [R] units and their durations in frames.

    The segments of a segment tokenizer stay as they are, even where neighbours have the same id.
    """
    if row.durations is not None:
        return row.units, row.durations
    return run_lengths(flat_ids(row))


def _joined(values: NDArray[np.int32]) -> str:
    return " ".join(map(str, values.tolist()))


def _json_line(item: dict[str, Any]) -> bytes:
    text = json.dumps(item, ensure_ascii=False)
    # these are line ends to str.splitlines and to some readers of JSON lines
    for character in ("\x85", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode() + b"\n"


def write_parquet(rows: Iterable[Row], folder: Path, context: Context) -> list[Path]:
    """Native parts of 10,000 rows; at least one part, so that the columns are there."""
    metadata = {
        "speechtok.tokenizer": str(context.description.get("name", "")),
        "speechtok.fingerprint": str(context.description.get("fingerprint", "")),
        "speechtok.root": context.root,
    }
    iterator = iter(rows)
    with Files(folder) as files:
        part = list(islice(iterator, ROWS_PER_PART))
        while part or not files.paths():
            sink = files.reserve(f"part-{len(files.paths()):05d}.parquet")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_part(sink.temporary, part, metadata)
            except OSError as error:
                raise _failed(sink.final, error) from error
            part = list(islice(iterator, ROWS_PER_PART))
    return files.paths()


def write_jsonl(rows: Iterable[Row], folder: Path, _context: Context) -> list[Path]:
    """``units.jsonl``: the columns of the Parquet parts, one object per row, without those that are null."""
    with Files(folder) as files:
        out = files.create("units.jsonl")
        for row in rows:
            item: dict[str, Any] = {
                "key": row.key,
                "path": row.path,
                "sample_rate": row.sample_rate,
                "num_samples": row.num_samples,
            }
            for name in ARRAY_COLUMNS:
                if getattr(row, name) is not None:
                    item[name] = getattr(row, name).tolist()
            if row.codebooks is not None:
                item["codebooks"] = row.codebooks
            out.write(_json_line(item))
    return files.paths()


def write_km(rows: Iterable[Row], folder: Path, context: Context) -> list[Path]:
    """Labels of fairseq: ``units.km``, ``dict.km.txt`` and the ``units.tsv`` whose lines they follow.

    One id per frame; one per segment for segment tokenizers (``label_rate=-1`` in fairseq).
    """
    root = context.root or "."
    if any(character in root for character in "\n\r"):
        raise FormatError(f"the root {root!r} holds a line end, which the km format cannot store; use parquet or jsonl")
    vocabulary = "".join(f"{unit} 1\n" for unit in range(context.vocab_size))
    with Files(folder) as files:
        labels, dictionary, manifest = (files.create(name) for name in ("units.km", "dict.km.txt", "units.tsv"))
        dictionary.write(vocabulary.encode())
        manifest.write(f"{root}\n".encode())
        for row in rows:
            manifest.write(f"{row.path}\t{row.num_samples}\n".encode())
            labels.write(f"{_joined(flat_ids(row))}\n".encode())
    return files.paths()


def write_textless(rows: Iterable[Row], folder: Path, _context: Context) -> list[Path]:
    """Shape of textlesslib's ``--deduplicate --durations --preserve_name``: ``key<TAB>values`` in two files.

    Segments come with their own durations, without the silence between them.
    """
    with Files(folder) as files:
        units, durations = files.create("units.units"), files.create("units.durations")
        for row in rows:
            for out, values in zip((units, durations), runs(row), strict=True):
                out.write(f"{row.key}\t{_joined(values)}\n".encode())
    return files.paths()


def write_slamkit(rows: Iterable[Row], folder: Path, _context: Context) -> list[Path]:
    """Two stages of slamkit: ``features.jsonl`` with runs, ``tokens.jsonl`` with ``<Un3><Un49>...``.

    Segments come with their own durations, without the silence between them.
    """
    with Files(folder) as files:
        features, tokens = files.create("features.jsonl"), files.create("tokens.jsonl")
        for row in rows:
            units, durations = (values.tolist() for values in runs(row))
            features.write(_json_line({"units": units, "duration": durations, "file_name": row.path}))
            text = "".join(f"<Un{unit}>" for unit in units)
            tokens.write(_json_line({"file_name": row.path, "audio_repr": text}))
    return files.paths()


def _unique(rows: Iterable[Row]) -> Iterator[Row]:
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            raise FormatError(f"the key {row.key!r} comes twice; the second row would replace the first")
        seen.add(row.key)
        yield row


def _array_bytes(ids: NDArray[np.int32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(ids, "<i4"), allow_pickle=False)
    return buffer.getvalue()


def write_npy(rows: Iterable[Row], folder: Path, _context: Context) -> list[Path]:
    """``key.npy`` per row in a tree like the input's: int32 [T] frames or segments, or [K, T]."""
    paths: list[Path] = []
    for row in _unique(rows):
        with Files(folder) as files:
            files.create(f"{row.key}.npy").write(_array_bytes(row.ids))
        paths.extend(files.paths())
    return paths


def write_webdataset(rows: Iterable[Row], folder: Path, context: Context) -> list[Path]:
    """``units-00000.tar`` ... of 10,000 rows: ``key.units.npy`` with the ids and ``key.json`` with the rest.

    The JSON of segments holds their starts, ends (seconds) and durations (frames).
    """
    shared = {key: context.description.get(key) for key in ("name", "fingerprint", "vocab_size", "hop_seconds")}
    shared["tokenizer"] = shared.pop("name")
    iterator = _unique(rows)
    with Files(folder) as files:
        first: list[Row] = list(islice(iterator, 1))
        while first or not files.paths():
            sink = files.create(f"units-{len(files.paths()):05d}.tar")
            # mypy: tarfile writes through write and tell alone
            with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:  # type: ignore[call-overload]
                for row in chain(first, islice(iterator, ROWS_PER_PART - 1)):
                    _add_sample(tar, row, shared)
            sink.close()
            first = list(islice(iterator, 1))
    return files.paths()


def _add_sample(tar: tarfile.TarFile, row: Row, shared: dict[str, Any]) -> None:
    facts: dict[str, Any] = {
        "key": row.key,
        "path": row.path,
        "sample_rate": row.sample_rate,
        "num_samples": row.num_samples,
        **shared,
    }
    if row.starts is not None and row.ends is not None:
        facts |= {"starts": row.starts.tolist(), "ends": row.ends.tolist()}
        facts["durations"] = None if row.durations is None else row.durations.tolist()
    for extension, data in (("units.npy", _array_bytes(row.ids)), ("json", _json_line(facts))):
        member = tarfile.TarInfo(f"{row.key}.{extension}")
        # owner, group and time stay 0: the same rows give the same bytes
        member.size, member.mode = len(data), 0o644
        tar.addfile(member, io.BytesIO(data))


def write_kaldi(rows: Iterable[Row], folder: Path, _context: Context) -> list[Path]:
    """Kaldi's ``text`` (``key id id ...``) and ``utt2dur`` (``key seconds``), sorted by key as Kaldi demands.

    Of frames one id each, of segments one id each; the line of a sound without units holds its key alone.
    """
    index: list[tuple[bytes, float, int, int]] = []
    with Files(folder) as files:
        text, seconds = files.create("text"), files.create("utt2dur")
        try:
            # lines wait on disk in input order: only keys and positions are kept in memory
            with tempfile.TemporaryFile(dir=folder) as spool:
                for row in _unique(rows):
                    line = " ".join([row.key, *map(str, flat_ids(row).tolist())]).encode() + b"\n"
                    index.append((row.key.encode(), row.num_samples / row.sample_rate, spool.tell(), len(line)))
                    spool.write(line)
                for key, duration, offset, length in sorted(index):
                    spool.seek(offset)
                    text.write(spool.read(length))
                    seconds.write(key + f" {duration:.6f}\n".encode())
        except OSError as error:
            raise _failed(text.final, error) from error
    return files.paths()
