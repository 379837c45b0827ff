"""Time LiPCoT frames on one core, the Burg kernel beside ``librosa.lpc``, and the fit of a tokenizer.

A minute of noise whose spectrum and level change every 50 ms, at 16 kHz; windows of 25 ms every 20 ms, order 16, with
every feature, plain and warped. Both sides of the kernel get the same float64 windows, in turns, and their coefficients
are compared. Figures are seconds of sound per second of CPU time. "defaults" has order 12. The fit is that of
``lipcot-k256``: training speech is read, decoded and made into frames, of which a sample is clustered.
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import librosa
import numpy as np
import torch
from numpy.typing import NDArray
from speechtok.benchmarks.runner import interleaved, machine, parser, write
from torch import Tensor

from speechtok.encoders.lipcot import Feature, LipcotConfig, LipcotEncoder
from speechtok.kernels.burg import burg
from speechtok.training.kmeans import fit

RATE, SECONDS, CHANGE, ORDER, CLUSTERS = 16000, 60, 800, 16, 256
WARPS = (0.0, 0.58)


def sound(seed: int = 0) -> NDArray[np.float32]:
    """Noise through one resonance after the other: float32 [samples]."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(SECONDS * RATE // CHANGE):
        spectrum = np.fft.rfft(rng.standard_normal(CHANGE))
        turn = np.exp(-2j * np.pi * np.arange(len(spectrum)) / CHANGE)
        pole = rng.uniform(0.5, 0.98) * np.exp(1j * rng.uniform(0, np.pi))
        spectrum /= (1 - pole * turn) * (1 - pole.conj() * turn)
        pieces.append(np.fft.irfft(spectrum, CHANGE) * 10 ** rng.uniform(-3, -1.5))
    return np.concatenate(pieces).astype(np.float32)


def package(windows: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Coefficients [W, p] by librosa, without the leading one."""
    found: NDArray[np.float64] = librosa.lpc(windows, order=order)[:, 1:]
    return found


def encoders() -> dict[str, LipcotEncoder]:
    """The shipped one, and one of each feature and warping."""
    return {"defaults": LipcotEncoder().eval()} | {
        f"{feature}, warp {warp}": LipcotEncoder(LipcotConfig(order=ORDER, warp=warp, feature=feature)).eval()
        for feature in get_args(Feature)
        for warp in WARPS
    }


def speeds(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds of sound per second, of the median and of the fastest run."""
    return {name: {"median": SECONDS / row["median"], "best": SECONDS / row["min"]} for name, row in times.items()}


def fitted(data: str) -> dict[str, Any]:
    """CPU seconds of a fit with the defaults, and what was fitted."""
    begin, config = time.process_time(), LipcotConfig()
    _, report = fit(data, LipcotEncoder(config), CLUSTERS, name="lipcot")
    seconds = time.process_time() - begin
    hours = report["frames seen"] * config.hop / config.sample_rate / 3600
    return {"cpu_seconds": seconds, "hours": hours, "times_real_time": 3600 * hours / seconds} | report


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--data", type=Path, help="training speech, for the fit; default no fit")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time
    wave = torch.from_numpy(sound())[None]
    config = LipcotConfig(order=ORDER)
    windows: Tensor = wave[0].double().unfold(0, config.window, config.hop).contiguous()
    rows = windows.numpy()
    with torch.inference_mode():
        error = float(np.abs(burg(windows, ORDER)[0].numpy() - package(rows, ORDER)).max())
        frames = interleaved(
            {name: partial(encoder, wave) for name, encoder in encoders().items()}, chosen.repeats, clock
        )
        kernel: dict[str, Any] = {
            "librosa": partial(package, rows, ORDER),
            **{f"speechtok, warp {warp}": partial(burg, windows, ORDER, warp) for warp in WARPS},
        }
        times = interleaved(kernel, chosen.repeats, clock)
    result = {
        "machine": machine() | {"load": os.getloadavg()[0]},
        "seconds": SECONDS,
        "window": config.window,
        "hop": config.hop,
        "order": ORDER,
        "frames_times_real_time": speeds(frames),
        "kernel_times_real_time": speeds(times),
        "largest_difference_of_coefficients": error,
        "speedup_over_librosa": times["librosa"]["median"] / times["speechtok, warp 0.0"]["median"],
        "fit": None if chosen.data is None else fitted(str(chosen.data)),
    }
    write(chosen.json, result)


if __name__ == "__main__":
    main()
