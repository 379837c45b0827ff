"""Time greedy segmentation against the PyPI package ``sylber``, on one core, d = 768.

Frames are synthetic and like Sylber's: syllables of 0.1 to 0.4 s with soft edges, a fifth of the time silence. Both
sides run in turns; boundaries are compared. The floor is the time in which a compiled loop adds up all frames twice.
The package comes from a folder of its own (``--oracle``, see the Makefile), of which one file is loaded.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from speechtok.benchmarks.runner import interleaved, machine, parser, write

from speechtok.segmenters import GreedyStream, greedy_segment

WIDTH = 768
RATE = 50
AGAINST = (60, 300)  # seconds
MINUTES = (1, 5, 20, 60)
THRESHOLDS = (2.6, 0.8)
CHUNK = 16  # frames per push of a stream


def syllables(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Frames float32 [T, 768]."""
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE)
    frames = np.zeros((count, WIDTH), np.float32)
    place = 0
    while place < count:
        length = int(rng.integers(5, 21))
        if rng.random() > 0.2:
            centre = rng.standard_normal(WIDTH, np.float32)
            frames[place : place + length] = centre * (6 / np.linalg.norm(centre))
        place += length
    frames[1:-1] = (frames[:-2] + frames[1:-1] + frames[2:]) / 3
    for begin in range(0, count, 10_000):
        part = frames[begin : begin + 10_000]
        part += rng.standard_normal(part.shape, np.float32) * np.float32(0.05)
    return frames


@numba.njit(fastmath=True, cache=True)
def _read_twice(frames):  # type: ignore[no-untyped-def]
    flat = frames.reshape(-1)
    total = np.float32(0)
    for _ in range(2):
        for i in range(len(flat)):
            total += flat[i] * flat[i]
    return total


def load_package(folder: Path) -> Callable[..., Any]:
    """`get_segment`, without importing the rest of the package."""
    spec = importlib.util.spec_from_file_location("segment_utils", folder / "sylber" / "utils" / "segment_utils.py")
    if spec is None or spec.loader is None or not folder.is_dir():
        raise SystemExit(f"{folder} does not hold the package sylber; `make lint` puts it there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Any] = module.get_segment
    return found


def stream(frames: NDArray[np.float32]) -> NDArray[np.int64]:
    """All segments of frames that come in small pieces."""
    opened = GreedyStream(*THRESHOLDS)
    spans = [opened.push(frames[begin : begin + CHUNK]) for begin in range(0, len(frames), CHUNK)]
    return np.concatenate([*spans, opened.flush()])


def scaled(times: dict[str, float], factor: float) -> dict[str, float]:
    """Median and smallest of a case in another unit; on a busy machine the smallest tells more."""
    return {name: factor * times[name] for name in ("median", "min")}


def ratio(times: dict[str, dict[str, float]], above: str, below: str) -> dict[str, float]:
    """Of medians, and of smallest times."""
    return {name: times[above][name] / times[below][name] for name in ("median", "min")}


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--oracle", type=Path, default=Path(".venv/oracles"))
    chosen = options.parse_args()
    numba.set_num_threads(1)
    package = load_package(chosen.oracle)
    result: dict[str, Any] = {"machine": machine(), "width": WIDTH, "against": {}, "frame_cost": {}}
    for seconds in AGAINST:
        frames = syllables(seconds)
        found = greedy_segment(frames, *THRESHOLDS)
        runs = {
            "sylber": partial(package, frames, *THRESHOLDS),
            "speechtok": partial(greedy_segment, frames, *THRESHOLDS),
            "speechtok stream": partial(stream, frames),
            "read twice": partial(_read_twice, frames),
        }
        times = interleaved(runs, chosen.repeats)
        result["against"][f"{seconds} s"] = {
            "segments": len(found),
            "equal": bool(np.array_equal(found, package(frames, *THRESHOLDS)))
            and bool(np.array_equal(found, stream(frames))),
            "milliseconds": {name: scaled(value, 1000) for name, value in times.items()},
            "speedup": ratio(times, "sylber", "speechtok"),
            "times_the_floor": ratio(times, "speechtok", "read twice"),
        }
    for minutes in MINUTES:
        frames = syllables(60 * minutes)
        runs = {"speechtok": partial(greedy_segment, frames, *THRESHOLDS), "read twice": partial(_read_twice, frames)}
        times = interleaved(runs, min(3, chosen.repeats))
        result["frame_cost"][f"{minutes} min"] = {
            f"{name}, ns": scaled(value, 1e9 / len(frames)) for name, value in times.items()
        }
    write(chosen.json, result)


if __name__ == "__main__":
    main()
