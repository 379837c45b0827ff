"""`Units`: the one value that passes between tokenizers, models, vocoders and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import FingerprintError, FormatError

__all__ = ["Units", "expand_runs", "run_lengths"]


def run_lengths(ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Collapse runs of equal ids.

    Parameters
    ----------
    ids : int32 [T]

    Returns
    -------
    units : int32 [R]
        The id of each run.
    durations : int32 [R]
        The length of each run in frames; sums to T.
    """
    if len(ids) == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    starts = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))
    return ids[starts].astype(np.int32), np.diff(starts, append=len(ids)).astype(np.int32)


def expand_runs(units: NDArray[np.int32], durations: NDArray[np.int32]) -> NDArray[np.int32]:
    """Undo `run_lengths`: int32 [R] units and durations -> int32 [T] ids."""
    if len(units) != len(durations):
        raise FormatError(f"{len(units)} units but {len(durations)} durations; they must be equally many")
    if len(durations) and int(np.min(durations)) < 1:
        raise FormatError("durations must be at least 1 frame")
    return np.repeat(np.asarray(units, np.int32), durations)


@dataclass(frozen=True, eq=False)
class Units:
    """Discrete units of one stretch of sound.

    Parameters
    ----------
    ids : int32 [T] or [K, T]
        One id per frame or per segment, never run-length coded; K codebooks for residual quantizers.
    starts, ends : int64 [T]
        Span of each unit in samples at `sample_rate`. Frames follow each other; between segments there may be gaps.
    sample_rate : int
        Rate of the tokenizer (Hz).
    vocab_size : int
        Ids are in ``[0, vocab_size)`` (for each codebook).
    fingerprint : str
        Fingerprint of the tokenizer that made them.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    sample_rate: int
    vocab_size: int
    fingerprint: str

    def __post_init__(self) -> None:
        for name, dtype in (("ids", np.int32), ("starts", np.int64), ("ends", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        if (
            self.ids.ndim not in (1, 2)
            or self.starts.shape != self.ids.shape[-1:]
            or self.ends.shape != self.starts.shape
        ):
            raise FormatError(
                f"ids {self.ids.shape}, starts {self.starts.shape} and ends {self.ends.shape} do not fit together"
            )
        if self.ids.size and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < self.vocab_size:
            raise FormatError(
                f"unit ids from {self.ids.min()} to {self.ids.max()} leave the vocabulary of {self.vocab_size}"
            )

    def __len__(self) -> int:
        return int(self.ids.shape[-1])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Units)
            and (self.sample_rate, self.vocab_size, self.fingerprint)
            == (other.sample_rate, other.vocab_size, other.fingerprint)
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.starts, other.starts)
            and np.array_equal(self.ends, other.ends)
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """Ids separated by spaces; the codebooks of ``[K, T]`` ids on K lines."""
        return "\n".join(" ".join(map(str, row.tolist())) for row in np.atleast_2d(self.ids))

    @property
    def starts_seconds(self) -> NDArray[np.float64]:
        """Start of each unit in seconds, float64 [T]."""
        return self.starts / self.sample_rate

    @property
    def ends_seconds(self) -> NDArray[np.float64]:
        """End of each unit in seconds, float64 [T]."""
        return self.ends / self.sample_rate

    def run_lengths(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Run-length form: ids of the runs and their lengths in units, which are frames or segments (one codebook)."""
        if self.ids.ndim != 1:
            raise FormatError("run-length form exists for one codebook only; take one row of ids")
        return run_lengths(self.ids)

    def deduplicated(self) -> "Units":
        """Runs of equal ids become one unit that spans the run, with the gaps in it where units are segments."""
        units, durations = self.run_lengths()
        last = np.cumsum(durations) - 1
        return replace(self, ids=units, starts=self.starts[last - durations + 1], ends=self.ends[last])

    @staticmethod
    def concatenate(parts: Sequence["Units"]) -> "Units":
        """Join consecutive stretches, such as the results of a stream."""
        if not parts:
            raise FormatError("nothing to concatenate")
        first = parts[0]
        for part in parts[1:]:
            if part.fingerprint != first.fingerprint:
                raise FingerprintError(
                    f"units of tokenizer {part.fingerprint} cannot follow units of {first.fingerprint}"
                )
        return replace(
            first,
            ids=np.concatenate([p.ids for p in parts], axis=-1),
            starts=np.concatenate([p.starts for p in parts]),
            ends=np.concatenate([p.ends for p in parts]),
        )
