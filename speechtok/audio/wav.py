"""RIFF headers: for sound that comes through a pipe, and to notice truncated files."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import AudioError

__all__ = ["ENCODINGS", "WavHeader", "pcm_blocks", "read_header"]

# Name -> bytes per sample.
ENCODINGS = {"u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4, "f64le": 8}

_EXTENSIBLE = 0xFFFE
# Declared sizes from here on, and 0, mean "unknown": writers that cannot seek back leave them.
_UNKNOWN_SIZE = 0x7FFFF000


@dataclass(frozen=True)
class WavHeader:
    """Format of a RIFF wave stream.

    Parameters
    ----------
    encoding : str or None
        A key of `ENCODINGS`; None for compressed data.
    channels, sample_rate : int
    data_bytes : int or None
        Declared size of the samples; None where the writer did not know it.
    """

    encoding: str | None
    channels: int
    sample_rate: int
    data_bytes: int | None


def read_header(file: BinaryIO, name: str) -> WavHeader:
    """Read up to the first byte of samples.

    Parameters
    ----------
    file : binary stream at its start; need not be seekable
    name : str
        For messages.

    Raises
    ------
    AudioError
        If this is no RIFF wave stream.
    """
    riff = file.read(12)
    if riff[:4] != b"RIFF" or riff[8:12] != b"WAVE":
        raise AudioError(f"{name}: not a RIFF wave stream; give --encoding and --rate for raw PCM")
    encoding, channels, rate = None, 0, 0
    while True:
        chunk = file.read(8)
        if len(chunk) < 8:
            raise AudioError(f"{name}: ends inside its header, before any samples")
        kind, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if kind == b"data":
            if channels == 0:
                raise AudioError(f"{name}: samples come before the format chunk; the header is damaged")
            return WavHeader(encoding, channels, rate, None if size == 0 or size >= _UNKNOWN_SIZE else size)
        body = file.read(size + size % 2)
        if kind == b"fmt " and len(body) >= 16:
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            if tag == _EXTENSIBLE and len(body) >= 26:
                tag = struct.unpack("<H", body[24:26])[0]
            names = {
                (1, 8): "u8",
                (1, 16): "s16le",
                (1, 24): "s24le",
                (1, 32): "s32le",
                (3, 32): "f32le",
                (3, 64): "f64le",
            }
            encoding = names.get((tag, bits))


def pcm_to_float(data: bytes, encoding: str, channels: int) -> NDArray[np.float32]:
    """Interleaved PCM bytes -> float32 [n, channels] in [-1, 1]."""
    if encoding == "s24le":
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = padded.view("<i4")[:, 0] / np.float32(2**31)
    elif encoding == "u8":
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    else:
        samples = np.frombuffer(data, {"s": "<i", "f": "<f"}[encoding[0]] + str(ENCODINGS[encoding]))
        if encoding[0] == "s":
            samples = samples / np.float32(2 ** (8 * ENCODINGS[encoding] - 1))
    return samples.astype(np.float32).reshape(-1, channels)


def pcm_blocks(
    file: BinaryIO, encoding: str, channels: int, block: int, limit: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """Interleaved PCM from a stream as float32 blocks [n, channels], as soon as bytes arrive.

    Parameters
    ----------
    file : binary stream
    encoding : str
        A key of `ENCODINGS`.
    channels : int
    block : int
        At most this many samples per block.
    limit : int, optional
        Stop after this many bytes (chunks that follow the samples of a wave file).
    """
    width = ENCODINGS[encoding] * channels
    read = getattr(file, "read1", file.read)
    rest, left = b"", limit
    while left is None or left > 0:
        data = read(block * width if left is None else min(block * width, left))
        if not data:
            break
        if left is not None:
            left -= len(data)
        rest += data
        whole = len(rest) // width * width
        if whole:
            yield pcm_to_float(rest[:whole], encoding, channels)
            rest = rest[whole:]
    if left:
        raise AudioError(f"the stream ends {left} bytes before the end that its header promises")
    if rest:
        raise AudioError(f"the stream ends inside a sample ({len(rest)} of {width} bytes); is it really {encoding}?")
