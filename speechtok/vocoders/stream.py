"""One sound out of units that come in pieces."""

import torch
from torch import Tensor

from speechtok.errors import InputError
from speechtok.vocoders.vocos import Vocos

__all__ = ["VocosStream"]


class VocosStream:
    """One sound out of units that come in pieces: the wave of the whole, down to rounding.

    Parameters
    ----------
    vocoder : Vocos
        A causal one.
    speaker : float [speaker_dim], optional
        None: the null speaker.

    Raises
    ------
    InputError
        If the model is not causal, or the speaker does not fit.
    """

    def __init__(self, vocoder: Vocos, speaker: Tensor | None = None) -> None:
        self.vocoder = vocoder
        with torch.inference_mode():
            self._state = vocoder.stream_state(1, None if speaker is None else speaker[None])
        self._early, self._left, self._ended = vocoder.delay, 0, False

    def push(self, inputs: Tensor) -> Tensor:
        """Take the next units, int [n] or float [n, D], n from 0 on; give the samples that are complete, float32 [m].

        Raises
        ------
        InputError
            If the sound has ended, or the units do not fit.
        """
        if self._ended:
            raise InputError("the sound has ended; take a new stream for another one")
        self._left += len(inputs) * self.vocoder.hop
        return self._advance(inputs, len(inputs))

    def flush(self) -> Tensor:
        """End the sound and give its remaining samples, float32 [m]; none if it has ended before."""
        self._ended = True
        rest = -(-(self._left + self._early) // self.vocoder.hop) if self._left else 0
        config = self.vocoder.config
        blank = torch.zeros(rest, config.feature_dim) if config.feature_dim else torch.zeros(rest, dtype=torch.int64)
        return self._advance(blank, 0)

    @torch.inference_mode()
    def _advance(self, inputs: Tensor, count: int) -> Tensor:
        device = self.vocoder.device
        if not len(inputs):
            return torch.zeros(0, device=device)
        counts = torch.tensor([count], device=device)
        wave, self._state = self.vocoder.advance(inputs[None].to(device), counts, self._state)
        early = min(self._early, wave.shape[1])
        self._early -= early
        wave = wave[0, early : early + self._left]
        self._left -= len(wave)
        return wave
