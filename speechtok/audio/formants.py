"""A cascade formant synthesizer: sound from tracks of formants and amplitudes (Klatt 1980, J. Acoust. Soc. Am. 67).

Voice and aspiration pass through five resonators in a row; frication passes through one beside them. It speaks
syllables for probes, where every parameter has to be known and to move alone; it does not sound like a person.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["FIELDS", "SAMPLE_RATE", "speak"]

Wave = NDArray[np.float32]
Floats = NDArray[np.float64]

SAMPLE_RATE = 16000  # Hz

# Columns of a track: the first three formants (Hz), amplitudes of voice, of aspiration and of frication (linear), and
# the centre and bandwidth of frication (Hz).
FIELDS = ("f1", "f2", "f3", "voice", "breath", "friction", "centre", "width")

_F4, _F5 = 3500.0, 4500.0
_BANDWIDTHS = (60.0, 90.0, 150.0, 250.0, 350.0)
_PEAK, _FADE = 0.3, 0.005  # amplitude of the result, and seconds at either end


@numba.njit(cache=True)
def _resonate(x, frequency, width, rate, gain_at_dc):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Two-pole resonator with a frequency and a bandwidth (Hz) for each sample (Klatt 1980, equation 2)."""
    y = np.empty_like(x)
    past, before = 0.0, 0.0
    for n in range(len(x)):
        r = np.exp(-np.pi * width[n] / rate)
        b, c = 2 * r * np.cos(2 * np.pi * frequency[n] / rate), -r * r
        # Formants pass 0 Hz with gain 1; frication is scaled to about 1 at its peak.
        a = 1 - b - c if gain_at_dc else (1 - r) * (1 + r)
        y[n] = a * x[n] + b * past + c * before
        past, before = y[n], past
    return y


def _pulses(pitch: Floats, rate: int) -> Floats:
    """Glottal flow, differentiated: one cycle of Rosenberg's (1971) pulse per period of `pitch` (Hz) [N]."""
    phase = np.cumsum(pitch / rate) % 1.0
    opening, closing = 0.4, 0.16
    flow = np.where(
        phase < opening,
        0.5 * (1 - np.cos(np.pi * phase / opening)),
        np.where(phase < opening + closing, np.cos(0.5 * np.pi * (phase - opening) / closing), 0.0),
    )
    return np.diff(flow, prepend=flow[0]) * rate / 1000


def speak(times: Floats, table: Floats, pitch: tuple[float, float], seed: int) -> Wave:
    """Make the sound of a track.

    Parameters
    ----------
    times : float64 [P]
        Not falling, from 0 (s).
    table : float64 [P, 8]
        Parameters at these times, in the order of `FIELDS`; linear between them.
    pitch : (float, float)
        At the start and the end, 40 to 500 (Hz); linear between.
    seed : int
        Of the noise: the n-th sample of it is the same whatever the track.

    Returns
    -------
    float32 [N]
        At `SAMPLE_RATE`; the peak is 0.3.

    Raises
    ------
    InputError
        If the track has another shape or lasts less than 20 ms, or the pitch is out of bounds.
    """
    if table.shape != (len(times), len(FIELDS)) or len(times) < 2 or (np.diff(times) < 0).any() or times[-1] < 0.02:
        raise InputError(
            f"a track of {list(table.shape)} at {len(times)} times: give [P, {len(FIELDS)}] over 20 ms or more"
        )
    if not all(40 <= hertz <= 500 for hertz in pitch):
        raise InputError(f"pitch {pitch} Hz: give 40 to 500 Hz at the start and the end")
    count = round(times[-1] * SAMPLE_RATE)
    clock = np.arange(count) / SAMPLE_RATE
    value = {name: np.interp(clock, times, table[:, i]) for i, name in enumerate(FIELDS)}
    hiss = np.random.default_rng(seed).normal(size=(count, 2)).T.copy()
    pulses = _pulses(np.linspace(*pitch, count), SAMPLE_RATE)
    x = value["voice"] * pulses + 0.3 * value["breath"] * hiss[0]
    formants = [value["f1"], value["f2"], value["f3"], np.full(count, _F4), np.full(count, _F5)]
    for frequency, width in zip(formants, _BANDWIDTHS, strict=True):
        x = _resonate(x, frequency, np.full(count, width), SAMPLE_RATE, True)
    x = x + value["friction"] * _resonate(hiss[1], value["centre"], value["width"], SAMPLE_RATE, False)
    fade = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / (_FADE * SAMPLE_RATE))
    return np.asarray(_PEAK * fade * x / max(1e-9, np.abs(x).max()), np.float32)
