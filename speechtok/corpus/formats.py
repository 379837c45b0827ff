"""Formats of units: what each can hold, writing them, and reading back those that keep everything.

Of segments, parquet, jsonl and webdataset keep units, times and lengths in frames. textless and slamkit keep units and
lengths, but not the silence between segments, so no times; km, npy and kaldi keep units only. km refuses sounds that
have no segments.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speechtok.corpus import writers
from speechtok.corpus.rows import SCHEMA, Row, read_part
from speechtok.corpus.sources import key_problem, text_problem
from speechtok.corpus.writers import Context
from speechtok.errors import FormatError, InputError, SpeechtokError

__all__ = ["FORMATS", "Format", "check_name", "check_units", "read", "write"]

_REQUIRED = ("key", "path", "sample_rate", "num_samples", "units")
_MEND = "rename the file or use parquet or jsonl"
_LONGEST_NAME = 255  # bytes of one name on all common file systems


def _any_name(_key: str, _path: str) -> str | None:
    return None


def _km_name(_key: str, path: str) -> str | None:
    if any(character in path for character in "\t\n\r"):
        return f"its path holds a tab or line end, which a .tsv cannot store; {_MEND}"
    if path[:1].isspace():
        return f"its path starts with white space, which readers of a .tsv strip; {_MEND}"
    return None


def _textless_name(key: str, _path: str) -> str | None:
    if any(character in key for character in "\t\n\r") or key[:1].isspace():
        return (
            f"its key holds a tab or line end or starts with white space, which the textless format cannot store; "
            f"{_MEND}"
        )
    return None


def _kaldi_name(key: str, _path: str) -> str | None:
    if any(character.isspace() for character in key):
        return f"its key holds white space, which Kaldi cannot store; {_MEND}"
    return None


def _npy_name(key: str, _path: str) -> str | None:
    *folders, name = key.split("/")
    if any(folder.endswith(".npy") for folder in folders):
        return "a folder in its key ends in .npy, where an array of that name may have to be; rename the folder"
    if max(len(part.encode()) for part in (*folders, f"{name}.npy")) > _LONGEST_NAME:
        return f"a name in its key is longer than {_LONGEST_NAME} bytes with .npy; {_MEND}"
    return None


def _webdataset_name(key: str, _path: str) -> str | None:
    if "." in key.rsplit("/", 1)[-1]:
        return (
            "its file name holds a '.', where WebDataset would cut the key (samples a.1 and a.2 would become one); "
            f"{_MEND}"
        )
    if any(character in key for character in "\n\r"):
        return f"its key holds a line end, which readers of WebDataset do not match; {_MEND}"
    return None


@dataclass(frozen=True)
class Format:
    """One way to store units.

    Parameters
    ----------
    name : str
    about : str
        What it writes and who reads it.
    codebooks : bool
        Whether it holds ids ``[K, T]`` of several codebooks.
    writer : callable
        ``(rows, folder, context) -> paths``.
    check : callable
        ``(key, path) -> reason`` why the names cannot be stored, or None.
    no_units : str
        Why a row without units (a sound without segments) cannot be stored; empty where it can.
    files : tuple of str
        Patterns of the files it writes; none where they are a tree named after the keys.
    """

    name: str
    about: str
    codebooks: bool
    writer: Callable[[Iterable[Row], Path, Context], list[Path]]
    check: Callable[[str, str], str | None] = _any_name
    no_units: str = ""
    files: tuple[str, ...] = ()


_ALL = (
    Format(
        "parquet",
        "part-00000.parquet ...: the native columns (datasets, pandas)",
        codebooks=True,
        writer=writers.write_parquet,
        files=("part-[0-9][0-9][0-9][0-9][0-9]*.parquet",),
    ),
    Format(
        "jsonl",
        "units.jsonl: the native columns as JSON lines",
        codebooks=True,
        writer=writers.write_jsonl,
        files=("units.jsonl",),
    ),
    Format(
        "km",
        "units.km, dict.km.txt, units.tsv (fairseq, HuBERT)",
        codebooks=False,
        writer=writers.write_km,
        check=_km_name,
        no_units="it has no units, and an empty line of a .km file is silently wrong for its readers; "
        "use parquet or jsonl",
        files=("units.km", "dict.km.txt", "units.tsv"),
    ),
    Format(
        "textless",
        "units.units, units.durations (textlesslib, ULM)",
        codebooks=False,
        writer=writers.write_textless,
        check=_textless_name,
        files=("units.units", "units.durations"),
    ),
    Format(
        "slamkit",
        "features.jsonl, tokens.jsonl (slamkit, SIMS)",
        codebooks=False,
        writer=writers.write_slamkit,
        files=("features.jsonl", "tokens.jsonl"),
    ),
    Format(
        "npy",
        "key.npy per file, in a tree like the input's",
        codebooks=True,
        writer=writers.write_npy,
        check=_npy_name,
    ),
    Format(
        "webdataset",
        "units-00000.tar ... with key.units.npy and key.json",
        codebooks=True,
        writer=writers.write_webdataset,
        check=_webdataset_name,
        files=("units-[0-9]*.tar",),
    ),
    Format(
        "kaldi",
        "text, utt2dur (Kaldi, ESPnet), sorted by key",
        codebooks=False,
        writer=writers.write_kaldi,
        check=_kaldi_name,
        files=("text", "utt2dur"),
    ),
)
FORMATS: dict[str, Format] = {entry.name: entry for entry in _ALL}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_name(format: str, key: str, path: str) -> str | None:  # noqa: A002
    """Reason why this key or path cannot be stored in the format, or None.

    Raises
    ------
    FormatError
        If there is no such format.
    """
    problem = key_problem(key) or (text_problem(path) if path else "empty path")
    return problem or _format(format).check(key, path)


def check_units(format: str, row: Row) -> str | None:  # noqa: A002
    """Reason why the key, path or units of this row cannot be stored in the format, or None; raises as `check_name`."""
    entry = _format(format)
    if row.codebooks is not None and row.codebooks > 1 and not entry.codebooks:
        return f"it has {row.codebooks} codebooks; {format} holds one: use {', '.join(several_codebooks())}"
    return check_name(format, row.key, row.path) or (None if row.units.size else entry.no_units or None)


def several_codebooks() -> list[str]:
    """The formats that hold ids of several codebooks."""
    return [name for name, entry in FORMATS.items() if entry.codebooks]


def _check_row(row: Row) -> str:
    """Why the fields of a row do not fit together, or ''."""
    if row.sample_rate < 1 or row.num_samples < 0:
        return f"sample_rate {row.sample_rate} or num_samples {row.num_samples} is out of range"
    if row.units.size and int(row.units.min()) < 0:
        return "a unit below 0"
    if row.codebooks is not None:
        if row.codebooks < 1 or len(row.units) % row.codebooks:
            return f"{len(row.units)} units are not a whole number of frames of {row.codebooks} codebooks"
        if row.durations is not None or row.starts is not None or row.ends is not None:
            return "durations, starts or ends beside several codebooks"
    for name in ("durations", "starts", "ends"):
        values = getattr(row, name)
        if values is not None and len(values) != len(row.units):
            return f"{len(row.units)} units but {len(values)} {name}"
    if row.durations is not None and row.durations.size and int(row.durations.min()) < 1:
        return "a duration below 1 frame"
    # forged durations would expand to any amount of memory; short sounds are padded, hence the allowance
    if row.durations is not None and int(row.durations.sum(dtype=np.int64)) > row.num_samples + 1000:
        return f"durations of {row.durations.sum(dtype=np.int64)} frames for {row.num_samples} samples"
    if (row.starts is None) != (row.ends is None):
        return "starts without ends or ends without starts"
    if row.starts is not None and row.ends is not None and not np.isfinite([row.starts, row.ends]).all():
        return "starts or ends that are not finite"
    return ""


def _storable(entry: Format, rows: Iterable[Row], vocab_size: int | None) -> Iterator[Row]:
    for row in rows:
        problem = check_units(entry.name, row) or _check_row(row)
        if problem:
            raise FormatError(f"the row {row.key!r} cannot be stored as {entry.name}: {problem}")
        if vocab_size is not None and row.units.size and int(row.units.max()) >= vocab_size:
            raise FormatError(
                f"the row {row.key!r} has the unit {row.units.max()}, but the vocabulary of its tokenizer ends at "
                f"{vocab_size - 1}; the units and tokenizer.json do not belong together"
            )
        yield row


def write(format: str, rows: Iterable[Row], folder: Path, description: dict[str, Any], root: str) -> list[Path]:  # noqa: A002
    """Write rows in one of the `FORMATS`; the bytes depend on the arguments only.

    Parameters
    ----------
    format : str
    rows : iterable of Row
        In input order; consumed once, row by row.
    folder : Path
        Made if missing. Files get their names once they are whole and on disk.
    description : dict
        Contents of ``tokenizer.json``: ``name``, ``fingerprint``, ``vocab_size``, ``hop_seconds``.
    root : str
        Absolute folder that relative paths start from.

    Returns
    -------
    list of Path

    Raises
    ------
    FormatError
        If a row cannot be stored in this format.
    OutputError
        If a file cannot be written.
    """
    entry = _format(format)
    context = Context(description, root)
    vocab_size = context.vocab_size if "vocab_size" in description else None
    return entry.writer(_storable(entry, rows, vocab_size), Path(folder), context)


def read(source: Path) -> Iterator[Row]:
    """Rows of an output folder, a ``.parquet`` or a ``.jsonl`` file, in input order.

    Raises
    ------
    InputError
        If the source does not exist or holds no units in one of these two formats.
    FormatError
        If a row is malformed.
    """
    source = Path(source)
    if source.is_dir():
        parts = sorted(source.glob("part-*.parquet"))
        if not parts and not (source / "units.jsonl").is_file():
            raise InputError(f"{source} holds neither part-*.parquet nor units.jsonl; name an output folder")
        paths = parts or [source / "units.jsonl"]
    elif source.is_file():
        paths = [source]
    else:
        raise InputError(f"{source} does not exist; name an output folder, a .parquet or a .jsonl file")
    return _read_files(paths)


def _read_files(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        if path.suffix == ".parquet":
            rows = _read_parquet(path)
        elif path.suffix == ".jsonl":
            rows = _read_jsonl(path)
        else:
            raise InputError(f"{path} is neither .parquet nor .jsonl; other formats do not keep all columns")
        for number, row in enumerate(rows, 1):
            if any(getattr(row, name) is None for name in _REQUIRED):
                raise FormatError(f"{path} row {number}: an empty cell among {', '.join(_REQUIRED)}; write it again")
            problem = key_problem(row.key) or text_problem(row.path) or _check_row(row)
            if problem:
                raise FormatError(f"{path} row {number}: {problem}; write the file again")
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            found = {field.name: field.type for field in file.schema_arrow}
        for name, kind in found.items():
            if name in SCHEMA.names and not _fits(kind, SCHEMA.field(name).type):
                wanted = SCHEMA.field(name).type
                raise FormatError(f"{path} has {kind} in the column {name}, not {wanted}; write it again")
        yield from read_part(path)
    except SpeechtokError:
        raise
    # an empty cell where there must be none shows as whatever the conversion stumbles over
    except (pa.ArrowException, OSError, AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not readable as units ({error}); write it again") from error


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    for same in (pa.types.is_integer, pa.types.is_floating):
        if same(wanted):
            return bool(same(found))
    if pa.types.is_string(wanted):
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    lists = pa.types.is_list(found) or pa.types.is_large_list(found)
    return bool(lists and _fits(found.value_type, wanted.value_type))


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise FormatError(f"{where} is not JSON ({error}); write the file again") from error
                yield _json_row(item, where)
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}); copy or write it again") from error


def _json_row(item: Any, where: str) -> Row:
    missing = [name for name in _REQUIRED if not isinstance(item, dict) or item.get(name) is None]
    if missing:
        raise FormatError(f"{where} lacks {', '.join(missing)}; it was not written by speechtok tokenize")
    for name, kind in (("key", str), ("path", str), ("sample_rate", int), ("num_samples", int), ("codebooks", int)):
        if item.get(name) is not None and type(item[name]) is not kind:
            raise FormatError(f"{where}: {name} must be {'text' if kind is str else 'a whole number'}; write it again")
    durations, starts, ends = (
        None if item.get(name) is None else _json_array(item[name], dtype, f"{where}: {name}")
        for name, dtype in (("durations", np.int32), ("starts", np.float64), ("ends", np.float64))
    )
    units = _json_array(item["units"], np.int32, f"{where}: units")
    names = item["key"], item["path"], item["sample_rate"], item["num_samples"]
    return Row(*names, units, durations, starts, ends, item.get("codebooks"))


def _json_array(values: Any, dtype: type[np.int32] | type[np.float64], where: str) -> NDArray[Any]:
    kinds = (int,) if dtype is np.int32 else (int, float)
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        kind = "whole numbers" if dtype is np.int32 else "numbers"
        raise FormatError(f"{where} must be a list of {kind}; write the file again")
    try:
        return np.array(values, dtype)
    except OverflowError as error:
        raise FormatError(f"{where} holds a number out of range; write the file again") from error
