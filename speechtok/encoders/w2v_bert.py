"""w2v-BERT 2.0: filter bank, stacked in pairs, and a conformer; 50 frames per second.

The encoder of SeamlessM4T (Barrault et al. 2023, arXiv:2308.11596), frame for frame what transformers'
``Wav2Vec2BertModel`` gives on the output of ``SeamlessM4TFeatureExtractor``.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from speechtok.audio.features import kaldi_fbank, normalize_bins, valid_frames
from speechtok.encoders.base import Encoder, Frames
from speechtok.errors import CheckpointError, InputError
from speechtok.frames import FrameGrid
from speechtok.nn.conformer import ConformerBlock

__all__ = ["W2vBertConfig", "W2vBertEncoder"]

MEL_BINS, STACK = 80, 2
SWISH = ("swish", "silu")


@dataclass(frozen=True)
class W2vBertConfig:
    """What matters of a w2v-BERT 2.0 configuration for inference, under its published names.

    Parameters
    ----------
    hidden_size : int
        Size of a frame.
    num_hidden_layers : int
        Conformer blocks of the checkpoint.
    num_attention_heads : int
        Heads; divides `hidden_size`.
    intermediate_size : int
        Inner size of the feed-forward modules.
    feature_projection_input_dim : int
        Size of an input frame: 160, two frames of 80 mel bins.
    layer_norm_eps : float
        Added to the variance in all layer norms.
    left_max_position_embeddings, right_max_position_embeddings : int
        Distances (frames) at which relative positions are clipped.
    conv_depthwise_kernel_size : int
        Frames of the causal convolution.

    Raises
    ------
    CheckpointError
        If values do not fit each other.
    """

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    feature_projection_input_dim: int = MEL_BINS * STACK
    layer_norm_eps: float = 1e-5
    left_max_position_embeddings: int = 64
    right_max_position_embeddings: int = 8
    conv_depthwise_kernel_size: int = 31

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if "position" in field.name or "layers" in field.name else 1
            if field.name != "layer_norm_eps" and (type(value) is not int or value < least):
                raise CheckpointError(f"{field.name} is {value!r}; it must be an integer of at least {least}")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.feature_projection_input_dim != MEL_BINS * STACK:
            raise CheckpointError(
                f"feature_projection_input_dim is {self.feature_projection_input_dim}; "
                f"only {MEL_BINS * STACK} ({STACK} stacked frames of {MEL_BINS} mel bins) is supported"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Self:
        """Read the published configuration.

        Settings of training, of task heads and of the adapter behind the conformer do not touch hidden states and
        are ignored. Missing settings take transformers' defaults.

        Parameters
        ----------
        config : dict
            Content of ``config.json``.
        preprocessor : dict, optional
            Content of ``preprocessor_config.json``.

        Raises
        ------
        CheckpointError
            If a setting is not supported; the message names it.
        """
        known: dict[str, tuple[Any, ...]] = {
            "model_type": ("wav2vec2-bert",),
            "position_embeddings_type": ("relative_key",),
            "hidden_act": SWISH,
        }
        _check("config.json", config, known)
        if preprocessor is not None:
            features: dict[str, tuple[Any, ...]] = {
                "feature_extractor_type": ("SeamlessM4TFeatureExtractor",),
                "feature_size": (MEL_BINS,),
                "num_mel_bins": (MEL_BINS,),
                "sampling_rate": (16000,),
                "stride": (STACK,),
            }
            _check("preprocessor_config.json", preprocessor, features)
        if config.get("conv_depthwise_kernel_size", 31) % 2 == 0:
            raise CheckpointError(
                f"config.json: conv_depthwise_kernel_size is {config['conv_depthwise_kernel_size']}; it must be odd"
            )
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})


def _check(file: str, settings: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    for name, values in supported.items():
        if name in settings and settings[name] not in values:
            raise CheckpointError(
                f"{file}: {name} is {settings[name]!r}; supported: {', '.join(repr(value) for value in values)}"
            )


class W2vBertEncoder(Encoder):
    """The conformer of w2v-BERT 2.0 up to one layer.

    Parameter names are those of ``Wav2Vec2BertModel``. Only the blocks that the layer needs exist. Attention and the
    normalisation of the features see the whole utterance, so streams only approximate the offline result.

    Parameters
    ----------
    config : W2vBertConfig
        Sizes of the checkpoint.
    layer : int, optional
        Index into ``hidden_states``: 0 is the projected input, L the output of block L; None: the last.

    Raises
    ------
    InputError
        If the checkpoint has no such layer.

    Attributes
    ----------
    ignored_prefixes : tuple of str
        Beginnings of keys that a checkpoint may hold and that no hidden state depends on: the vector of masked frames
        and the parts behind the conformer.
    """

    type = "w2v_bert"
    rounding = 1e-5  # 2.9e-6 was seen at full size, layer 17
    ignored_prefixes: ClassVar[tuple[str, ...]] = ("masked_spec_embed", "adapter.", "intermediate_ffn.")
    context = None

    layer: int

    def __init__(self, config: W2vBertConfig, layer: int | None = None) -> None:
        super().__init__()
        layer = config.num_hidden_layers if layer is None else layer
        if not 0 <= layer <= config.num_hidden_layers:
            raise InputError(f"layer {layer}: this w2v-BERT has layers 0 to {config.num_hidden_layers}")
        self.config, self.layer, self.dim = config, layer, config.hidden_size
        # A frame stacks two filter bank frames: 400 samples and the 160 that the second one lies behind.
        self.grid = FrameGrid(16000, 320, 560)
        size, eps = config.feature_projection_input_dim, config.layer_norm_eps
        self.feature_projection = nn.Sequential(
            OrderedDict(layer_norm=nn.LayerNorm(size, eps=eps), projection=nn.Linear(size, config.hidden_size))
        )
        blocks = [
            ConformerBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.conv_depthwise_kernel_size,
                config.left_max_position_embeddings,
                config.right_max_position_embeddings,
                eps,
            )
            for _ in range(layer)
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def features(self, wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Input frames of the conformer.

        Parameters
        ----------
        wave : float32 [B, N]
            Waves at 16 kHz in [-1, 1].
        lengths : int64 [B]
            Valid samples of each row.

        Returns
        -------
        features : float32 [B, T, 160]
            Normalised filter bank frames in pairs; zeros behind the end of each row. A last frame without a partner
            takes part in the normalisation only.
        lengths : int64 [B]
            Valid frames of each row.
        """
        mel, counts = kaldi_fbank(wave, lengths)
        mel, counts = normalize_bins(mel, counts), counts // STACK
        total = mel.shape[1] // STACK
        pairs = mel[:, : total * STACK].reshape(mel.shape[0], total, MEL_BINS * STACK)
        return pairs.masked_fill(~valid_frames(counts, total)[..., None], 0.0), counts

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of layer `layer` for a checked batch: wave float32 [B, N], lengths int64 [B]."""
        features, counts = self.features(wave, lengths)
        return Frames(deque(self._walk(features, counts), maxlen=1).pop(), counts)

    def hidden_states(self, wave: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Hidden states of all layers up to `layer`.

        Parameters
        ----------
        wave : float32 [B, N]
            Waves at 16 kHz in [-1, 1].
        lengths : int64 [B], optional
            Valid samples of each row; all N where it is None.

        Returns
        -------
        list of float [B, T, D]
            ``layer + 1`` tensors, index as in transformers; zeros behind the end of each row.

        Raises
        ------
        AudioError
            If the shapes do not fit.
        """
        if lengths is None:
            lengths = torch.full(wave.shape[:1], wave.shape[-1], dtype=torch.int64)
        return self.hidden_states_from_features(*self.features(wave, lengths))

    def hidden_states_from_features(self, features: Tensor, frame_lengths: Tensor) -> list[Tensor]:
        """Like `hidden_states`, from the output of `features`: float [B, T, 160], int64 [B]."""
        return list(self._walk(features, frame_lengths))

    def _walk(self, features: Tensor, frame_lengths: Tensor) -> Iterator[Tensor]:
        """Hidden states one by one, so that a caller who wants the last one holds no others."""
        inside = valid_frames(frame_lengths, features.shape[1])
        behind = ~inside[..., None]
        valid = None if bool(inside.all()) else inside
        x = self.feature_projection(features).masked_fill(behind, 0.0)
        yield x
        for block in self.encoder["layers"].children():
            x = block(x, valid) if features.shape[1] else x
            if valid is not None:
                x = x.masked_fill(behind, 0.0)
            yield x
