"""Time the constant-Q transform against librosa and nnAudio, and measure how far each is from the definition.

16 x 30 s at 24 kHz, 336 bins, 48 per octave, a frame every 320 samples: the target of MERT. librosa runs with its
default sparsity, which is faster than 0. Sounds are synthetic: decaying harmonic tones in pink noise. What takes the
better part of a minute runs once. Seconds of all cores beside those of the clock show what a busy machine hides.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import librosa
import numpy as np
import torch
from numpy.typing import NDArray
from speechtok.benchmarks.runner import arguments, interleaved, machine, write
from torch import Tensor

from speechtok.audio.cqt import C1, CQT

RATE, HOP, BINS, PER_OCTAVE = 24000, 320, 336, 48
ROWS, SECONDS = 16, 30
CHECKED = slice(50, 2200, 53)  # frames that are compared with the definition


def music(rows: int, seconds: int, seed: int = 0) -> NDArray[np.float32]:
    """A note every half second: float32 [rows, samples]."""
    rng = np.random.default_rng(seed)
    at = np.arange(seconds * RATE) / RATE
    spectrum = np.fft.rfft(rng.standard_normal((rows, len(at))))
    waves = 0.02 * np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(spectrum.shape[1]) / seconds / 50)), len(at))
    for row in waves:
        for begin in np.arange(0, seconds, 0.5):
            since = at[int(begin * RATE) : int((begin + 3) * RATE)] - begin
            pitch = 55 * 2 ** rng.uniform(0, 4)
            for partial_ in range(1, 9):
                tone = np.exp(-since * (1 + partial_)) * np.sin(2 * np.pi * pitch * partial_ * since)
                row[int(begin * RATE) : int(begin * RATE) + len(since)] += 0.1 / partial_ * tone
    return waves.astype(np.float32)


def definition(wave: NDArray[np.float32], hop: int) -> NDArray[np.float64]:
    """Products with librosa's wavelets at the full rate in float64 at the checked frames: magnitudes [bins, frames]."""
    centres = librosa.cqt_frequencies(n_bins=BINS, fmin=C1, bins_per_octave=PER_OCTAVE)
    found: list[NDArray[np.float64]] = []
    frames = range(len(wave) // hop + 1)[CHECKED]
    for first in range(0, BINS, PER_OCTAVE):
        wavelets, lengths = librosa.filters.wavelet(
            freqs=centres[first : first + PER_OCTAVE], sr=RATE, dtype=np.complex128
        )
        size = wavelets.shape[1]
        padded = np.pad(wave.astype(np.float64), size // 2)
        pieces = np.stack([padded[frame * hop : frame * hop + size] for frame in frames], 1)
        found.append(np.sqrt(lengths)[:, None] * np.abs(wavelets @ pieces))
    return np.concatenate(found)


def nnaudio() -> Callable[[Tensor], Tensor] | None:
    """Its transform, where the package is installed."""
    try:
        from nnAudio.features.cqt import CQT1992v2
    except ImportError:
        return None
    made: Callable[[Tensor], Tensor] = CQT1992v2(
        RATE, HOP, fmin=C1, n_bins=BINS, bins_per_octave=PER_OCTAVE, pad_mode="constant", verbose=False
    )
    return made


def once(case: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Result of a case, and its seconds by the clock and of all cores together."""
    clock, cores = time.perf_counter(), time.process_time()
    result = case()
    return result, {"clock": time.perf_counter() - clock, "cores": time.process_time() - cores}


def main() -> None:
    """Run and report."""
    options = arguments(__doc__)
    waves = music(ROWS, SECONDS)
    batch = torch.from_numpy(waves)
    settings: dict[str, Any] = {"hop": HOP, "bins": BINS, "bins_per_octave": PER_OCTAVE}
    cases: dict[str, Callable[[], Any]] = {
        "librosa": partial(
            librosa.cqt, waves, sr=RATE, hop_length=HOP, fmin=C1, n_bins=BINS, bins_per_octave=PER_OCTAVE
        ),
        "speechtok multirate": partial(CQT(RATE, **settings), batch),
    }
    slow: dict[str, Callable[[], Any]] = {
        "speechtok direct": partial(CQT(RATE, method="direct", **settings), batch),
    }
    other = nnaudio()
    if other is not None:
        slow["nnAudio"] = partial(other, batch)
    exact = definition(waves[0], HOP)
    errors, single = {}, {}
    with torch.inference_mode():
        times = interleaved(cases, options.repeats)
        for name, case in (cases | slow).items():
            values, single[name] = once(case)
            if name != "nnAudio":  # its wavelets are others
                got = np.abs(np.asarray(values[0]))[:, CHECKED]
                error = np.abs(got - exact).max(0) / exact.max(0)
                errors[name] = {"worst": float(error.max()), "median": float(np.median(error))}
    librosas = times["librosa"]
    result = {
        "machine": machine(),
        "rows": ROWS,
        "seconds_each": SECONDS,
        **settings,
        "nnaudio_installed": other is not None,
        "seconds": times,
        "seconds_of_one_run": single,
        "speedup_over_librosa": {key: librosas[key] / times["speechtok multirate"][key] for key in ("median", "min")},
        "speedup_over_librosa_by_seconds_of_cores": {
            name: single["librosa"]["cores"] / value["cores"] for name, value in single.items()
        },
        "error_of_frame_maximum": errors,
    }
    write(options.json, result)


if __name__ == "__main__":
    main()
