"""Sizes and variants of w2v-BERT encoders."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from speechtok.errors import CheckpointError

__all__ = ["CONV_BINS", "MEL_BINS", "STACK", "W2vBertConfig"]

MEL_BINS, STACK = 80, 2
CONV_BINS = 19  # bins that two convolutions of stride 2 leave
SWISH = ("swish", "silu")
_MAY_BE_0 = ("num_hidden_layers", "attention_past", "look_ahead")


@dataclass(frozen=True)
class W2vBertConfig:
    """What matters of a w2v-BERT configuration for inference; the published settings under their published names.

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
    subsampling : {"stack", "conv"}
        Two stacked filter bank frames (50 Hz), or two strided convolutions (25 Hz).
    normalization : {"utterance", "stored"}
        Statistics of the filter bank: of each utterance, or stored with the weights.
    attention_chunk : int, optional
        Frames of a chunk, see `ChunkedAttention`; None: attention to the whole utterance.
    attention_past : int
        Frames before its chunk that a frame attends to, a multiple of the chunk.
    look_ahead : int
        Frames by which the blocks answer later than they read: every frame sees at least that much of what follows,
        also the last one of a chunk (chunked attention only).
    smoothing : int
        The last layer's frames are means of so many block outputs around them (chunked attention only), an odd
        number of at most ``2 * look_ahead + 1``; 1: none; not for layer 0. Adds ``smoothing // 2`` frames to the
        look-ahead. Frame by frame, clusters of smoothed frames flicker less and tell more about phones.
    projected_layer, projection_size : int
        The frames of this layer are projected to so many values: what the contrastive loss compares at the end of its
        module, and what tells more about phones than the layer itself. 0: no projection.
    gated : bool
        The projection gives one value more, the logit of a gate. Frames are what it projects, scaled to length 1, times
        the gate: their direction says what a syllable is, their length (0 to 1) whether one is there.

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
    subsampling: str = "stack"
    normalization: str = "utterance"
    attention_chunk: int | None = None
    attention_past: int = 0
    look_ahead: int = 0
    smoothing: int = 1
    projected_layer: int = 0
    projection_size: int = 0
    gated: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if "position" in name or "project" in name or name in _MAY_BE_0 else 1
            default = getattr(W2vBertConfig, name)
            if isinstance(default, bool):
                if type(value) is not bool:
                    raise CheckpointError(f"{name} is {value!r}; it must be true or false")
            elif isinstance(default, int) and (type(value) is not int or value < least):
                raise CheckpointError(f"{name} is {value!r}; it must be an integer of at least {least}")
        for name, known in (("subsampling", ("stack", "conv")), ("normalization", ("utterance", "stored"))):
            if getattr(self, name) not in known:
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        size = self.feature_projection_input_dim
        if self.subsampling == "stack" and size != MEL_BINS * STACK:
            raise CheckpointError(
                f"feature_projection_input_dim is {size}; "
                f"only {MEL_BINS * STACK} ({STACK} stacked frames of {MEL_BINS} mel bins) is supported"
            )
        if self.subsampling == "conv" and size % CONV_BINS:
            raise CheckpointError(
                f"feature_projection_input_dim is {size}; it must be a multiple of {CONV_BINS} with subsampling conv"
            )
        chunk = self.attention_chunk
        if chunk is None and (self.attention_past or self.look_ahead):
            raise CheckpointError("attention_past and look_ahead need an attention_chunk")
        if chunk is not None and (type(chunk) is not int or chunk < 2 or self.attention_past % chunk):
            raise CheckpointError(
                f"attention_chunk {chunk!r} must be an integer of at least 2, "
                f"and attention_past {self.attention_past} a multiple of it"
            )
        if not self.projected_layer <= self.num_hidden_layers or bool(self.projected_layer) != bool(
            self.projection_size
        ):
            raise CheckpointError(
                f"projected_layer {self.projected_layer} must be one of the {self.num_hidden_layers} layers, and "
                f"projection_size {self.projection_size} its size"
            )
        if self.gated and not self.projected_layer:
            raise CheckpointError("gated needs a projected_layer: the gate is a part of its projection")
        if self.smoothing % 2 == 0 or self.smoothing // 2 > self.look_ahead:
            raise CheckpointError(
                f"smoothing {self.smoothing} must be odd and at most 2 * look_ahead + 1, here {2 * self.look_ahead + 1}"
            )

    @property
    def answers_after(self) -> int:
        """Positions from reading a frame to the answer of the last layer: the look-ahead and half the smoothing."""
        return self.look_ahead + self.smoothing // 2

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
