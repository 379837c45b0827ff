"""From units back to sound: ids, frames of the quantizer, wave.

There is one path only: blocks of fixed size with the decoder's state, one sound at a time, on one thread. So a wave is
the same to the bit however its units come.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.canonical import one_thread
from speechtok.codecs.base import Decoder
from speechtok.encoders.base import ChunkState, Encoder
from speechtok.errors import FingerprintError, FormatError, InputError, SpeechtokError
from speechtok.quantizers.base import Quantizer
from speechtok.units import Units

if TYPE_CHECKING:
    from speechtok.tokenizer import Tokenizer

__all__ = ["DecoderStream", "WavePass", "check_parts", "made"]


def check_parts(name: str, encoder: Encoder, quantizer: Quantizer, decoder: Decoder) -> None:
    """Refuse a decoder that is not of one codec with encoder and quantizer.

    Raises
    ------
    FormatError
    """
    if not quantizer.invertible:
        raise FormatError(
            f"{name}: units of this {quantizer.type} quantizer do not tell whole frames, which a decoder needs; "
            "leave the decoder out"
        )
    facts = [
        ("frame size", quantizer.dim, decoder.dim),
        ("hop", encoder.hop, decoder.hop),
        ("sample rate", encoder.sample_rate, decoder.sample_rate),
    ]
    for what, ours, theirs in facts:
        if ours != theirs:
            raise FormatError(
                f"{name}: encoder and quantizer have {what} {ours}, the decoder {theirs}; they are not of one codec"
            )


def made(tokenizer: "Tokenizer", fingerprint: str, codebooks: int) -> bool:
    """Whether a fingerprint is that of a tokenizer with its first `codebooks` codebooks."""
    return 1 <= codebooks <= tokenizer.codebooks and fingerprint == tokenizer.with_codebooks(codebooks).fingerprint


def _decoder(tokenizer: "Tokenizer") -> Decoder:
    if tokenizer.decoder is None:
        raise FormatError(f"{tokenizer.name} has no decoder: its units cannot be made sound; take a codec")
    return tokenizer.decoder


@dataclass
class WavePass:
    """One sound on its way from units to wave. A value that can be copied and pickled.

    Parameters
    ----------
    state : ChunkState
        Of the decoder before the ids that are held, one row.
    held : int32 [K, n]
        Ids that fill no block yet.
    fingerprint, codebooks
        Of the units; empty and 0 before the first ones.
    lacking : int
        Samples that the last unit lacks of a whole frame, because its sound ends in it.
    tokenizer, decoder : str
        Fingerprints of the tokenizer and its decoder.
    closed : bool
        Of streams: whether the sound has ended.
    """

    state: ChunkState
    tokenizer: str
    decoder: str
    held: NDArray[np.int32] = field(default_factory=lambda: np.zeros((1, 0), np.int32))
    fingerprint: str = ""
    codebooks: int = 0
    lacking: int = 0
    closed: bool = False

    @staticmethod
    def new(tokenizer: "Tokenizer") -> "WavePass":
        """Before the first unit; FormatError if the tokenizer has no decoder."""
        return WavePass(_decoder(tokenizer).stream_state(1), tokenizer.fingerprint, tokenizer.decoder_fingerprint)

    def copy(self, device: torch.device) -> "WavePass":
        """A copy that shares nothing with this one, its tensors on `device`."""
        return copy.deepcopy(replace(self, state=self.state.to(device)))

    def check(self, other: "WavePass") -> None:
        """Refuse the state of a stream with another tokenizer; raises FingerprintError."""
        if (self.tokenizer, self.decoder) != (other.tokenizer, other.decoder):
            raise FingerprintError("the state belongs to a stream with another tokenizer or decoder")

    def push(self, tokenizer: "Tokenizer", units: Units) -> NDArray[np.float32]:
        """Take units; give the wave of the blocks that are full, float32 [n].

        Raises
        ------
        FingerprintError
            If the units are those of another tokenizer.
        FormatError
            If there are ids that the codebooks do not have.
        InputError
            If the sound ended with the units before.
        """
        ids, hop = np.atleast_2d(units.ids), tokenizer.encoder.hop
        # All is checked before anything is changed.
        known = self.fingerprint == units.fingerprint and self.codebooks == len(ids)
        if not known and (self.fingerprint or not made(tokenizer, units.fingerprint, len(ids))):
            raise FingerprintError(
                f"units of {len(ids)} codebooks of the tokenizer {units.fingerprint} are none of {tokenizer.name} "
                f"({self.fingerprint or tokenizer.fingerprint}); take the tokenizer that made them"
            )
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise FormatError(
                f"an id is {ids.max()}, but the codebooks of {tokenizer.name} have {tokenizer.vocab_size}"
            )
        if len(units) and self.lacking:
            raise InputError("the sound ended with the units before; take a new stream for another sound")
        self.fingerprint, self.codebooks = units.fingerprint, len(ids)
        if not len(units):
            return np.zeros(0, np.float32)
        self.lacking = hop - min(hop, max(1, int(units.ends[-1] - units.starts[-1])))
        self.held = np.concatenate([self.held, ids], axis=1) if self.held.shape[1] else ids
        block, waves = _decoder(tokenizer).block, [np.zeros(0, np.float32)]
        while self.held.shape[1] >= block:
            waves.append(self._block(tokenizer, self.held[:, :block]))
            self.held = self.held[:, block:]
        wave = np.concatenate(waves)
        return wave if self.held.shape[1] else wave[: len(wave) - self.lacking]

    def flush(self, tokenizer: "Tokenizer") -> NDArray[np.float32]:
        """End the sound; give the wave of the units that are left, float32 [n]."""
        rest, self.held = self.held, self.held[:, :0]
        if not rest.shape[1]:
            return np.zeros(0, np.float32)
        wave = self._block(tokenizer, rest)
        return wave[: len(wave) - self.lacking]

    @torch.inference_mode()
    def _block(self, tokenizer: "Tokenizer", ids: NDArray[np.int32]) -> NDArray[np.float32]:
        decoder = _decoder(tokenizer)
        count = ids.shape[1]
        whole = np.pad(ids, ((0, 0), (0, decoder.block - count)))
        with one_thread():
            frames = tokenizer.quantizer.decode(torch.from_numpy(whole)[None].to(tokenizer.device))
            counts = torch.tensor([count], device=tokenizer.device)
            wave, self.state = decoder.advance(frames, counts, self.state)
        samples: NDArray[np.float32] = wave[0, : count * decoder.hop].cpu().numpy()
        return samples


class DecoderStream:
    """An open stream of sound out of units, for tokenizers with a decoder.

    Samples come block by block (of codec-mini, 8 frames), as soon as all units of a block are there. They are those of
    `Tokenizer.decode`, bit for bit, however the units come.

    Parameters
    ----------
    tokenizer : Tokenizer

    Raises
    ------
    FormatError
        If it has no decoder.

    Examples
    --------
    ::

        with tokenizer.stream(sample_rate=48_000) as stream, tokenizer.decoder_stream() as back:
            for chunk in microphone:
                loudspeaker.play(back.push(stream.push(chunk)))
            loudspeaker.play(back.push(stream.flush()))
            loudspeaker.play(back.flush())
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self.tokenizer = tokenizer
        self._state = WavePass.new(tokenizer)

    def push(self, units: Units) -> NDArray[np.float32]:
        """Take the next units of a sound; give the samples that are ready (maybe none), float32 [n].

        Raises
        ------
        FingerprintError
            If the units are those of another tokenizer, or of another number of codebooks than the ones before.
        InputError
            If the sound has ended: its last unit came before, or the stream was flushed.
        FormatError
            If there are ids that the codebooks do not have. The stream is unchanged after these three. Any other
            failure ends it.
        """
        return self._run(lambda state: state.push(self.tokenizer, units))

    def flush(self) -> NDArray[np.float32]:
        """End the sound and give the remaining samples, float32 [n].

        Raises
        ------
        InputError
            If the stream has ended before.
        """
        wave = self._run(lambda state: state.flush(self.tokenizer))
        self._state.closed = True
        return wave

    def _run(self, step: Callable[[WavePass], NDArray[np.float32]]) -> NDArray[np.float32]:
        if self._state.closed:
            raise InputError("the stream has ended (it was flushed, or a push failed); open a new one")
        try:
            return step(self._state)
        except SpeechtokError:
            raise
        except BaseException:  # between two states
            self._state.closed = True
            raise

    def state(self) -> WavePass:
        """A copy of the state, to go on later with `restore`, also in another process."""
        return self._state.copy(torch.device("cpu"))

    def restore(self, state: WavePass) -> None:
        """Go on from a state of a stream with the same tokenizer.

        Raises
        ------
        FingerprintError
            If the state belongs to another tokenizer.
        """
        self._state.check(state)
        self._state = state.copy(self.tokenizer.device)

    def __enter__(self) -> "DecoderStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.closed = True
