"""Sound files to mono float32 waves, block by block.

Channels are averaged (mean downmix). A file that does not hold what its header promises, or holds
NaN or infinite samples, is refused with a reason; nothing is repaired silently.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import ArrayLike, NDArray

from speechtok.audio.resample import MAX_RATE, MIN_RATE, Resampler
from speechtok.audio.wav import read_header
from speechtok.errors import AudioError

__all__ = ["AudioFile", "as_mono", "as_sound", "load", "resampled"]

# Beyond any integer scale that could pass for audio; larger values overflow power spectra.
_MAX_AMPLITUDE = 1e6
_MAX_CHANNELS = 64  # of arrays; more look like [channels, samples]
_BLOCK_VALUES = 1 << 18  # samples times channels that are decoded at a time
# Formats whose header may only estimate the number of samples.
_ESTIMATED = {"MP3", "MPEG", "OGG"}


def as_mono(samples: ArrayLike, name: str = "the array") -> NDArray[np.float32]:
    """Check an array of samples and average its channels.

    Parameters
    ----------
    samples : float [N] or [N, C], int16 [N] or [N, C], or a torch tensor
        Floats in [-1, 1] (larger values are kept); int16 is divided by 32768.
    name : str
        For messages.

    Returns
    -------
    float32 [N]

    Raises
    ------
    AudioError
        If the shape or type is unusable or samples are NaN, infinite or absurdly large.
    """
    if hasattr(samples, "detach"):
        samples = samples.detach().cpu().numpy()
    array = np.asarray(samples)
    if array.dtype == np.int16:
        array = array / np.float32(32768)
    if array.dtype.kind != "f":
        raise AudioError(f"{name} has dtype {array.dtype}; give float samples in [-1, 1] or int16")
    if array.ndim == 2 and array.shape[1] <= _MAX_CHANNELS:
        array = array[:, 0] if array.shape[1] == 1 else array.mean(axis=1, dtype=np.float32)
    if array.ndim != 1:
        raise AudioError(f"{name} has shape {array.shape}; give [samples] or [samples, up to {_MAX_CHANNELS} channels]")
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise AudioError(f"{name} holds a NaN or infinite value at sample {bad}; clean it before tokenizing")
    if len(array) and max(array.max(), -array.min()) > _MAX_AMPLITUDE:
        raise AudioError(
            f"{name} reaches amplitudes above {_MAX_AMPLITUDE:g}; samples belong in [-1, 1], scale them first"
        )
    return array


def as_sound(samples: ArrayLike, name: str = "the wave") -> NDArray[np.float32]:
    """Check samples as `as_mono` does, and that there are some; AudioError otherwise."""
    wave = as_mono(samples, name)
    if len(wave) == 0:
        raise AudioError(f"{name} is empty; there is nothing to change")
    return wave


class AudioFile:
    """An open sound file.

    Parameters
    ----------
    source : path or binary stream (seekable)
    name : str, optional
        For messages; the path if it is one.

    Attributes
    ----------
    sample_rate, channels : int
    declared_samples : int
        Samples per channel that the header promises (an estimate for MP3 and Ogg).
    num_samples : int
        Samples per channel decoded so far.

    Raises
    ------
    AudioError
        If the file is missing, empty, unreadable or in no known format.
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO, name: str | None = None):
        self.name = name or (str(source) if isinstance(source, str | os.PathLike) else "audio stream")
        self.num_samples = 0
        if isinstance(source, str | os.PathLike):
            self._file_check(Path(source))
            source = os.fspath(source)
        try:
            self._file = soundfile.SoundFile(source)
        except (soundfile.LibsndfileError, OSError) as error:
            reason = getattr(error, "error_string", str(error)).rstrip(". ")
            raise AudioError(f"{self.name}: cannot be decoded ({reason}); is it really audio?") from error
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        self.declared_samples = self._file.frames
        try:
            if not MIN_RATE <= self.sample_rate <= MAX_RATE:
                raise AudioError(
                    f"{self.name}: sample rate {self.sample_rate} Hz is outside {MIN_RATE} ... {MAX_RATE} Hz; "
                    "the header may be damaged"
                )
            if self._file.format in {"WAV", "WAVEX"}:
                self._wav_check(source)
        except AudioError:
            self._file.close()
            raise

    def _file_check(self, path: Path) -> None:
        try:
            if path.is_dir():
                raise AudioError(f"{self.name}: is a folder; give a sound file")
            with path.open("rb") as file:
                if not file.read(1):
                    raise AudioError(f"{self.name}: the file is empty (0 bytes)")
        except OSError as error:
            raise AudioError(f"{self.name}: cannot be read ({error.strerror})") from error

    def _wav_check(self, source: str | BinaryIO) -> None:
        file = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115 - closed below if it is ours
        position = file.tell()
        try:
            file.seek(0)
            if file.read(4) != b"RIFF":  # RIFX and RF64 are the decoder's business alone
                return
            file.seek(0)
            header = read_header(file, self.name)
            begin = file.tell()
            present = file.seek(0, io.SEEK_END) - begin
        finally:
            file.seek(position)
            if file is not source:
                file.close()
        if header.data_bytes is not None and present < header.data_bytes:
            raise AudioError(
                f"{self.name}: truncated: the header promises {header.data_bytes} bytes of samples, {present} are there"
            )

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Mono blocks, float32 [n] at the file's own rate, from the start to the end.

        Raises
        ------
        AudioError
            If decoding fails on the way, samples are missing or not finite, or there are none.
        """
        size = max(1, _BLOCK_VALUES // self.channels)
        while True:
            try:
                block = self._file.read(size, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise AudioError(
                    f"{self.name}: decoding failed after {self.num_samples} samples ({error}); the file is damaged"
                ) from error
            if len(block) == 0:
                break
            try:
                mono = as_mono(block[:, 0] if self.channels == 1 else block.mean(axis=1, dtype=np.float32), self.name)
            except AudioError as error:
                if self.num_samples:
                    raise AudioError(f"{error} (counted from sample {self.num_samples})") from error
                raise
            self.num_samples += len(block)
            yield mono
        if self.num_samples == 0:
            raise AudioError(f"{self.name}: holds no samples")
        if self.num_samples < self.declared_samples and self._file.format not in _ESTIMATED:
            raise AudioError(
                f"{self.name}: truncated: the header promises {self.declared_samples} samples, "
                f"{self.num_samples} could be decoded"
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resampled(
    blocks: Iterator[NDArray[np.float32]], source_rate: int, target_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Convert the rate of a stream of float32 [n] blocks."""
    resampler = Resampler(source_rate, target_rate)
    for block in blocks:
        yield resampler.push(block)
    yield resampler.flush()


def load(source: Any, sample_rate: int, name: str | None = None) -> NDArray[np.float32]:
    """Whole file as one mono wave: float32 [N] at `sample_rate`; name and errors as `AudioFile`."""
    with AudioFile(source, name) as file:
        return np.concatenate(list(resampled(file.blocks(), file.sample_rate, sample_rate)))
