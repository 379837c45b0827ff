"""HuBERT and wav2vec 2.0 encoders, and all checkpoints that share their graph (mHuBERT, ContentVec, MERT, Sylber).

Hsu et al. 2021 (arXiv 2106.07447), Baevski et al. 2020 (arXiv 2006.11477), Li et al. 2023 for MERT (arXiv 2306.00107),
Cho et al. 2024 for Sylber (arXiv 2410.07168).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from speechtok.encoders.base import Encoder, Frames
from speechtok.errors import AudioError, CheckpointError, InputError
from speechtok.nn.cqt_features import OCTAVES, CqtFeatures
from speechtok.nn.stem import ACTIVATIONS, ConvStem, FeatureProjection, conv_grid
from speechtok.nn.transformer import PositionalConv, SelfAttention, Transformer

__all__ = ["HubertConfig", "HubertEncoder"]

# Switches of published configurations that change the graph or the features, with the values at which they do nothing.
# Ours has CQT features too, but not the published ones: those come 50 times a second to frames that come 75 times.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "adapter_attn_dim": (None,),
    "deepnorm": (False, None),
    "feature_extractor_cqt": (False, None),
}


@dataclass(frozen=True)
class HubertConfig:
    """What inference needs of a HuBERT or wav2vec 2.0 configuration, with Hugging Face's names and defaults.

    `do_normalize` scales each file to zero mean and unit variance first; `sample_rate` is in Hz. With
    `feature_extractor_cqt`, constant-Q magnitudes stand beside the convolutions' features (see `CqtFeatures`):
    `feature_extractor_cqt_bins` over seven octaves. No published checkpoint has them.

    Raises
    ------
    CheckpointError
        If a value is unusable; the message names the field.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: bool = False
    do_stable_layer_norm: bool = False
    do_normalize: bool = False
    sample_rate: int = 16000
    feature_extractor_cqt: bool = False
    feature_extractor_cqt_bins: int = 336

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                value = tuple(value) if isinstance(value, list | tuple) else ()
                object.__setattr__(self, field.name, value)
                self._check(field.name, value != () and all(type(v) is int and v > 0 for v in value))
            elif isinstance(field.default, bool):
                self._check(field.name, isinstance(value, bool))
            elif isinstance(field.default, int):
                self._check(field.name, type(value) is int and value > 0)
            elif isinstance(field.default, float):
                self._check(field.name, isinstance(value, int | float) and value > 0)
        for name in ("hidden_act", "feat_extract_activation"):
            self._check(name, getattr(self, name) in ACTIVATIONS, f"; known: {', '.join(ACTIVATIONS)}")
        self._check("feat_extract_norm", self.feat_extract_norm in ("group", "layer"), "; known: group, layer")
        for name in ("conv_kernel", "conv_stride"):
            self._check(name, len(getattr(self, name)) == len(self.conv_dim), "; it needs as many entries as conv_dim")
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            self._check(name, self.hidden_size % getattr(self, name) == 0, f"; hidden_size is {self.hidden_size}")
        whole = self.feature_extractor_cqt_bins % OCTAVES == 0
        self._check("feature_extractor_cqt_bins", whole, f"; it must be a multiple of {OCTAVES}, one per octave")

    def _check(self, name: str, good: bool, why: str = "") -> None:
        if not good:
            raise CheckpointError(
                f"model configuration: {name}={getattr(self, name)!r} is not supported{why}; check config.json"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        """Take over a published configuration.

        Parameters
        ----------
        config : mapping
            Contents of config.json.
        preprocessor : mapping, optional
            Contents of preprocessor_config.json. It decides `do_normalize` and the sample rate; without it the wave
            is taken as it is, at 16 kHz (at the rate in config.json for MERT).

        Raises
        ------
        CheckpointError
            If a setting is not supported; the message names the field.
        """
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name, harmless in _UNSUPPORTED.items():
            if config.get(name) not in harmless:
                raise CheckpointError(f"config.json: {name}={config[name]!r} is not supported; use a model without it")
        if config.get("model_type") in ("wav2vec2", "wavlm"):  # these two do not know the switches
            values |= {"feat_proj_layer_norm": True, "conv_pos_batch_norm": False}
        values["sample_rate"] = config.get("sample_rate", 24000) if config.get("model_type") == "mert_model" else 16000
        values["do_normalize"] = False
        if preprocessor is not None:
            values["sample_rate"] = preprocessor.get("sampling_rate", values["sample_rate"])
            values["do_normalize"] = preprocessor.get("do_normalize", True)  # the feature extractor's own default
        return cls(**values)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Infer the configuration of a bare state dict of HuBERT-base's kind, as Sylber publishes it.

        Strides, the number of heads and the place of the layer norms leave no trace in the shapes: they are those of
        HuBERT-base (heads of 64). Of Sylber's files one has to know besides:

        - They do not say whether the wave is standardised, and here it is taken as it is (`do_normalize` False). Sylber
          was trained on standardised sound; its package standardises what it reads from a file and takes arrays as they
          are. The group norm behind the first convolution makes the two nearly equal unless the sound is very faint.
          The package divides by the unbiased standard deviation, with which digital silence is NaN;
          `do_normalize` is that of training, ``(x - mean) / sqrt(variance + 1e-7)``, with which it stays zero.
        - Frame i stands for the samples ``320 i + 40 ... 320 i + 360``, as in every HuBERT. In training 160 zeros stood
          in front of the sound, so that frame i stood for what lies 160 samples (10 ms) earlier. The package and this
          encoder put nothing in front.

        Parameters
        ----------
        shapes : mapping
            Shape of each tensor, weight norm folded.

        Raises
        ------
        CheckpointError
            If it is no HuBERT, or one of another kind.
        """
        stem, inner = "feature_extractor.conv_layers", "encoder.layers.0.feed_forward.intermediate_dense.weight"
        conv_names = [f"{stem}.{i}.conv.weight" for i in range(len(cls.conv_stride))]
        position_name, projection = "encoder.pos_conv_embed.conv.weight", "feature_projection.projection.weight"
        sizes = dict.fromkeys([*conv_names, position_name], 3) | {projection: 2, inner: 2}
        bad = [name for name, size in sizes.items() if len(shapes.get(name, ())) != size or 0 in shapes[name]]
        if bad:
            raise CheckpointError(
                f"no HuBERT state dict: {bad[0]} is missing or misshapen, and no config.json is beside it; put one "
                "there, or fetch the checkpoint again"
            )
        convs, position = [shapes[name] for name in conv_names], shapes[position_name]
        width = shapes[projection][0]
        if f"{stem}.1.layer_norm.weight" in shapes or width > 768 or width % 64 or width % position[1]:
            raise CheckpointError(
                f"not of HuBERT-base's kind (group norm in the front end, width at most 768, here {width}), and no "
                "config.json beside it; put its config.json there"
            )
        return cls(
            hidden_size=width,
            num_hidden_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
            num_attention_heads=width // 64,
            intermediate_size=shapes[inner][0],
            feat_proj_layer_norm="feature_projection.layer_norm.weight" in shapes,
            conv_dim=tuple(shape[0] for shape in convs),
            conv_kernel=tuple(shape[2] for shape in convs),
            conv_bias=f"{stem}.0.conv.bias" in shapes,
            num_conv_pos_embeddings=position[2],
            num_conv_pos_embedding_groups=width // position[1],
            conv_pos_batch_norm="encoder.pos_conv_embed.batch_norm.weight" in shapes,
        )


class HubertEncoder(Encoder):
    """Frames of one hidden layer.

    The weight norm of the position convolution is folded: its weight is ``encoder.pos_conv_embed.conv.weight``. All
    other parameters have Hugging Face's names, without the model's prefix. Pre-LN and post-LN models have the same
    names and shapes, so weights cannot tell them apart: `do_stable_layer_norm` must be right.

    Parameters
    ----------
    config : HubertConfig
        Of the whole model.
    layer : int, optional
        Index into ``hidden_states``: 0 is the input of the first block, L the output of block L; the last one of a
        pre-LN model is after its final layer norm. Blocks behind it are not built. None: the last.

    Raises
    ------
    InputError
        If the model has no such layer.
    """

    type: ClassVar[str] = "hubert"
    ignored_prefixes: ClassVar[tuple[str, ...]] = ("adapter.",)  # behind the last hidden state
    config: HubertConfig
    layer: int
    transformer: ClassVar[Callable[..., Transformer]] = Transformer

    def __init__(self, config: HubertConfig, layer: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer = config.num_hidden_layers if layer is None else layer
        if not 0 <= self.layer <= config.num_hidden_layers:
            raise InputError(f"layer {layer} does not exist: choose one of 0 ... {config.num_hidden_layers}")
        self.dim = config.hidden_size
        self.context = None
        self.grid = conv_grid(config.sample_rate, config.conv_kernel, config.conv_stride)
        self.feature_extractor = ConvStem(
            config.conv_dim,
            config.conv_kernel,
            config.conv_stride,
            norm=config.feat_extract_norm,
            activation=config.feat_extract_activation,
            bias=config.conv_bias,
        )
        self.cqt = CqtFeatures(self.grid, config.feature_extractor_cqt_bins) if config.feature_extractor_cqt else None
        inputs = config.conv_dim[-1] + (config.feature_extractor_cqt_bins if config.feature_extractor_cqt else 0)
        self.feature_projection = FeatureProjection(
            inputs, self.dim, norm=config.feat_proj_layer_norm, eps=config.layer_norm_eps
        )
        self.encoder = type(self).transformer(
            self._attention,
            self.dim,
            config.intermediate_size,
            self.layer,
            complete=self.layer == config.num_hidden_layers,
            position=PositionalConv(
                self.dim,
                config.num_conv_pos_embeddings,
                config.num_conv_pos_embedding_groups,
                activation=config.feat_extract_activation,
                batch_norm=config.conv_pos_batch_norm,
            ),
            activation=config.hidden_act,
            eps=config.layer_norm_eps,
            pre_norm=config.do_stable_layer_norm,
        )

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; CQT fields only where they matter: older fingerprints stay."""
        values = super().config_dict()
        if not self.config.feature_extractor_cqt:
            del values["feature_extractor_cqt"], values["feature_extractor_cqt_bins"]
        return values

    def _attention(self, block: int) -> SelfAttention:
        return SelfAttention(self.dim, self.config.num_attention_heads)

    def _normalize(self, wave: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
        """Zero mean and unit variance for each row, ``(x - mean) / sqrt(var + 1e-7)``; zeros behind its end."""
        count = lengths.clamp_min(1)[:, None]
        exact = wave.double()  # so that the sums do not depend on the length of the padding
        centred = torch.where(valid, exact - exact.sum(1, keepdim=True) / count, 0.0)
        return (centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()).float()

    def inputs(self, wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of the convolutions, and beside them constant-Q magnitudes, if the configuration has them.

        Parameters
        ----------
        wave : float [B, N]
            What lies behind the end of a row is ignored; N gives at least one frame.
        lengths : int64 [B]
            Valid samples of each row.

        Returns
        -------
        features : float [B, T, C]
            Of the convolutions. Frames behind the end of a row hold nothing of use.
        magnitudes : float32 [B, T, bins] or None
        """
        valid = torch.arange(wave.shape[1], device=wave.device) < lengths[:, None]
        wave = torch.where(valid, wave, 0.0)
        if self.config.do_normalize:
            wave = self._normalize(wave, valid, lengths)
        return self.feature_extractor(wave, lengths), None if self.cqt is None else self.cqt(wave)

    def walk(
        self,
        features: Tensor,
        magnitudes: Tensor | None,
        lengths: Tensor,
        replace: Callable[[Tensor], Tensor] | None = None,
        skip: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Give the hidden states 0 ... `layer` one after another, float [B, T, D].

        Parameters
        ----------
        features, magnitudes
            From `inputs`.
        lengths : int64 [B]
            Valid samples of each row.
        replace : callable, optional
            Given the projected frames [B, T, D], returns what the blocks read in their place: masked training.
        skip : bool [B, layer], optional
            See `Transformer.forward`.
        """
        x = features if magnitudes is None else torch.cat([features, magnitudes.to(features.dtype)], -1)
        x = self.feature_projection(x)
        if replace is not None:
            x = replace(x)
        frames = None
        if any(self.grid.num_frames(count) < x.shape[1] for count in lengths.tolist()):
            frames = self.frame_lengths(lengths)
        yield from self.encoder(x, frames, skip)

    def _states(self, wave: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        """Hidden states 0 ... `layer` of a wave [B, N], with anything in frames behind the end of a row."""
        yield from self.walk(*self.inputs(wave, lengths), lengths)

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of a checked batch; see `Encoder.forward`."""
        for state in self._states(wave, lengths):
            last = state
        frames = self.frame_lengths(lengths)
        return Frames(_clear(last, frames), frames)

    def hidden_states(self, wave: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """All hidden states up to this encoder's layer.

        Parameters
        ----------
        wave : float [B, N]
            Waves at `sample_rate`.
        lengths : int64 [B], optional
            Valid samples of each row; all N where it is None.

        Returns
        -------
        list of float [B, T, D]
            ``layer + 1`` tensors; zeros behind the end of each row.

        Raises
        ------
        AudioError
            If the shapes do not fit.
        """
        if wave.ndim != 2 or (lengths is not None and lengths.shape != wave.shape[:1]):
            raise AudioError(f"hidden_states takes wave [batch, samples], lengths [batch], not {tuple(wave.shape)}")
        if lengths is None:
            lengths = torch.full((wave.shape[0],), wave.shape[1], dtype=torch.int64)
        lengths = lengths.to(device=wave.device, dtype=torch.int64)
        if self.grid.num_frames(wave.shape[1]) == 0:
            return [wave.new_zeros(wave.shape[0], 0, self.dim) for _ in range(self.layer + 1)]
        frames = self.frame_lengths(lengths)
        return [_clear(state, frames) for state in self._states(wave.float(), lengths)]


def _clear(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero the frames of x [B, T, D] behind the end of each row."""
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(valid[..., None], x, 0.0)
