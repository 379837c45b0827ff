"""Codes of an acoustic teacher over a training corpus: of whole items, on disk or in memory.

A teacher's codes depend on what it has heard before, so those of a crop are cut from those of its item and never
computed on the crop (a codec with recurrent layers gives other codes there).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speechtok.corpus.engine import Event
from speechtok.errors import FormatError, InputError, OutputError
from speechtok.frames import FrameGrid
from speechtok.tokenizer import Tokenizer
from speechtok.training.teacher import frames_holding
from speechtok.training.waves import Waves

__all__ = ["TaughtWaves", "TeacherCodes"]

CODES, JOURNAL, IDENTITY = "codes.u16", "frames.txt", "teacher.json"
_ITEMS_AT_ONCE = 8


@dataclass(frozen=True)
class TeacherCodes:
    """What an acoustic teacher says about the items of a `Waves`.

    Parameters
    ----------
    grid : FrameGrid
        Of the teacher, from the start of an item.
    codebooks, vocab_size : int
        K, and the number of codes in each.
    item : callable
        Codes of an item, uint16 [T, K].
    """

    grid: FrameGrid
    codebooks: int
    vocab_size: int
    item: Callable[[int], NDArray[np.uint16]]

    def on_grid(
        self, grid: FrameGrid, item: int, first: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Codes for frames ``[first, first + count)`` of a student's grid: those whose span holds a frame's middle.

        Returns
        -------
        codes : int64 [count, K]
            0 where there are none.
        known : bool [count]
            Where the teacher has a frame.
        """
        rows = self.item(item)
        place = frames_holding(np.arange(first, first + count), grid, self.grid)
        known = (place >= 0) & (place < len(rows))
        codes = np.zeros((count, self.codebooks), np.int64)
        codes[known] = rows[place[known]]
        return codes, known

    @classmethod
    def in_memory(cls, teacher: Tokenizer, waves: Waves) -> "TeacherCodes":
        """Codes that are computed when an item is first asked for; InputError if the teacher does not fit."""
        _fitting(teacher, waves)
        return cls(
            teacher.encoder.grid, teacher.quantizer.codebooks, teacher.quantizer.vocab_size,
            cache(lambda item: _codes(teacher, waves, [item])[0]),
        )  # fmt: skip

    @classmethod
    def on_disk(
        cls,
        teacher: Tokenizer,
        waves: Waves,
        sound: str,
        folder: Path,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> "TeacherCodes":
        """Compute the codes of all items, go on where an interrupted call stopped, or read what a finished one left.

        Parameters
        ----------
        teacher : Tokenizer
            On its device.
        waves : Waves
        sound : str
            Identity of the waves, see `identity_of`.
        folder : Path
            Where the codes are kept: ``codes.u16`` (one frame behind the other, K codes each), ``frames.txt`` (the
            number of frames of each item that is done), ``teacher.json``.
        on_event : callable
            Progress: stage "run", seconds of sound.

        Raises
        ------
        InputError
            If the teacher does not fit the waves.
        OutputError
            If the folder holds codes of another teacher or of other sound.
        FormatError
            If it is damaged.
        """
        _fitting(teacher, waves)
        books = teacher.quantizer.codebooks
        _claim(folder, {"teacher": teacher.fingerprint, "sound": sound})
        path, journal = folder / CODES, folder / JOURNAL
        counts = _done(folder, books)[: len(waves.lengths)]
        seconds, total = waves.lengths[: len(counts)].sum() / waves.rate, waves.hours * 3600
        # The good part of the journal is put in place at once: whoever is killed from here on loses nothing.
        kept = journal.with_name(f".{JOURNAL}")
        kept.write_text("".join(f"{count}\n" for count in counts))
        kept.replace(journal)
        with path.open("r+b" if path.exists() else "wb") as file, journal.open("a") as log:
            file.truncate(sum(counts) * books * 2)
            file.seek(0, os.SEEK_END)
            for first in range(len(counts), len(waves.lengths), _ITEMS_AT_ONCE):
                items = range(first, min(first + _ITEMS_AT_ONCE, len(waves.lengths)))
                rows = _codes(teacher, waves, items)
                for row in rows:
                    row.tofile(file)
                file.flush()
                log.writelines(f"{len(row)}\n" for row in rows)
                log.flush()
                counts += [len(row) for row in rows]
                seconds += waves.lengths[items.start : items.stop].sum() / waves.rate
                on_event(Event("run", float(seconds), total))
        if sum(counts) == 0:
            raise InputError("the teacher has no codes for this sound: all items are too short for it")
        ends = np.cumsum(counts)
        known = np.memmap(path, np.uint16, "r", shape=(int(ends[-1]), books))
        return cls(
            teacher.encoder.grid, books, teacher.quantizer.vocab_size,
            lambda item: known[ends[item] - counts[item] : ends[item]],
        )  # fmt: skip


@dataclass(frozen=True)
class TaughtWaves(Waves):
    """Sound of a corpus together with an acoustic teacher's codes.

    Parameters
    ----------
    teacher : TeacherCodes
        Of the same items.
    """

    teacher: TeacherCodes = field(kw_only=True)

    @classmethod
    def join(cls, waves: Waves, teacher: TeacherCodes) -> "TaughtWaves":
        """Put the two together."""
        return cls(**{entry.name: getattr(waves, entry.name) for entry in fields(Waves)}, teacher=teacher)


def _fitting(teacher: Tokenizer, waves: Waves) -> None:
    """Refuse a teacher whose frames are not those of the waves."""
    if teacher.segmenter is not None or (teacher.sample_rate, teacher.encoder.hop) != (waves.sample_rate, waves.hop):
        raise InputError(
            f"{teacher.name} cannot teach here: one unit every {waves.hop} samples at {waves.sample_rate} Hz is needed "
            f"({waves.rate:g} per second); take a tokenizer of this rate, for instance codec-mini"
        )
    if teacher.vocab_size > 1 << 16:
        raise InputError(f"{teacher.name} has {teacher.vocab_size} codes in a codebook; at most 65,536 can be kept")


def _codes(teacher: Tokenizer, waves: Waves, items: Sequence[int]) -> list[NDArray[np.uint16]]:
    """Codes of whole items: uint16 [T, K] each."""
    sounds = [waves.cut(item, 0, int(waves.lengths[item])) for item in items]
    units = teacher.encode_batch(sounds, waves.sample_rate)
    return [np.ascontiguousarray(np.atleast_2d(one.ids).T.astype(np.uint16)) for one in units]


def _claim(folder: Path, identity: dict[str, str]) -> None:
    """Say whose codes the folder holds, or check it."""
    path = folder / IDENTITY
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps(identity, indent=2) + "\n")
        partial.replace(path)
        return
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}); delete {folder}") from error
    for part, words in (("teacher", "another teacher"), ("sound", "other sound")):
        if known.get(part) != identity[part]:
            raise OutputError(f"{folder} holds codes of {words}; choose another folder for the run or delete it")


def _done(folder: Path, books: int) -> list[int]:
    """Numbers of frames of the items whose codes are on disk."""
    path, journal = folder / CODES, folder / JOURNAL
    room = path.stat().st_size // (2 * books) if path.exists() else 0
    counts: list[int] = []
    # What stands behind the last line break was not finished when the process died.
    for line in (journal.read_text() if journal.exists() else "").split("\n")[:-1]:
        if not line.isdigit():
            raise FormatError(f"{journal} is damaged at line {len(counts) + 1}; delete {folder}")
        if (room := room - int(line)) < 0:
            break
        counts.append(int(line))
    return counts
