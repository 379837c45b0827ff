"""`synthesize`: the units of an output folder to wav files, one per row, with processes and resume.

Files get their names once they are whole, so a job that was killed goes on where files are missing. ``synth.json`` says
from the beginning whose files they are, and at the end that all is done.
"""

import errno
import hashlib
import io
import json
import os
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.bundle import read_description
from speechtok.corpus import formats
from speechtok.corpus import workers as processes
from speechtok.corpus.engine import Event
from speechtok.corpus.rows import Row
from speechtok.corpus.sources import key_problem
from speechtok.corpus.writers import Files
from speechtok.decoding import made
from speechtok.devices import usable_device
from speechtok.errors import FingerprintError, FormatError, InputError, OutputError, UnknownNameError
from speechtok.hub import load
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

__all__ = ["SynthesisSummary", "pcm16", "synthesize", "units_of"]

_TASK = 8  # rows that a worker takes at a time
# What is wrong with one name, not with the disk.
_BAD_NAME = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EILSEQ}


@dataclass(frozen=True)
class SynthesisSummary:
    """Result of a job.

    Parameters
    ----------
    tokenizer : str
        Its name.
    files, failed : int
        Rows with a wav file and rows without, of the whole job.
    resumed : int
        Files that were there before.
    audio_seconds, wall_seconds : float
        Of what was decoded now.
    """

    tokenizer: str
    files: int
    failed: int
    resumed: int
    audio_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class _Done:
    """What became of a row: seconds of sound, or why there is none."""

    number: int
    key: str
    path: str
    seconds: float = 0.0
    reason: str | None = None


def synthesize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    workers: int = 1,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> SynthesisSummary:
    """Decode the units of a folder; call it again to go on after any interruption.

    Parameters
    ----------
    source : path
        Output folder of `tokenize` (Parquet or JSON lines).
    out : path
        For ``<key>.wav`` of each row: 16-bit PCM at the tokenizer's rate, as long as the sound was. Besides
        ``synth.json`` and, if rows failed, ``errors.jsonl``.
    tokenizer : name, path or Tokenizer, optional
        None: by the name that ``tokenizer.json`` in the folder says. It may have more codebooks than the units.
    workers : int
        Processes; on GPUs one per device.
    overwrite : bool
        Replace the output of another job, or of this one.

    Raises
    ------
    FingerprintError
        If the units are those of another tokenizer.
    SpeechtokError
        If the job as a whole cannot be done. A row that cannot be done is a row in ``errors.jsonl``.
    """
    source, out = Path(source), Path(out)
    if workers < 1:
        raise InputError("workers must be positive")
    description = read_description(source)
    wanted: Any = description["name"] if tokenizer is None else tokenizer
    codec = _codec(source, description, wanted)
    usable_device(device)
    plan, keys, total = _plan(source, codec)
    try:
        if (before := _claim(out, plan, keys, overwrite=overwrite)) is not None:
            return SynthesisSummary(codec.name, before["files"], before["failed"], before["files"], 0.0, 0.0)
        begin = time.perf_counter()
        todo = _Todo(out, formats.read(source))
        decoded, errors = 0.0, list[_Done]()
        on_event(Event("decode", 0, total))
        for done in _decode(todo, codec, processes.Source(wanted, codec.codebooks, device), workers):
            decoded += done.seconds
            errors += [done] if done.reason else []
            on_event(Event("decode", decoded, max(total - todo.skipped, decoded)))
        wall = time.perf_counter() - begin
        _finish(out, plan, keys, codec, sorted(errors, key=lambda error: error.number))
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: cannot be written ({error.strerror}); finished work is kept, run again to go on"
        ) from error
    return SynthesisSummary(codec.name, len(keys) - len(errors), len(errors), todo.resumed, decoded, wall)


def _codec(source: Path, description: dict[str, Any], wanted: Any) -> Tokenizer:
    """The tokenizer that the folder names or the caller wants, with the codebooks that the units have."""
    try:
        codec = wanted if isinstance(wanted, Tokenizer) else load(wanted)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{source}: its units need their tokenizer; name it with --tokenizer ({error})"
        ) from error
    if codec.decoder is None:
        raise FormatError(f"{codec.name} has no decoder: only units of codecs become sound, not those of {source}")
    fingerprint, books = description["fingerprint"], description.get("codebooks", 1)
    if type(books) is not int or not made(codec, fingerprint, books):
        raise FingerprintError(
            f"{source} holds units of {description['name']} ({fingerprint}, codebooks: {books}), but {codec.name} is "
            f"{codec.fingerprint} (codebooks: {codec.codebooks}); name the tokenizer that made them with --tokenizer"
        )
    return codec.with_codebooks(books)


def _plan(source: Path, codec: Tokenizer) -> tuple[str, list[str], float]:
    """Hash of the rows and of the tokenizer, keys, and seconds of sound; every row is checked on the way."""
    digest = hashlib.sha256(json.dumps([codec.fingerprint, codec.decoder_fingerprint]).encode())
    keys: dict[str, None] = {}
    frames = 0
    for row in formats.read(source):
        if row.key in keys:
            raise FormatError(f"{source} holds the key {row.key!r} twice; one wav would replace the other")
        keys[row.key] = None
        ids, facts = row.ids, json.dumps([row.key, row.sample_rate, row.num_samples, row.codebooks])
        digest.update(hashlib.sha256(facts.encode()).digest() + hashlib.sha256(ids.astype("<i4").tobytes()).digest())
        frames += ids.shape[-1]
    return digest.hexdigest()[:32], list(keys), frames * codec.encoder.grid.hop_seconds


# -- from rows to files -----------------------------------------------------------------------------------------------


class _Todo:
    """Rows that have no file yet, with their numbers; iterate over it for tasks of a few. Counts the others."""

    def __init__(self, out: Path, rows: Iterable[Row]) -> None:
        self.out, self.resumed, self.skipped = out, 0, 0.0
        self._rows = enumerate(rows)

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        missing = self._missing()
        while task := list(islice(missing, _TASK)):
            yield task

    def _missing(self) -> Iterator[tuple[int, Row]]:
        for number, row in self._rows:
            if _exists(self.out, row.key):
                self.resumed += 1
                self.skipped += row.num_samples / row.sample_rate
            else:
                yield number, row


def _decode(todo: _Todo, codec: Tokenizer, source: processes.Source, workers: int) -> Iterator[_Done]:
    if workers == 1:
        codec.to(source.device)
        for task in todo:
            for item in task:
                yield from _write_rows(codec, todo.out, [item])
        return
    with processes.pool(source, workers, {}, lambda seconds: None) as pool:
        tasks = iter(todo)
        waiting: set[Future[list[_Done]]] = set()
        while True:
            # Few at a time: rows wait in memory for their worker.
            for task in islice(tasks, max(0, 2 * workers - len(waiting))):
                waiting.add(pool.submit(_work, todo.out, task))
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for done in processes.results(finished):
                yield from done


def _work(out: Path, task: Sequence[tuple[int, Row]]) -> list[_Done]:
    return list(_write_rows(processes.here.tokenizer, out, task))


def _write_rows(codec: Tokenizer, out: Path, task: Sequence[tuple[int, Row]]) -> Iterator[_Done]:
    for number, row in task:
        try:
            samples = codec.decode(units_of(row, codec))
            _write(out, row.key, pcm16(samples, codec.sample_rate))
            yield _Done(number, row.key, row.path, len(samples) / codec.sample_rate)
        except FormatError as error:
            yield _Done(number, row.key, row.path, reason=str(error))
        except OutputError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _BAD_NAME:
                raise
            yield _Done(number, row.key, row.path, reason=str(error))


def units_of(row: Row, codec: Tokenizer) -> Units:
    """Units of a stored row.

    The last one ends with the sound, if there are as many as the sound has frames; of a row that something else made
    all frames are whole.

    Raises
    ------
    FormatError
        If the row holds no frames of this tokenizer.
    """
    ids, hop, rate = row.ids, codec.encoder.hop, codec.sample_rate
    frames = ids.shape[-1]
    if row.starts is not None or len(np.atleast_2d(ids)) != codec.codebooks:
        found = "segments" if row.starts is not None else f"{len(np.atleast_2d(ids))} codebooks"
        raise FormatError(f"it holds {found}, not frames of {codec.codebooks} codebooks; tokenize it again")
    if not frames:
        raise FormatError("it holds no units; tokenize it again")
    starts = hop * np.arange(frames, dtype=np.int64)
    ends = starts + hop
    length = -(-row.num_samples * rate // row.sample_rate)  # what resampling gives
    if starts[-1] < length <= ends[-1]:
        ends[-1] = length
    return Units(ids, starts, ends, rate, codec.vocab_size, codec.fingerprint)


def _target(out: Path, key: str) -> Path:
    """The wav file of a key; FormatError if a link leads elsewhere, where nothing is written or deleted."""
    target = out / f"{key}.wav"
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise FormatError(f"{target.parent} is a link that leads out of {out}; remove it")
    return target


def _write(out: Path, key: str, data: bytes) -> None:
    _target(out, key)
    with Files(out) as files:
        files.create(f"{key}.wav").write(data)


def _exists(out: Path, key: str) -> bool:
    try:
        return (out / f"{key}.wav").is_file()
    except OSError:  # a name that cannot be; it will be told when it is written
        return False


def pcm16(samples: NDArray[np.float32], sample_rate: int) -> bytes:
    """A wav file of float32 [N] samples as 16-bit PCM; what lies outside of [-1, 1] is clipped."""
    values = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(values.tobytes())
    return buffer.getvalue()


# -- the folder -------------------------------------------------------------------------------------------------------


def _claim(out: Path, plan: str, keys: list[str], *, overwrite: bool) -> dict[str, Any] | None:
    """Make the folder this job's; what ``synth.json`` says if the job is complete.

    Raises
    ------
    OutputError
        If the folder belongs to something else.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder for the output")
    job = _job(out)
    if job is None and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise OutputError(f"{out} holds files that no synthesis wrote; choose another folder")
    if job is not None and job["plan"] != plan and not overwrite:
        raise OutputError(
            f"{out} holds the output of another job (other units or tokenizer); choose another folder, or --overwrite "
            "to replace it"
        )
    if job is not None and overwrite:
        for key in {*job["keys"], *keys}:  # also what has come to lie where this job will write
            with suppress(OSError, FormatError):  # it never was, its name cannot be, or a link leads elsewhere
                _target(out, key).unlink()
    elif job is not None and "files" in job:
        failed = set(job["failed_keys"])
        if all(_exists(out, key) for key in job["keys"] if key not in failed):
            return {"files": job["files"], "failed": len(failed)}
    _write_json(out, {"plan": plan, "keys": keys})
    return None


def _job(out: Path) -> dict[str, Any] | None:
    """Contents of ``synth.json``; None if there is none that this module wrote."""
    try:
        job = json.loads((out / "synth.json").read_text())
        keys = job["keys"]
        good = isinstance(job["plan"], str) and not any(key_problem(key) for key in keys)
        return job if good else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _finish(out: Path, plan: str, keys: list[str], codec: Tokenizer, errors: Sequence[_Done]) -> None:
    (out / "errors.jsonl").unlink(missing_ok=True)
    if errors:
        rows = ({"key": bad.key, "path": bad.path, "reason": bad.reason} for bad in errors)
        with Files(out) as files:
            files.create("errors.jsonl").write(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            )
    facts = {"tokenizer": codec.name, "fingerprint": codec.fingerprint, "decoder": codec.decoder_fingerprint}
    done = {"files": len(keys) - len(errors), "failed_keys": [bad.key for bad in errors]}
    _write_json(out, {"plan": plan, **facts, **done, "keys": keys})


def _write_json(out: Path, content: dict[str, Any]) -> None:
    with Files(out) as files:
        files.create("synth.json").write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
