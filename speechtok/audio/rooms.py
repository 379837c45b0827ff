"""Simulated rooms: responses of shoebox rooms by the image-source method (Allen and Berkley 1979).

Every reflection is the direct sound of a mirror image of the source, fainter by its distance and by one factor for each
wall on its way. Arrivals fall between samples: each is a sinc under a Hann window of 81 samples. `SimulatedRooms` draws
the rooms of NAST's sampler and stands wherever measured responses do.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from speechtok.audio.clips import Report, Wave
from speechtok.audio.mixing import fft_size
from speechtok.errors import AudioError

__all__ = ["MAX_RT60", "MIN_RT60", "Shoebox", "SimulatedRooms", "draw_room"]

SPEED = 343.0  # m/s
MIN_RT60, MAX_RT60 = 0.05, 2.0  # s; the number of images grows with the third power
RANGES = ((0.4, 1.0), (0.2, 0.6), (0.1, 0.3))  # of RT60 that is drawn (s): high, medium, low, equally likely
WALL = 0.5  # m between a wall and source or microphone that are drawn

_HALF = 40  # samples on either side of an arrival
_FINER = 32  # arrivals are put between two places of a grid so many times finer; error below 0.12 % at half the rate
_RUMBLE_HZ = 50.0
_DIRECTIONS = 24  # a side of the grid over which directions are averaged


@dataclass(frozen=True)
class Shoebox:
    """A room with six walls that reflect alike, a source and a microphone.

    Parameters
    ----------
    size, source, microphone : (float, float, float)
        In m, from a corner.
    rt60 : float
        Reverberation time (s), 0.05 ... 2: three times the time in which the diffuse field falls from -5 to -25 dB
        (T20).

    Notes
    -----
    Absorption follows from `rt60` by the decay of the image sources themselves: averaged over all directions, as
    Lehmann and Johansson (2008) derive it. Sabine's and Eyring's formulas assume one mean free path for all directions;
    with Eyring's, responses of rooms of 5 to 10 m ring 24 % longer than asked for. Here T20 of 0.2 s and more comes out
    within 15 % (on average 2 % too short, standard deviation 4 %). A large room with less has few reflections before it
    is silent, and no even decay.

    Raises
    ------
    AudioError
        If source or microphone lie outside or in one place, or the time is out of bounds.
    """

    size: tuple[float, float, float]
    source: tuple[float, float, float]
    microphone: tuple[float, float, float]
    rt60: float

    def __post_init__(self) -> None:
        for name in ("source", "microphone"):
            if not all(0 < place < side < math.inf for place, side in zip(getattr(self, name), self.size, strict=True)):
                raise AudioError(f"{name}={getattr(self, name)} lies outside of the room of size {self.size} m")
        if self.distance == 0:
            raise AudioError(f"source and microphone are in one place, {self.source}")
        if not MIN_RT60 <= self.rt60 <= MAX_RT60:
            raise AudioError(f"rt60={self.rt60}: {MIN_RT60} to {MAX_RT60:g} s can be simulated")

    @property
    def distance(self) -> float:
        """From the source to the microphone (m)."""
        return math.dist(self.source, self.microphone)

    @property
    def reflection(self) -> float:
        """Factor on the pressure at a wall; absorption is 1 minus its square."""
        cosine = (np.arange(_DIRECTIONS)[:, None] + 0.5) / _DIRECTIONS  # of the angle to the vertical: even on a sphere
        azimuth = (np.arange(_DIRECTIONS) + 0.5) * (np.pi / 2 / _DIRECTIONS)
        sine = np.sqrt(1 - cosine**2)
        # Walls that sound meets in a second, by direction.
        meetings = sine * np.cos(azimuth) / self.size[0] + sine * np.sin(azimuth) / self.size[1] + cosine / self.size[2]
        rates = 2 * SPEED * meetings.ravel()  # of energy, for a loss of one neper at each wall
        times = np.linspace(0, 16 / rates.mean(), 400)
        left = (np.exp(-np.outer(times, rates)) / rates).sum(1)  # energy still to come
        begin, end = np.interp((5, 25), -10 * np.log10(left / left[0]), times)
        return math.exp(-3 * (end - begin) / self.rt60)

    def response(self, sample_rate: int) -> Wave:
        """Room response: float32 [n] at `sample_rate` (Hz), as long as `rt60` behind the direct sound.

        The direct sound arrives at sample ``40 + sample_rate * distance / 343``. All images that arrive in time are
        there, so the order has no other bound. Images all have one sign and would add up to a rumble that no room has;
        a high-pass (Butterworth, order 2, 50 Hz, causal) takes it out, as Allen and Berkley do.
        """
        response = image_response(self, sample_rate)
        size = fft_size(len(response) + sample_rate // 5)  # the high-pass has died away after a fifth of a second
        s = 1j * np.fft.rfftfreq(size, 1 / sample_rate) / _RUMBLE_HZ
        high_pass = s * s / (s * s + math.sqrt(2) * s + 1)
        return np.fft.irfft(np.fft.rfft(response, size) * high_pass, size)[: len(response)].astype(np.float32)


def image_response(room: Shoebox, sample_rate: int) -> NDArray[np.float64]:
    """Sum over images of ``factor / (4 pi distance)``, without the high-pass: float64 [n]."""
    seconds = room.rt60 + room.distance / SPEED
    length = _HALF + int(seconds * sample_rate) + 2
    grid = np.zeros(length * _FINER)
    loss = -math.log(room.reflection)
    axes = [_axis(*axis, seconds * SPEED, loss) for axis in zip(room.size, room.source, room.microphone, strict=True)]
    _scatter(*axes[0], *axes[1], *axes[2], _FINER * sample_rate / SPEED, float(_HALF * _FINER), seconds * SPEED, grid)
    # One row of the filter for each sample around an arrival, one column for each place between two samples.
    near = np.arange(-_HALF, _HALF + 1)
    offset = near[:, None] - np.arange(_FINER) / _FINER
    taps = np.where(np.abs(offset) < _HALF, np.sinc(offset) * (0.5 + 0.5 * np.cos(np.pi * offset / _HALF)), 0.0)
    out = np.zeros(length + 2 * _HALF)
    for begin, row in enumerate(taps @ grid.reshape(length, _FINER).T):
        out[begin : begin + length] += row
    return out[_HALF : _HALF + length] / (4 * np.pi)


def _axis(
    side: float, source: float, microphone: float, far: float, loss: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Images along one axis: where they are, seen from the microphone (m), and their factor."""
    order = np.arange(-math.ceil(far / (2 * side)) - 1, math.ceil(far / (2 * side)) + 2)
    places = np.concatenate((2 * order * side + source, 2 * order * side - source)) - microphone
    reflections = np.concatenate((2 * np.abs(order), np.abs(order - 1) + np.abs(order)))
    return places, np.exp(-loss * reflections)


@numba.njit(nogil=True, cache=True)
def _scatter(x, x_factor, y, y_factor, z, z_factor, scale, lead, far, grid):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    for i in range(len(x)):
        for j in range(len(y)):
            flat = x[i] * x[i] + y[j] * y[j]
            rest = far * far - flat
            for k in range(len(z)):
                high = z[k] * z[k]
                if high < rest:
                    distance = math.sqrt(flat + high)
                    place = distance * scale + lead
                    index = int(place)
                    size = x_factor[i] * y_factor[j] * z_factor[k] / distance
                    share = (place - index) * size
                    grid[index] += size - share
                    grid[index + 1] += share


def draw_room(generator: np.random.Generator, rt60: float | None = None) -> Shoebox:
    """Draw a room as NAST's sampler does.

    Sides of 5 to 10 m, 3 to 4 m high; source and microphone 0.66 to 2 m apart, both 0.9 to 1.8 m high and at least
    half a metre from walls; reverberation high (0.4 to 1.0 s), medium (0.2 to 0.6 s) or low (0.1 to 0.3 s) with equal
    chance. Every call takes ten values from the generator.

    Parameters
    ----------
    generator : numpy.random.Generator
    rt60 : float, optional
        Reverberation time (s) instead of the one that is drawn; all else stays.

    Returns
    -------
    Shoebox
    """
    values = generator.random(10).tolist()
    size = (5 + 5 * values[0], 5 + 5 * values[1], 3 + values[2])
    heights = (0.9 + 0.9 * values[3], 0.9 + 0.9 * values[4])
    apart = 0.66 + 1.34 * values[5]
    # Above each other where heights differ by more than the distance: that is within 0.66 ... 2 m, too.
    flat = math.sqrt(max(0.0, apart**2 - (heights[0] - heights[1]) ** 2))
    offset = (flat * math.cos(2 * math.pi * values[6]), flat * math.sin(2 * math.pi * values[6]))
    # The microphone where both are far enough from the walls.
    low = [WALL - min(0.0, step) for step in offset]
    high = [side - WALL - max(0.0, step) for side, step in zip(size[:2], offset, strict=True)]
    x, y = (a + (b - a) * value for a, b, value in zip(low, high, values[7:9], strict=True))
    # One value says which of the three ranges, and where in it.
    third, place = divmod(3 * values[9], 1.0)
    begin, end = RANGES[int(third)]
    drawn = begin + (end - begin) * place
    return Shoebox(
        size, (x + offset[0], y + offset[1], heights[1]), (x, y, heights[0]), drawn if rt60 is None else rt60
    )


class SimulatedRooms:
    """Responses of rooms that `draw_room` draws, another one every time; a `speechtok.audio.clips.ClipSource`."""

    identity = "simulated"

    def __str__(self) -> str:
        """Describe them for tables: how reverberation is drawn."""
        ranges = ", ".join(f"{low:g} to {high:g} s" for low, high in RANGES)
        return f"simulated rooms; RT60 from one of {ranges}, each as likely"

    def draw(self, generator: np.random.Generator, sample_rate: int, rt60: float | None = None) -> tuple[Wave, Report]:
        """Give a response, float32 [n] at `sample_rate` (Hz), and its ``rt60`` (s), sides and ``distance_m``.

        A room takes about 4 ms on one core at an `rt60` of 0.3 s, 25 ms at 1 s.

        Parameters
        ----------
        generator : numpy.random.Generator
        sample_rate : int
            In Hz.
        rt60 : float, optional
            See `draw_room`.

        Raises
        ------
        AudioError
            If `rt60` is out of bounds.
        """
        room = draw_room(generator, rt60)
        sides = dict(zip(("length_m", "width_m", "height_m"), room.size, strict=True))
        return room.response(sample_rate), {"rt60": room.rt60, **sides, "distance_m": room.distance}
