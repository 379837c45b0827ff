"""Report what exact streams cost and that they keep their promise.

Latency: what a unit waits for (look-ahead, the rest of its chunk), and the time that pushes of several lengths compute.
Identity: real files at several sample rates in random pieces of 1 sample to 2 seconds, alone and many at once, against
the units of the whole files. Throughput: many streams at different places in one batch against one after the other.
Memory: of the process and of the saved state over a long stream. All on one thread, unless told otherwise.
"""

import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from speechtok.benchmarks.runner import interleaved, machine, parser, write

import speechtok
from speechtok.audio.decode import load
from speechtok.audio.resample import resample
from speechtok.corpus.sources import scan
from speechtok.errors import InputError
from speechtok.evaluation.verify import Loaded, feature_difference, streamed, streamed_together
from speechtok.registry import DEFAULT
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

PUSHES = (0.08, 0.16, 0.32, 0.64)  # seconds
RATES = (8_000, 16_000, 22_050, 44_100, 48_000)  # Hz
MARKS = (1 / 60, 1 / 6, 0.5, 1.0, 2.0)  # hours at which memory is read


def looped(waves: list[NDArray[np.float32]], seconds: float, rate: int) -> NDArray[np.float32]:
    """The sounds one after the other, again and again: float32 [seconds * rate]."""
    return np.resize(np.concatenate(waves), int(seconds * rate))


def latency(tokenizer: Tokenizer, wave: NDArray[np.float32], push_seconds: float) -> dict[str, float]:
    """Compute time (ms) of equal pushes of float32 [N] samples, and of the chunks that they complete."""
    step, context = int(push_seconds * tokenizer.sample_rate), tokenizer.encoder.context
    pushes, chunks = [], []
    with tokenizer.stream() as stream:
        stream.push(wave[: 4 * tokenizer.sample_rate])  # past the start, where chunks hold fewer frames
        for begin in range(4 * tokenizer.sample_rate, len(wave) - step + 1, step):
            start = time.perf_counter()
            units = stream.push(wave[begin : begin + step])
            pushes.append(1000 * (time.perf_counter() - start))
            if len(units) and context is not None:
                chunks.append(pushes[-1] * context.chunk / len(units))
        ties = stream.ties
    return {
        "pushes": len(pushes),
        "push_median_ms": float(np.median(pushes)),
        "push_p99_ms": float(np.percentile(pushes, 99)),
        "chunk_median_ms": float(np.median(chunks)),
        "chunk_p99_ms": float(np.percentile(chunks, 99)),
        "share_of_real_time": sum(pushes) / 1000 / (len(pushes) * push_seconds),
        "near_ties": ties,
    }


def agreement(found: list[Units], expected: list[Units], ties: int) -> dict[str, Any]:
    """How many files agree in all units."""
    return {
        "files": len(expected),
        "identical_files": sum(a == b for a, b in zip(found, expected, strict=True)),
        "frames": sum(map(len, expected)),
        "near_ties": ties,
    }


def identity(tokenizer: Tokenizer, waves: list[NDArray[np.float32]], together: int) -> dict[str, Any]:
    """Streams against whole files: one by one at each rate, then many at once at mixed rates."""
    result, mixed = {}, []
    for i, rate in enumerate(RATES):
        given = [(resample(wave, tokenizer.sample_rate, rate), rate) for wave in waves]
        expected = [tokenizer.encode(*wave) for wave in given]
        found = [streamed(tokenizer, wave, rate, None, random.Random(n)) for n, (wave, rate) in enumerate(given)]
        result[f"{rate} Hz"] = agreement([units for units, _ in found], expected, sum(ties for _, ties in found))
        mixed += list(zip(given, expected, strict=True))[i :: len(RATES)]
    units, ties = streamed_together(tokenizer, [wave for wave, _ in mixed], together, random.Random(0))
    result[f"{together} at once, mixed rates"] = agreement(units, [expected for _, expected in mixed], ties)
    return result


@torch.inference_mode()
def chunk_difference(tokenizer: Tokenizer, waves: list[NDArray[np.float32]]) -> float:
    """Largest relative difference (Euclidean norm per frame) between chunks from a state and whole files."""
    encoder, context = tokenizer.encoder, tokenizer.encoder.context
    worst = 0.0
    if context is None or not encoder.chunked:
        return worst
    width, hop = encoder.grid.num_samples(context.chunk), encoder.hop
    for wave in waves:
        whole = encoder(torch.from_numpy(wave)[None].to(tokenizer.device)).features[0]
        state, parts, positions = encoder.stream_state(1), [], len(whole) + context.look_ahead
        for begin in range(0, positions, context.chunk):
            piece = torch.from_numpy(wave[begin * hop : begin * hop + width].copy())
            frames, state = encoder.advance(
                torch.nn.functional.pad(piece, (0, width - len(piece)))[None].to(tokenizer.device),
                torch.tensor([len(piece)], device=tokenizer.device),
                torch.tensor([min(context.chunk, positions - begin)], device=tokenizer.device),
                state,
            )
            parts.append(frames[0])
        chunks = torch.cat(parts)[context.look_ahead :][: len(whole)]
        relative = (chunks - whole).norm(dim=1) / whole.norm(dim=1).clamp_min(1e-12)
        worst = max(worst, float(relative.max()) if len(whole) else 0.0)
    return worst


def throughput(
    tokenizer: Tokenizer, wave: NDArray[np.float32], together: int, seconds: float, repeats: int
) -> dict[str, Any]:
    """Seconds of sound per second of computing: pushes of 320 ms, streams begin at different places of their chunks."""
    rate = tokenizer.sample_rate
    step = int(0.32 * rate)
    starts = np.random.default_rng(0).integers(1, step, together)
    sounds = [wave[start : start + int(seconds * rate)] for start in starts]

    def pieces(n: int) -> Iterator[NDArray[np.float32]]:
        yield sounds[n][: starts[n]]
        for begin in range(starts[n], len(sounds[n]), step):
            yield sounds[n][begin : begin + step]

    def one_by_one() -> None:
        for n in range(together):
            with tokenizer.stream() as stream:
                for piece in pieces(n):
                    stream.push(piece)
                stream.flush()

    def at_once() -> None:
        streams, turns = tokenizer.streams(), [pieces(n) for n in range(together)]
        for n in range(together):
            streams.open(n)
        while given := {n: piece for n, turn in enumerate(turns) if (piece := next(turn, None)) is not None}:
            streams.push(given)
        streams.flush()

    times = interleaved({"one_by_one": one_by_one, "at_once": at_once}, repeats)
    total = sum(map(len, sounds)) / rate
    speeds = {f"{name}_speed": total / spread["median"] for name, spread in times.items()}
    return {"streams": together, "seconds": times, **speeds}


def memory(tokenizer: Tokenizer, wave: NDArray[np.float32], hours: float) -> list[dict[str, float]]:
    """Process memory and size of the saved state on the way through a stream; pushes of one second."""
    import psutil

    rate, rows = tokenizer.sample_rate, []
    turn = np.resize(wave, (60, rate))
    marks = [int(3600 * mark) for mark in MARKS if mark < hours] + [int(3600 * hours)]
    with tokenizer.stream() as stream:
        for second in range(1, marks[-1] + 1):
            stream.push(turn[second % 60])
            if second in marks:
                rows.append(
                    {
                        "hours": round(second / 3600, 4),
                        "process_megabytes": psutil.Process().memory_info().rss / 1e6,
                        "state_bytes": len(pickle.dumps(stream.state())),
                    }
                )
    return rows


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--tokenizer", default=DEFAULT, help="name or folder of a tokenizer that streams exactly")
    options.add_argument("--data", type=Path, default=Path("../shared/data/speech/eval"))
    options.add_argument("--files", type=int, default=40, help="for the identity check")
    options.add_argument("--seconds", type=float, default=60.0, help="sound per latency row")
    options.add_argument("--streams", type=int, default=32, help="at once")
    options.add_argument("--stream-seconds", type=float, default=10.0, help="of each stream in the throughput row")
    options.add_argument("--hours", type=float, default=2.0, help="length of the memory run; 0: none")
    options.add_argument("--repeats", type=int, default=3, help="of the throughput row")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    tokenizer = speechtok.load(chosen.tokenizer)
    encoder, context = tokenizer.encoder, tokenizer.encoder.context
    if context is None:
        raise InputError(f"{tokenizer.name} does not stream exactly; this benchmark is for those that do")
    found = scan(chosen.data).utterances
    step = max(1, len(found) // chosen.files)
    waves = [load(utterance.open(), tokenizer.sample_rate) for utterance in found[::step][: chosen.files]]
    pairs: list[Loaded] = [(wave, tokenizer.sample_rate) for wave in waves]
    sound = looped(waves, max(chosen.seconds, chosen.stream_seconds + 1) + 4, tokenizer.sample_rate)
    result: dict[str, Any] = {
        "machine": machine(),
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "rate": tokenizer.rate},
        "look_ahead_ms": {
            "frames": 1000 * (context.look_ahead + context.right) * encoder.grid.hop_seconds,
            "chunk": 1000 * (context.chunk - 1) * encoder.grid.hop_seconds,
            "own_samples": 1000 * encoder.receptive_field / tokenizer.sample_rate,
            "worst_total": 1000 * tokenizer.stream().latency_seconds,
        },
        "rounding": {
            "stated": encoder.rounding,
            "batch_of_16": feature_difference(tokenizer, pairs[:16]),
            "chunks": chunk_difference(tokenizer, waves[:16]),
        },
    }
    latency(tokenizer, sound[: 8 * tokenizer.sample_rate], PUSHES[-1])  # warm-up
    result["latency"] = {f"{1000 * push:g} ms": latency(tokenizer, sound, push) for push in PUSHES}
    write(chosen.json, result)
    result["identity"] = identity(tokenizer, waves, chosen.streams)
    result["throughput"] = throughput(tokenizer, sound, chosen.streams, chosen.stream_seconds, chosen.repeats)
    write(chosen.json, result)
    if chosen.hours > 0:
        result["memory"] = memory(tokenizer, sound, chosen.hours)
        write(chosen.json, result)


if __name__ == "__main__":
    main()
