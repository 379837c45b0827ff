"""Opus (RFC 6716) as the row to compare codecs with: the real encoder, libopus, as libsndfile carries it."""

import io

import numpy as np
import soundfile
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.errors import FormatError, InputError

__all__ = ["RATES", "packet_sizes", "through_opus"]

RATES = (8000, 12000, 16000, 24000, 48000)  # Hz that it encodes
_LOWEST, _HIGHEST = 6000, 256000  # bit/s a channel between which libsndfile spreads its compression levels
_HEADERS = 2  # packets before the sound


def through_opus(wave: NDArray[np.float32], sample_rate: int, bitrate: float) -> tuple[NDArray[np.float32], int]:
    """Encode and decode a wave.

    Variable bitrate, frames of 20 ms, as libopus chooses by itself; the encoder's delay is cut off.

    Parameters
    ----------
    wave : float32 [N]
    sample_rate : int
        One of `RATES` (Hz).
    bitrate : float
        What the encoder aims at (bit/s), 6000 to 256000.

    Returns
    -------
    decoded : float32 [N]
        At the same rate.
    bits : int
        Of the packets of sound, without the container.

    Raises
    ------
    InputError
        If rate or bitrate cannot be had, or this build of libsndfile has no Opus.
    """
    if sample_rate not in RATES or not _LOWEST <= bitrate <= _HIGHEST:
        raise InputError(
            f"Opus at {sample_rate} Hz and {bitrate:g} bit/s: it has {', '.join(map(str, RATES))} Hz and "
            f"{_LOWEST} to {_HIGHEST} bit/s"
        )
    if not soundfile.check_format("OGG", "OPUS"):
        raise InputError("this build of libsndfile has no Opus encoder; install the soundfile wheel")
    stream = io.BytesIO()
    level = 1.0 - (bitrate - _LOWEST) / (_HIGHEST - _LOWEST)
    soundfile.write(stream, wave, sample_rate, format="OGG", subtype="OPUS", compression_level=level)
    bits = 8 * sum(packet_sizes(stream.getvalue())[_HEADERS:])
    stream.seek(0)
    decoded = load(stream, sample_rate)
    return decoded, bits


def packet_sizes(data: bytes) -> list[int]:
    """Bytes of each packet of an Ogg stream (RFC 3533); FormatError if it is none."""
    sizes, size, at = [], 0, 0
    while at < len(data):
        if data[at : at + 4] != b"OggS":
            raise FormatError(f"no Ogg page begins at byte {at}; the stream is damaged")
        lacing = data[at + 27 : at + 27 + data[at + 26]]
        for value in lacing:
            size += value
            if value < 255:  # the packet ends; of 255 it goes on, on the next page if need be
                sizes.append(size)
                size = 0
        at += 27 + len(lacing) + sum(lacing)
    return sizes
