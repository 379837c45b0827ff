"""Bits per second of units.

Conventions: seconds are the total duration of the sound, silence included. *Nominal*: rate times log2 of the
vocabulary (Sylber's convention). *Entropy*: units per second times the entropy of their unigram over the whole test set
(TWIST's and ZeroSyl's); no smoothing, as only units that occur are summed. Whether runs of equal units count once is an
explicit choice; a decoder that needs their durations back costs ``H(duration | unit)`` bits more per run. Codebooks are
summed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.units import run_lengths

__all__ = ["entropy_bitrate", "evaluate", "nominal", "units_per_second", "validate"]

Integers = NDArray[np.integer[Any]]


def validate(sequences: Sequence[Integers], seconds: float) -> None:
    """Check units: InputError unless they are integer [T] or [K, T] with one K, some unit is there, and seconds > 0."""
    if not (np.isfinite(seconds) and seconds > 0):
        raise InputError(f"the total duration is {seconds} s; it must be positive")
    if sum(sequence.size for sequence in sequences) == 0:
        raise InputError("there are no units")
    if {sequence.dtype.kind for sequence in sequences} - {"i", "u"}:
        raise InputError("units must be integers")
    if len({sequence.shape[:-1] for sequence in sequences}) > 1 or sequences[0].ndim not in (1, 2):
        raise InputError("units must all be [T] or all be [K, T] with the same number of codebooks K")


def nominal(rate: float, vocab_size: int, codebooks: int = 1) -> float:
    """Bits per second ``rate * codebooks * log2(vocab_size)``; `rate` in units per second."""
    if rate <= 0 or vocab_size < 1 or codebooks < 1:
        raise InputError(f"rate {rate}, vocabulary {vocab_size} and codebooks {codebooks} must be positive")
    return float(rate * codebooks * np.log2(vocab_size))


def _bits(values: NDArray[Any]) -> float:
    """Entropy of int [N] values (or of rows of int [N, 2]) in bits."""
    counts = np.unique(values, axis=0, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _runs(sequences: Sequence[Integers]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Units and durations of all runs."""
    if sequences[0].ndim != 1:
        raise InputError("runs of equal units exist for one codebook only; count [K, T] units without deduplication")
    pairs = [run_lengths(np.asarray(sequence, np.int32)) for sequence in sequences]
    return np.concatenate([units for units, _ in pairs]), np.concatenate([durations for _, durations in pairs])


def units_per_second(sequences: Sequence[Integers], seconds: float, *, deduplicated: bool) -> float:
    """Units (or runs of equal units) per second of sound; codebooks are not multiplied in."""
    validate(sequences, seconds)
    count = len(_runs(sequences)[0]) if deduplicated else sum(sequence.shape[-1] for sequence in sequences)
    return count / seconds


def entropy_bitrate(
    sequences: Sequence[Integers], seconds: float, *, deduplicated: bool, durations: bool = False
) -> float:
    """Unigram entropy bitrate (bits per second).

    Parameters
    ----------
    sequences : list of int [T] or int [K, T]
        Units of each file, one per frame.
    seconds : float
        Total duration of the files.
    deduplicated : bool
        Count runs of equal units once; one codebook only.
    durations : bool
        Add ``H(duration | unit)`` per run: what run-length form costs a decoder that needs the frames back.

    Raises
    ------
    InputError
        If units are missing or misshapen, or `durations` is asked for without `deduplicated`.
    """
    validate(sequences, seconds)
    if durations and not deduplicated:
        raise InputError("durations have a cost only where runs are deduplicated")
    if not deduplicated:
        flat = np.concatenate([np.atleast_2d(sequence) for sequence in sequences], axis=1)
        return flat.shape[1] / seconds * sum(_bits(row) for row in flat)
    units, lengths = _runs(sequences)
    # H(unit) + H(duration | unit) is the entropy of the pair.
    bits = _bits(np.stack([units, lengths], 1)) if durations else _bits(units)
    return len(units) / seconds * bits


def evaluate(sequences: Sequence[Integers], seconds: float, *, rate: float, vocab_size: int) -> dict[str, float]:
    """All figures of this module; run-length figures for one codebook only.

    Parameters
    ----------
    sequences : list of int [T] or int [K, T]
    seconds : float
        Total duration of the files.
    rate : float
        Nominal units per second of the tokenizer.
    vocab_size : int

    Returns
    -------
    dict
        Bits and units per second; the names say which convention.
    """
    validate(sequences, seconds)
    codebooks = 1 if sequences[0].ndim == 1 else len(sequences[0])
    result = {
        "seconds": float(seconds),
        "units_per_second": units_per_second(sequences, seconds, deduplicated=False),
        "nominal_bitrate": nominal(rate, vocab_size, codebooks),
        "entropy_bitrate": entropy_bitrate(sequences, seconds, deduplicated=False),
    }
    if sequences[0].ndim == 1:
        result["runs_per_second"] = units_per_second(sequences, seconds, deduplicated=True)
        result["entropy_bitrate_runs"] = entropy_bitrate(sequences, seconds, deduplicated=True)
        result["entropy_bitrate_runs_and_durations"] = entropy_bitrate(
            sequences, seconds, deduplicated=True, durations=True
        )
    return result
