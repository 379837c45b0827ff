"""w2v-BERT: filter bank, sub-sampling, and a conformer.

With its defaults this is the encoder of SeamlessM4T (w2v-BERT 2.0, Barrault et al. 2023, arXiv:2308.11596; 50 frames
per second), frame for frame what transformers' ``Wav2Vec2BertModel`` gives on the output of
``SeamlessM4TFeatureExtractor``. Other settings give the form of 2021 (Chung et al., arXiv:2108.06209; convolutional
sub-sampling, 25 frames per second) and one that streams exactly (chunked attention, stored normalisation).
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.features import FRAME, HOP, kaldi_fbank, normalize_bins, valid_frames
from speechtok.encoders.base import Encoder, Frames
from speechtok.errors import CheckpointError, InputError
from speechtok.frames import Context, FrameGrid
from speechtok.nn.conformer import BlockState, ConformerBlock
from speechtok.nn.subsampling import ConvSubsampling

__all__ = ["W2vBertConfig", "W2vBertEncoder", "W2vBertState"]

MEL_BINS, STACK = 80, 2
CONV_BINS = 19  # bins that two convolutions of stride 2 leave
CONV_FRAMES, CONV_STRIDE = 7, 4  # filter bank frames that they read and skip
SWISH = ("swish", "silu")


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

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if "position" in name or name in ("num_hidden_layers", "attention_past", "look_ahead") else 1
            if isinstance(getattr(W2vBertConfig, name), int) and (type(value) is not int or value < least):
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


@dataclass
class W2vBertState:
    """What the encoder remembers of a batch of streams; row b belongs to stream b.

    Parameters
    ----------
    blocks : list of BlockState
        Of every block.
    recent : float [B, smoothing - 1, D]
        The last outputs of the last block.
    seen : int64 [B]
        Positions that were computed.
    """

    blocks: list[BlockState]
    recent: Tensor
    seen: Tensor

    def rows(self) -> Iterator["W2vBertState"]:
        """The states of the single streams; copies, so that none keeps the memory of its batch mates alive."""
        for i in range(len(self.seen)):
            row = slice(i, i + 1)
            blocks = [BlockState(b.keys[row].clone(), b.values[row].clone(), b.conv[row].clone()) for b in self.blocks]
            yield W2vBertState(blocks, self.recent[row].clone(), self.seen[row].clone())

    def to(self, device: torch.device) -> "W2vBertState":
        """The same state on a device."""
        blocks = [BlockState(b.keys.to(device), b.values.to(device), b.conv.to(device)) for b in self.blocks]
        return W2vBertState(blocks, self.recent.to(device), self.seen.to(device))

    @staticmethod
    def join(states: Sequence["W2vBertState"]) -> "W2vBertState":
        """One batch of single streams."""
        blocks = [
            BlockState(*(torch.cat([getattr(b, field.name) for b in same]) for field in fields(BlockState)))
            for same in zip(*(state.blocks for state in states), strict=True)
        ]
        return W2vBertState(
            blocks, torch.cat([state.recent for state in states]), torch.cat([state.seen for state in states])
        )


class W2vBertEncoder(Encoder):
    """The conformer of w2v-BERT up to one layer.

    Parameter names are those of ``Wav2Vec2BertModel``. Only the blocks that the layer needs exist. With attention to
    the whole utterance or with its own statistics, streams only approximate the offline result; with chunked
    attention and stored statistics they are exact, and `advance` computes them chunk by chunk.

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
    feature_mean, feature_scale : float32 [80]
        Stored statistics (``normalization="stored"`` only): a bin becomes ``(x - mean) * scale``.
    """

    type = "w2v_bert"
    ignored_prefixes: ClassVar[tuple[str, ...]] = ("masked_spec_embed", "adapter.", "intermediate_ffn.")

    layer: int
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: W2vBertConfig, layer: int | None = None) -> None:
        super().__init__()
        layer = config.num_hidden_layers if layer is None else layer
        if not 0 <= layer <= config.num_hidden_layers:
            raise InputError(f"layer {layer}: this w2v-BERT has layers 0 to {config.num_hidden_layers}")
        self.config, self.layer, self.dim = config, layer, config.hidden_size
        size, eps = config.feature_projection_input_dim, config.layer_norm_eps
        if config.normalization == "stored":
            self.register_buffer("feature_mean", torch.zeros(MEL_BINS))
            self.register_buffer("feature_scale", torch.ones(MEL_BINS))
        if config.subsampling == "stack":
            # A frame stacks two filter bank frames: 400 samples and the 160 that the second one lies behind.
            self.subsampling, self.grid = None, FrameGrid(16000, STACK * HOP, FRAME + (STACK - 1) * HOP)
        else:
            self.subsampling = ConvSubsampling(MEL_BINS, size // CONV_BINS)
            self.grid = FrameGrid(16000, CONV_STRIDE * HOP, FRAME + (CONV_FRAMES - 1) * HOP)
        projection = OrderedDict[str, nn.Module](projection=nn.Linear(size, config.hidden_size))
        if config.normalization == "utterance":
            projection = OrderedDict(layer_norm=nn.LayerNorm(size, eps=eps), **projection)
        # With stored statistics nothing takes the level out of a frame, which tells silence from faint sounds.
        self.feature_projection = nn.Sequential(projection)
        blocks = [
            ConformerBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.conv_depthwise_kernel_size,
                config.left_max_position_embeddings,
                config.right_max_position_embeddings,
                eps,
                chunk=config.attention_chunk,
                past=config.attention_past,
            )
            for _ in range(layer)
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.context = self._context()

    def _context(self) -> Context | None:
        chunk = self.config.attention_chunk
        if chunk is None or self.config.normalization == "utterance":
            return None
        # The convolution of a chunk reads frames of earlier chunks, each of which saw the `past` before its own chunk.
        chunks = -(-(self.config.conv_depthwise_kernel_size - 1) // chunk)
        before = self.config.attention_past + chunks * chunk
        if self.layer == 0:  # no block, no chunks; the projection answers at once
            return Context(0, 0)
        # A window holds at least the frames that it answers for.
        ahead, smoothed = (-(-n // chunk) * chunk for n in (self.config.answers_after, self.config.smoothing - 1))
        return Context(max(self.layer * before + smoothed, ahead), 0, chunk, self.config.answers_after)

    @property
    def rounding(self) -> float:  # type: ignore[override]  # depends on the size: longer sums round more
        """See `Encoder.rounding`: seen were 2.9e-6 at full size (layer 17) and 1.6e-7 with four blocks of 192."""
        return 1e-5 if self.config.hidden_size > 512 else 1e-6

    @property
    def blocks(self) -> list[ConformerBlock]:
        """The conformer blocks, the lowest first."""
        return cast(list[ConformerBlock], list(cast(nn.ModuleList, self.encoder["layers"])))

    def filter_bank(self, wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log mel frames before any normalisation: float32 [B, T', 80] at 100 Hz and their lengths, int64 [B]."""
        return kaldi_fbank(wave, lengths)

    def sampled_lengths(self, counts: Tensor) -> Tensor:
        """Frames of the conformer for int64 [B] counts of filter bank frames."""
        if self.subsampling is None:
            return counts // STACK
        return ((counts - CONV_FRAMES).div(CONV_STRIDE, rounding_mode="floor") + 1).clamp_min(0)

    def inputs(self, mel: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and sub-sample.

        Parameters
        ----------
        mel : float32 [B, T', 80]
            From `filter_bank`.
        counts : int64 [B]
            Valid frames of each row.

        Returns
        -------
        features : float32 [B, T, 160] (or `feature_projection_input_dim`)
            Input frames of the conformer; zeros behind the end of each row. Filter bank frames that fill no whole
            frame take part in the normalisation only.
        lengths : int64 [B]
            Valid frames of each row.
        """
        if self.config.normalization == "stored":
            mel = (mel - self.feature_mean) * self.feature_scale
        else:
            mel = normalize_bins(mel, counts)
        counts = self.sampled_lengths(counts)
        if self.subsampling is None:
            total = mel.shape[1] // STACK
            features = mel[:, : total * STACK].reshape(mel.shape[0], total, MEL_BINS * STACK)
        elif mel.shape[1] < CONV_FRAMES:
            features = mel.new_zeros(mel.shape[0], 0, self.subsampling.dim)
        else:
            features = self.subsampling(mel)
        return features.masked_fill(~valid_frames(counts, features.shape[1])[..., None], 0.0), counts

    def features(self, wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Input frames of the conformer for wave float32 [B, N] at 16 kHz and lengths int64 [B], see `inputs`."""
        return self.inputs(*self.filter_bank(wave, lengths))

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of layer `layer` for a checked batch: wave float32 [B, N], lengths int64 [B]."""
        features, counts = self.features(wave, lengths)
        total = features.shape[1]
        x = deque(self._positions(features, counts), maxlen=1).pop()
        if self.layer:
            x = self._smooth(x)[:, self.config.answers_after - self.config.smoothing + 1 :]
        return Frames(x[:, :total].masked_fill(~valid_frames(counts, total)[..., None], 0.0), counts)

    def _smooth(self, x: Tensor) -> Tensor:
        """Means over `smoothing` positions: float [B, T, D] -> float [B, T - smoothing + 1, D]."""
        count = self.config.smoothing
        if count == 1:
            return x
        length = x.shape[1] - count + 1
        total = x[:, :length]
        for i in range(1, count):
            total = total + x[:, i : i + length]
        return total / count

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
        """Like `hidden_states`, from the output of `features`: float [B, T, F], int64 [B]."""
        return list(self.walk(features, frame_lengths))

    def walk(
        self,
        features: Tensor,
        frame_lengths: Tensor,
        replace: Callable[[Tensor], Tensor] | None = None,
        key_bias: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Hidden states one by one, so that a caller who wants the last one holds no others.

        Parameters
        ----------
        features, frame_lengths
            From `inputs`.
        replace : callable, optional
            Applied to the projected frames float [B, T, D] before the first block: puts mask vectors in (training).
        key_bias : sequence of float [B, T], optional
            One per block, see `RelativeKeyAttention.forward`.

        Yields
        ------
        float [B, T, D]
            ``layer + 1`` times, without smoothing; zeros behind the end of each row.
        """
        frames, ahead = features.shape[1], self.config.look_ahead
        behind = ~valid_frames(frame_lengths, frames)[..., None]
        for layer, x in enumerate(self._positions(features, frame_lengths, replace, key_bias)):
            first = ahead if layer else 0  # the projection answers at once
            yield x[:, first : first + frames].masked_fill(behind, 0.0)

    def _positions(
        self,
        features: Tensor,
        frame_lengths: Tensor,
        replace: Callable[[Tensor], Tensor] | None = None,
        key_bias: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """What `walk` cuts frames out of: answers lie `look_ahead` (smoothed: `answers_after`) behind their frames."""
        ahead = self.config.answers_after
        x = self.feature_projection(features)
        x = x.masked_fill(~valid_frames(frame_lengths, features.shape[1])[..., None], 0.0)
        if replace is not None:
            x = replace(x)
        x = F.pad(x, (0, 0, 0, ahead))
        yield x
        inside = valid_frames(frame_lengths + ahead, x.shape[1])
        valid = None if bool(inside.all()) else inside
        for index, block in enumerate(self.blocks):
            bias = None if key_bias is None else F.pad(key_bias[index], (0, ahead))
            x = block(x, valid, bias) if features.shape[1] else x
            if valid is not None:
                x = x.masked_fill(~inside[..., None], 0.0)
            yield x

    def stream_state(self, batch: int) -> W2vBertState:
        """State of `batch` streams before their first chunk, for `advance` (encoders of bounded context only)."""
        seen = torch.zeros(batch, dtype=torch.int64, device=next(self.parameters()).device)
        recent = torch.zeros(batch, self.config.smoothing - 1, self.dim, device=seen.device)
        return W2vBertState([block.state(batch) for block in self.blocks], recent, seen)

    def advance(
        self, wave: Tensor, lengths: Tensor, positions: Tensor, state: W2vBertState
    ) -> tuple[Tensor, W2vBertState]:
        """Compute the next chunk of every stream, see `Encoder.advance`; streams may be at different places."""
        chunk = self.context.chunk if self.context is not None else 0
        features, counts = self.features(wave, lengths)
        features = F.pad(features, (0, 0, 0, chunk - features.shape[1]))
        x = self.feature_projection(features).masked_fill(~valid_frames(counts, chunk)[..., None], 0.0)
        valid = valid_frames(positions, chunk)
        blocks = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, after = block.step(x, before, state.seen, valid)
            x = x.masked_fill(~valid[..., None], 0.0)
            blocks.append(after)
        x = torch.cat([state.recent, x], dim=1)
        recent = x[:, x.shape[1] - self.config.smoothing + 1 :]
        return self._smooth(x), W2vBertState(blocks, recent, state.seen + positions)
