"""The three equivalences, measured on the user's own files.

1. batched == single, 2. streamed == offline, 3. killed and resumed == one pass.

Streams are pushed in random pieces of 1 sample to 2 seconds, at the files' own sample rates and at others; where they
are exact, also many of them in one batch.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import AudioFile
from speechtok.audio.resample import resample
from speechtok.corpus.engine import tokenize
from speechtok.corpus.sources import Utterance, scan
from speechtok.errors import InputError, SpeechtokError
from speechtok.frames import Window, WindowRule
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units
from speechtok.windows import EncodedWindow

__all__ = ["feature_difference", "in_batches", "random_pieces", "streamed", "streamed_together", "verify"]

_BATCHES = (4, 16)
_RATES = (8_000, 16_000, 22_050, 44_100, 48_000)  # Hz, of streams
_TOGETHER = 32  # streams in one batch
_LONGEST_PIECE = 2.0  # seconds
_KILLS = 3

Loaded = tuple[NDArray[np.float32], int]


def verify(
    source: str, tokenizer: Tokenizer, *, files: int = 100, window: WindowRule | None = None, seed: int = 0
) -> dict[str, Any]:
    """Measure the equivalences.

    Parameters
    ----------
    source : path or glob
        As for ``tokenize``.
    tokenizer : Tokenizer
    files : int
        At most this many, evenly spread over the input.
    window : WindowRule, optional
        Also stream with this rule; its agreement with offline is reported, not required.
    seed : int
        Of the sizes of pushed pieces and of kill times.

    Returns
    -------
    dict
        ``checks`` (each with the rates of identical files and of identical frames, or segments where these are the
        units, and the near-ties that were decided, in streams as well as in batches), ``max_feature_difference``,
        ``skipped`` and ``holds``: whether every required rate is 1.
    """
    utterances = scan(source).utterances
    step = max(1, -(-len(utterances) // files))
    usable: list[Utterance] = []
    waves: list[Loaded] = []
    skipped = 0
    for utterance in utterances[::step]:
        try:
            with AudioFile(utterance.open(), utterance.path) as file:
                wave = np.concatenate(list(file.blocks()))
        except SpeechtokError:
            skipped += 1
            continue
        if not any(window.count for window, _ in tokenizer.windows(wave, file.sample_rate)):
            skipped += 1  # shorter than one frame
            continue
        usable.append(utterance)
        waves.append((wave, file.sample_rate))
    if not waves:
        raise InputError(f"{source}: none of its files can be used; speechtok tokenize says why")
    offline = [tokenizer.encode(wave, rate) for wave, rate in waves]
    checks = []
    for size in _BATCHES:
        units, ties = in_batches(tokenizer, waves, size)
        checks.append(_compare(f"batched by {size} = single", units, offline, ties) | {"required": True})
    chance = random.Random(seed)
    units, ties = _each_streamed(tokenizer, waves, None, chance)
    checks.append(_compare("streamed = offline", units, offline, ties) | {"required": True})
    if tokenizer.encoder.exact_stream:
        units, ties = streamed_together(tokenizer, waves, _TOGETHER, chance)
        checks.append(_compare(f"streamed, {_TOGETHER} at once = offline", units, offline, ties) | {"required": True})
    others = [_at_another_rate(wave, i) for i, wave in enumerate(waves)]
    units, ties = _each_streamed(tokenizer, others, None, chance)
    expected = [tokenizer.encode(wave, rate) for wave, rate in others]
    checks.append(_compare("streamed at other sample rates = offline", units, expected, ties) | {"required": True})
    if window is not None and not tokenizer.encoder.exact_stream:
        units, ties = _each_streamed(tokenizer, waves, window, chance)
        name = f"streamed in windows of {window.max_seconds:g} s = offline"
        checks.append(_compare(name, units, offline, ties) | {"required": False})
    plain = [utterance for utterance in usable if not utterance.container]
    if plain:  # members of archives cannot be listed in a manifest
        same, kills = _killed_and_resumed(plain, tokenizer, chance)
        checks.append(
            {
                "name": f"killed {kills} times and resumed = one pass",
                "files": len(plain),
                "files_identical_rate": float(same),
                "frames_identical_rate": float(same),
                "ties": 0,
                "required": True,
            }
        )
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "checks": checks,
        "max_feature_difference": feature_difference(tokenizer, waves),
        "skipped": skipped,
        "holds": all(check["files_identical_rate"] == 1 for check in checks if check["required"]),
    }


def _windows(tokenizer: Tokenizer, waves: Sequence[Loaded]) -> list[tuple[int, Window, NDArray[np.float32]]]:
    return [
        (i, window, piece) for i, (wave, rate) in enumerate(waves) for window, piece in tokenizer.windows(wave, rate)
    ]


def in_batches(tokenizer: Tokenizer, waves: Sequence[Loaded], size: int) -> tuple[list[Units], int]:
    """Units with exactly `size` windows per batch, in input order (lengths mixed), and the number of near-ties.

    Tokenizers that go `in_order` take the windows of sounds that have several one by one; they are in no batch.
    """
    jobs = _windows(tokenizer, waves)
    parts: list[list[EncodedWindow]] = [[] for _ in waves]
    together = [job for job in jobs if not tokenizer.in_order or job[1].stop is None]
    for begin in range(0, len(together), size):
        batch = together[begin : begin + size]
        results = tokenizer.encode_batch_of_windows([job[1:] for job in batch])
        for (index, _, _), encoded in zip(batch, results, strict=True):
            parts[index].append(encoded)
    if tokenizer.in_order:
        for index, encoded in tokenizer.encode_windows((job for job in jobs if job[1].stop is not None), 60.0):
            parts[index].append(encoded)
    return [tokenizer.assemble(part) for part in parts], sum(part.ties for each in parts for part in each)


@torch.inference_mode()
def feature_difference(tokenizer: Tokenizer, waves: Sequence[Loaded]) -> float:
    """Largest relative difference (Euclidean norm per frame) between a batch of 16 and single passes."""
    worst = 0.0
    jobs = _windows(tokenizer, waves)
    for begin in range(0, len(jobs), 16):
        pieces = [piece for _, _, piece in jobs[begin : begin + 16]]
        lengths = torch.tensor([len(piece) for piece in pieces])
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(piece) for piece in pieces], batch_first=True)
        together = tokenizer.encoder(padded.to(tokenizer.device), lengths.to(tokenizer.device))
        for row, count, piece in zip(together.features, together.lengths.tolist(), pieces, strict=True):
            if count:
                alone = tokenizer.encoder(torch.from_numpy(piece)[None].to(tokenizer.device)).features[0, :count]
                relative = (row[:count] - alone).norm(dim=1) / alone.norm(dim=1).clamp_min(1e-12)
                worst = max(worst, float(relative.max()))
    return worst


def random_pieces(wave: NDArray[np.float32], rate: int, chance: random.Random) -> Iterator[NDArray[np.float32]]:
    """Cut float32 [N] samples into pieces of 1 sample to 2 seconds, small ones as often as large ones."""
    begin = 0
    while begin < len(wave):
        size = int((_LONGEST_PIECE * rate) ** chance.random())
        yield wave[begin : begin + size]
        begin += size


def streamed(
    tokenizer: Tokenizer, wave: NDArray[np.float32], rate: int, window: WindowRule | None, chance: random.Random
) -> tuple[Units, int]:
    """Units of one stream of float32 [N] samples at `rate`, in random pieces, and the number of near-ties."""
    with tokenizer.stream(rate, window=window) as stream:
        parts = [stream.push(piece) for piece in random_pieces(wave, rate, chance)]
        parts.append(stream.flush())
        return Units.concatenate(parts), stream.ties


def streamed_together(
    tokenizer: Tokenizer, waves: Sequence[Loaded], together: int, chance: random.Random
) -> tuple[list[Units], int]:
    """Units of streams of which up to `together` are open at a time, each at another place; number of near-ties.

    Every turn pushes the next random piece of all open streams in one batch; a stream that ends makes room for another.
    """
    streams = tokenizer.streams()
    pieces = [random_pieces(wave, rate, chance) for wave, rate in waves]
    parts: list[list[Units]] = [[] for _ in waves]
    waiting, active = list(range(len(waves))), list[int]()
    while waiting or active:
        while waiting and len(active) < together:
            active.append(waiting.pop(0))
            streams.open(active[-1], waves[active[-1]][1])
        turn = {i: piece for i in active if (piece := next(pieces[i], None)) is not None}
        given, rest = streams.push(turn), streams.flush(i for i in active if i not in turn)
        for i in active:
            parts[i].append(given[i] if i in turn else rest[i])
        active = list(turn)
    return [Units.concatenate(part) for part in parts], streams.ties


def _each_streamed(
    tokenizer: Tokenizer, waves: Sequence[Loaded], window: WindowRule | None, chance: random.Random
) -> tuple[list[Units], int]:
    results = [streamed(tokenizer, wave, rate, window, chance) for wave, rate in waves]
    return [units for units, _ in results], sum(ties for _, ties in results)


def _at_another_rate(wave: Loaded, turn: int) -> Loaded:
    samples, rate = wave
    others = [other for other in _RATES if other != rate]
    chosen = others[turn % len(others)]
    return resample(samples, rate, chosen), chosen


def _compare(name: str, found: Sequence[Units], expected: Sequence[Units], ties: int) -> dict[str, Any]:
    frames = equal = files = 0
    for a, b in zip(found, expected, strict=True):
        files += a == b
        frames += max(len(a), len(b))
        # Units are paired by their start: segments need not be equally many.
        _, left, right = np.intersect1d(a.starts, b.starts, assume_unique=True, return_indices=True)
        same = np.atleast_2d(a.ids[..., left] == b.ids[..., right]).all(axis=0)
        equal += int((same & (a.ends[left] == b.ends[right])).sum())
    return {
        "name": name,
        "files": len(expected),
        "files_identical_rate": files / max(1, len(expected)),
        "frames_identical_rate": equal / max(1, frames),
        "ties": ties,
    }


_JOB = """
import json, sys
from speechtok.corpus.engine import tokenize
print("ready", flush=True)
tokenize(**json.loads(sys.argv[1]))
"""


def _killed_and_resumed(
    utterances: Sequence[Utterance], tokenizer: Tokenizer, chance: random.Random
) -> tuple[bool, int]:
    """Whether a job that is killed at random moments ends with the bytes of one that is not, and how often it was."""
    with tempfile.TemporaryDirectory(prefix="speechtok-verify-") as folder:
        root = Path(folder)
        manifest = root / "files.jsonl"
        lines = [json.dumps({"key": f"{i:06d}", "path": u.file}) for i, u in enumerate(utterances)]
        manifest.write_text("\n".join(lines) + "\n")
        tokenizer.save(root / "tokenizer")
        job: dict[str, Any] = {"source": str(manifest), "tokenizer": str(root / "tokenizer"), "shard_seconds": 20.0}
        length, _ = _run(job | {"out": str(root / "once")}, None)
        kills = 0
        for _ in range(_KILLS):
            _, killed = _run(job | {"out": str(root / "killed")}, chance.uniform(0.1, 0.9) * length)
            kills += killed
        tokenize(**(job | {"out": str(root / "killed")}))
        return _contents(root / "once") == _contents(root / "killed"), kills


def _run(job: dict[str, Any], kill_after: float | None) -> tuple[float, bool]:
    """Run a job in a process and kill it some time after its imports; seconds it ran, and whether it was killed."""
    command = [sys.executable, "-c", _JOB, json.dumps(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # noqa: S603
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        process.stdout.readline()
        begin = time.perf_counter()
        try:
            _, errors = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return time.perf_counter() - begin, True
        if process.returncode:
            reason = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise SpeechtokError(f"a job of the check failed: {' '.join(reason)}")
        return time.perf_counter() - begin, False


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
