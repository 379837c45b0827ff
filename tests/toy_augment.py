"""What tests of augmentation share: tones, and noises and rooms without files."""

import math

import numpy as np

from speechtok.audio.augment import (
    AugmentResources,
)

RATE = 16000


def tone(hertz: float, seconds: float = 2.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def pitch_of(wave: np.ndarray) -> float:
    """Frequency of a tone in Hz: the top of a zero-padded spectrum of its middle, refined by a parabola."""
    middle = wave[len(wave) // 4 : -len(wave) // 4]
    size = 1 << 19
    spectrum = np.log(np.abs(np.fft.rfft(middle * np.hanning(len(middle)), size)) + 1e-12)
    top = int(spectrum.argmax())
    left, here, right = spectrum[top - 1 : top + 2]
    return (top + 0.5 * (left - right) / (left - 2 * here + right)) * RATE / size


def cents(a: float, b: float) -> float:
    return 1200 * math.log2(a / b)


class Tones:
    """A source of noises without files."""

    def __init__(self, seconds: float = 3.0, level: float = 1.0):
        self.seconds, self.level = seconds, level

    def draw(self, generator, sample_rate):
        hertz = 100 + 1000 * float(generator.random())
        time = np.arange(int(self.seconds * sample_rate)) / sample_rate
        return (self.level * np.sin(2 * np.pi * hertz * time)).astype(np.float32), {"hertz": hertz}


class Rooms:
    """Exponential decay behind a direct path: what a simulator of rooms could look like."""

    def draw(self, generator, sample_rate):
        decay = 0.05 + 0.2 * float(generator.random())
        time = np.arange(sample_rate // 4) / sample_rate
        response = 0.1 * np.sin(time * 9e4) * np.exp(-time / decay)
        response[20] = 1.0
        return response.astype(np.float32), {"decay": decay}


RESOURCES = AugmentResources(noises=Tones(), rooms=Rooms())
