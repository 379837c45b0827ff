"""One row per file: the native Parquet parts and their schema."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speechtok.errors import FormatError
from speechtok.units import Units, expand_runs

__all__ = ["SCHEMA", "Row", "read_part", "read_parts", "write_part"]

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("units", pa.list_(pa.int32()), nullable=False),
        pa.field("durations", pa.list_(pa.int32())),
        pa.field("starts", pa.list_(pa.float64())),
        pa.field("ends", pa.list_(pa.float64())),
        pa.field("codebooks", pa.int32()),
    ]
)


@dataclass(frozen=True, eq=False)
class Row:
    """Units of one file as they are stored.

    Parameters
    ----------
    key : str
        Path relative to the input root, '/'-separated, without extension.
    path : str
        The file as the input named it.
    sample_rate, num_samples : int
        Of the source file.
    units : int32 [R]
        Run-length coded ids; of segment tokenizers one id per segment; with several codebooks the flattened ``[K, T]``
        ids, row-major.
    durations : int32 [R] or None
        Frames of each run (of each segment for segment tokenizers); None with several codebooks.
    starts, ends : float64 [R] or None
        Seconds; for segment tokenizers only.
    codebooks : int or None
        K for ``[K, T]`` ids.
    """

    key: str
    path: str
    sample_rate: int
    num_samples: int
    units: NDArray[np.int32]
    durations: NDArray[np.int32] | None = None
    starts: NDArray[np.float64] | None = None
    ends: NDArray[np.float64] | None = None
    codebooks: int | None = None

    @property
    def ids(self) -> NDArray[np.int32]:
        """The id stream: int32 [T] frames (or segments, if starts are given), or [K, T]."""
        if self.codebooks is not None:
            return self.units.reshape(self.codebooks, -1)
        if self.starts is not None or self.durations is None:
            return self.units
        return expand_runs(self.units, self.durations)

    @staticmethod
    def from_units(
        key: str, path: str, sample_rate: int, num_samples: int, units: Units, segment_hop: int | None = None
    ) -> "Row":
        """Row of a tokenizer's units: of frames run-length coded, of segments with their times, of ``[K, T]`` ids flat.

        `segment_hop` is `Tokenizer.segment_hop`: None for units that are frames; of segments, samples of one frame.
        """
        if segment_hop is not None:
            durations = ((units.ends - units.starts) // segment_hop).astype(np.int32)
            times = units.starts_seconds, units.ends_seconds
            return Row(key, path, sample_rate, num_samples, units.ids, durations, *times)
        if units.ids.ndim == 2:
            flat = np.ascontiguousarray(units.ids).reshape(-1)
            return Row(key, path, sample_rate, num_samples, flat, codebooks=units.ids.shape[0])
        ids, durations = units.run_lengths()
        return Row(key, path, sample_rate, num_samples, ids, durations)


def _column(name: str, rows: list[Row]) -> pa.Array:
    return pa.array([getattr(row, name) for row in rows], SCHEMA.field(name).type)


def write_part(path: Path, rows: list[Row], metadata: dict[str, str]) -> None:
    """Write rows as one Parquet file, durably: the bytes depend on the arguments only.

    Parameters
    ----------
    path : Path
        Must not be visible under this name to readers before this function returns.
    rows : list of Row
    metadata : dict
        Stored in the schema; names start with ``speechtok.``.
    """
    schema = SCHEMA.with_metadata(metadata)
    table = pa.table([_column(field.name, rows) for field in SCHEMA], schema=schema)
    with open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd", row_group_size=10_000)
        file.flush()
        os.fsync(file.fileno())


def read_part(path: Path) -> Iterator[Row]:
    """Rows of one Parquet file, batch by batch.

    Raises
    ------
    FormatError
        If the file is not Parquet or a column is missing.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{path} is not a readable Parquet file ({error}); write it again") from error
    with file:
        missing = [
            name
            for name in ("key", "path", "sample_rate", "num_samples", "units")
            if name not in file.schema_arrow.names
        ]
        if missing:
            raise FormatError(
                f"{path} lacks the columns {', '.join(missing)}; it was not written by speechtok tokenize"
            )
        for batch in file.iter_batches(1000):
            columns = {name: batch.column(name) for name in batch.schema.names}
            for index in range(batch.num_rows):
                yield _row(columns, index)


def _row(columns: dict[str, pa.Array], index: int) -> Row:
    def array(name: str, dtype: Any) -> Any:
        if name not in columns or not columns[name][index].is_valid:
            return None
        return columns[name][index].values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)

    codebooks = columns["codebooks"][index].as_py() if "codebooks" in columns else None
    return Row(
        columns["key"][index].as_py(),
        columns["path"][index].as_py(),
        columns["sample_rate"][index].as_py(),
        columns["num_samples"][index].as_py(),
        array("units", np.int32),
        array("durations", np.int32),
        array("starts", np.float64),
        array("ends", np.float64),
        codebooks,
    )


def read_parts(folder: Path) -> Iterator[Row]:
    """All rows of an output folder (or of one Parquet file), in input order."""
    paths: Iterable[Path] = sorted(folder.glob("part-*.parquet")) if folder.is_dir() else [folder]
    for path in paths:
        yield from read_part(path)
