"""Sound through lossy codecs: Opus (RFC 6716) and MP3, by the real encoders, libopus and LAME, inside libsndfile."""

import io
from typing import Literal

import numpy as np
import soundfile

from speechtok.audio.clips import Wave
from speechtok.audio.decode import as_sound, load
from speechtok.audio.resample import resample
from speechtok.audio.stretch import fit_length
from speechtok.errors import AudioError, FormatError, InputError

__all__ = ["CODECS", "MP3_RATES", "RATES", "Codec", "packet_sizes", "through_codec", "through_mp3", "through_opus"]

Codec = Literal["opus", "mp3"]
CODECS: tuple[Codec, ...] = ("opus", "mp3")

RATES = (8000, 12000, 16000, 24000, 48000)  # Hz that Opus encodes
_LOWEST, _HIGHEST = 6000, 256000  # bit/s a channel between which libsndfile spreads its compression levels
_HEADERS = 2  # packets before the sound

MP3_RATES = (16000, 22050, 24000)  # Hz of MPEG-2 layer III, the one with low bitrates
_MP3_LOWEST, _MP3_HIGHEST = 8000, 160000
# A frame of a low bitrate has no room for the tag that tells a decoder what to skip: 576 samples of the encoder, 528
# and 1 of the decoder.
_MP3_DELAY = 576 + 528 + 1


def through_codec(wave: Wave, sample_rate: int, codec: Codec, bitrate: float) -> Wave:
    """Encode and decode a wave of any sample rate; what comes out has its length and is in time with it.

    The codec runs at the lowest of its rates that is no lower than the wave's, or at its highest. So MP3 ends at
    12 kHz, as it does in use at low bitrates. Sound above full scale is brought to full scale for the codec, and back.

    Parameters
    ----------
    wave : float32 [n]
    sample_rate : int
        In Hz.
    codec : {"opus", "mp3"}
    bitrate : float
        In bit/s: 6000 to 256000 for Opus, 8000 to 160000 for MP3.

    Returns
    -------
    float32 [n]
        Of speech, within 1 ms of the wave's time.

    Raises
    ------
    AudioError
        If the wave is empty or no wave.
    InputError
        If there is no such codec or bitrate, or this build of libsndfile lacks the codec.
    """
    wave = as_sound(wave)
    if codec not in CODECS:
        raise InputError(f"codec={codec!r}: one of {', '.join(CODECS)} is needed")
    rates = RATES if codec == "opus" else MP3_RATES
    rate = min((rate for rate in rates if rate >= sample_rate), default=rates[-1])
    scale = np.float32(max(1.0, np.abs(wave).max()))
    sent = resample(wave / scale, sample_rate, rate)
    heard = through_opus(sent, rate, bitrate)[0] if codec == "opus" else through_mp3(sent, rate, bitrate)
    return fit_length(resample(heard, rate, sample_rate) * scale, len(wave))


def through_mp3(wave: Wave, sample_rate: int, bitrate: float) -> Wave:
    """Encode and decode a wave at a constant bitrate; the delays of encoder and decoder are cut off.

    Parameters
    ----------
    wave : float32 [N]
        In [-1, 1].
    sample_rate : int
        One of `MP3_RATES` (Hz).
    bitrate : float
        8000 to 160000 (bit/s); the nearest that the format has is used.

    Returns
    -------
    float32 [N]

    Raises
    ------
    InputError
        If rate or bitrate cannot be had, or this build of libsndfile has no MP3.
    AudioError
        If what comes back is of another length than the format explains.
    """
    if sample_rate not in MP3_RATES or not _MP3_LOWEST <= bitrate <= _MP3_HIGHEST:
        raise InputError(
            f"MP3 at {sample_rate} Hz and {bitrate:g} bit/s: it has {', '.join(map(str, MP3_RATES))} Hz and "
            f"{_MP3_LOWEST} to {_MP3_HIGHEST} bit/s"
        )
    if not soundfile.check_format("MP3", "MPEG_LAYER_III"):
        raise InputError("this build of libsndfile has no MP3 encoder; install the soundfile wheel")
    stream = io.BytesIO()
    # Rounding must not lead to level 1, which libsndfile refuses.
    level = min(0.9999, 1.0 - (bitrate - _MP3_LOWEST) / (_MP3_HIGHEST - _MP3_LOWEST))
    soundfile.write(
        stream, wave, sample_rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT",
        compression_level=level,
    )  # fmt: skip
    stream.seek(0)
    decoded = load(stream, sample_rate)
    if len(decoded) == len(wave):
        return decoded
    if len(decoded) < len(wave) + _MP3_DELAY:
        raise AudioError(f"{len(wave)} samples came back from MP3 as {len(decoded)}; libsndfile does not keep time")
    return decoded[_MP3_DELAY : _MP3_DELAY + len(wave)]


def through_opus(wave: Wave, sample_rate: int, bitrate: float) -> tuple[Wave, int]:
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
