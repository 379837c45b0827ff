"""Frozen vectors for probes: statistics over the frames of every layer of an encoder."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.audio.decode import load
from speechtok.corpus.sources import Utterance
from speechtok.encoders.base import Encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import AudioError, InputError
from speechtok.evaluation.cutters import open_source
from speechtok.evaluation.log_mel import LogMelEncoder
from speechtok.frames import WindowRule
from speechtok.tokenizer import DEFAULT_WINDOW, Tokenizer
from speechtok.windows import cut

__all__ = ["OUTPUT", "FrozenFeatures", "Pooling", "open_encoder"]

Pooling = Literal["mean", "mean-std"]
Floats = NDArray[np.float64]

OUTPUT = "output"


def open_encoder(name: str, device: str = "cpu") -> tuple[str, Encoder, WindowRule]:
    """Its name for tables, the encoder, and how long files are cut for it.

    Parameters
    ----------
    name : str
        "log-mel", or what `speechtok.evaluation.cutters.open_source` takes; of a tokenizer its encoder counts.
    device : str
        A torch device.
    """
    if name == "log-mel":
        return name, LogMelEncoder().to(device), DEFAULT_WINDOW
    source = open_source(name, device)
    if isinstance(source, Tokenizer):
        return source.name, source.encoder, source.window
    return name, source.to(device).eval(), DEFAULT_WINDOW


class FrozenFeatures:
    """One vector for each layer of an encoder and each sound.

    Layers are named as in transformers' ``hidden_states``, "0" the input of the first block. `OUTPUT` is what the
    encoder gives where that is no hidden state: encoders without layers, and projected or smoothed frames. The
    segmenter and the quantizer of a tokenizer have no say. Long files are cut into windows as tokenizers cut them.
    Where a sound is shorter than a frame, zeros behind it make it one frame long, so that all encoders are measured
    on the same sounds.

    Parameters
    ----------
    encoder : Encoder
    layers : sequence of str, optional
        Which to keep, of encoders that have layers; default all.
    pooling : {"mean", "mean-std"}
        Over time: the mean, or the mean and, behind it, the standard deviation.
    window : WindowRule

    Raises
    ------
    InputError
        If the encoder has no such layer.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[str] | None = None,
        pooling: Pooling = "mean",
        window: WindowRule = DEFAULT_WINDOW,
    ) -> None:
        self.encoder, self.pooling, self._window = encoder, pooling, window
        known = []
        if hasattr(encoder, "hidden_states"):
            known = [f"{layer}" for layer in range((encoder.layer or 0) + 1)]
        changed = isinstance(encoder, W2vBertEncoder) and (encoder.projects or encoder.config.smoothing > 1)
        if not known or changed:
            known.append(OUTPUT)
        if layers is not None and len(known) > 1:
            missing = [layer for layer in layers if layer not in known]
            if missing:
                raise InputError(f"{encoder.type} has no layer {', '.join(missing)}; it has {', '.join(known)}")
            known = [layer for layer in known if layer in layers]
        self.layers = known

    def _states(self, wave: Tensor) -> list[Tensor]:
        """Frames [T, D] of each layer that is kept, for a wave [1, N]."""
        states = {}
        if self.layers != [OUTPUT]:
            hidden = self.encoder.hidden_states(wave)  # type: ignore[operator]  # see __init__
            states = {f"{layer}": state[0] for layer, state in enumerate(hidden)}
        if OUTPUT in self.layers:
            states[OUTPUT] = self.encoder(wave).features[0]
        return [states[layer] for layer in self.layers]

    @torch.inference_mode()
    def __call__(self, wave: NDArray[np.float32]) -> list[Floats]:
        """Vectors float64 [D] or [2 D], one for each of `layers`, of a wave float32 [N] at the encoder's rate."""
        grid = self.encoder.grid
        wave = np.pad(wave, (0, max(0, grid.num_samples(1) - len(wave))))
        own = chain(self.encoder.parameters(), self.encoder.buffers())
        device = next((tensor.device for tensor in own), torch.device("cpu"))
        count, sums, squares = 0, [torch.zeros(())] * len(self.layers), [torch.zeros(())] * len(self.layers)
        for window, samples in cut([wave], grid, self._window, self.encoder.context):
            count += window.count
            for index, state in enumerate(self._states(torch.from_numpy(samples)[None].to(device))):
                kept = state[window.skip : window.skip + window.count].double()
                sums[index] = sums[index] + kept.sum(0)
                squares[index] = squares[index] + kept.square().sum(0)
        vectors = []
        for total, square in zip(sums, squares, strict=True):
            mean = total / count
            deviation = (square / count - mean.square()).clamp_min(0).sqrt()
            pooled = mean if self.pooling == "mean" else torch.cat([mean, deviation])
            vectors.append(pooled.cpu().numpy())
        return vectors

    def read(
        self, sounds: Sequence[Utterance], on_sound: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, list[Floats]], dict[str, str]]:
        """Vectors of files.

        Parameters
        ----------
        sounds : sequence of Utterance
        on_sound : callable
            Called after each.

        Returns
        -------
        vectors : dict
            By path a vector for each of `layers`.
        failed : dict of str to str
            By path why there are none.
        """
        vectors, failed = {}, {}
        for sound in sounds:
            try:
                found = self(load(sound.open(), self.encoder.sample_rate))
            except AudioError as error:
                failed[sound.path] = str(error)
            else:
                if all(np.isfinite(one).all() for one in found):
                    vectors[sound.path] = found
                else:
                    failed[sound.path] = f"the {self.encoder.type} encoder gives frames that are not finite"
            on_sound()
        return vectors, failed
