"""w2v-BERT: filter bank, sub-sampling, and a conformer.

With its defaults this is the encoder of SeamlessM4T (w2v-BERT 2.0, Barrault et al. 2023, arXiv:2308.11596; 50 frames
per second), frame for frame what transformers' ``Wav2Vec2BertModel`` gives on the output of
``SeamlessM4TFeatureExtractor``. Other settings give the form of 2021 (Chung et al., arXiv:2108.06209; convolutional
sub-sampling, 25 frames per second) and one that streams exactly (chunked attention, stored normalisation).
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.features import FRAME, HOP, kaldi_fbank, normalize_bins, valid_frames
from speechtok.encoders.base import Encoder, Frames
from speechtok.encoders.w2v_bert_config import CONV_BINS, MEL_BINS, STACK, W2vBertConfig
from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid
from speechtok.nn.conformer import BlockState, ConformerBlock
from speechtok.nn.subsampling import ConvSubsampling

__all__ = ["W2vBertEncoder", "W2vBertState"]

CONV_FRAMES, CONV_STRIDE = 7, 4  # filter bank frames that they read and skip


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
        Index into ``hidden_states``: 0 is the projected input, L the output of block L; None: the last. Frames of the
        configuration's `projected_layer` go through its projection.

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
        self.config, self.layer = config, layer
        self.dim = config.projection_size if self.projects else config.hidden_size
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
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(self.new_block() for _ in range(layer))})
        if 0 < config.projected_layer <= layer:  # the whole model has it, whichever layer is read
            self.projection = nn.Linear(config.hidden_size, config.projection_size + config.gated)
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
        """See `Encoder.rounding`: seen were 2.9e-6 at full size (layer 17) and 1.6e-7 with four blocks of 192.

        Gated frames, 1.4e-6 with three blocks of 192: where the gate is nearly shut, its error is large beside it.
        """
        size = 1e-5 if self.config.hidden_size > 512 else 1e-6
        return 5 * size if self.gates else size

    @property
    def projects(self) -> bool:
        """Whether frames are projected: `layer` is the configuration's `projected_layer`."""
        return 0 < self.config.projected_layer == self.layer

    @property
    def gates(self) -> bool:
        """Whether the projection is gated."""
        return self.projects and self.config.gated

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, without defaults: new fields leave fingerprints as they are."""
        return {
            field.name: getattr(self.config, field.name)
            for field in fields(self.config)
            if getattr(self.config, field.name) != field.default
        }

    @property
    def blocks(self) -> list[ConformerBlock]:
        """The conformer blocks, the lowest first."""
        return cast(list[ConformerBlock], list(cast(nn.ModuleList, self.encoder["layers"])))

    def new_block(self, dropout: float = 0.0) -> ConformerBlock:
        """A block with new weights, like those of the encoder."""
        config = self.config
        return ConformerBlock(
            config.hidden_size, config.num_attention_heads, config.intermediate_size,
            config.conv_depthwise_kernel_size, config.left_max_position_embeddings,
            config.right_max_position_embeddings, config.layer_norm_eps, chunk=config.attention_chunk,
            past=config.attention_past, dropout=dropout,
        )  # fmt: skip

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
        return self.answers(*self.features(wave, lengths))

    def answers(self, features: Tensor, counts: Tensor) -> Frames:
        """Frames of layer `layer`, smoothed and projected as `encode` gives them, from the output of `inputs`."""
        x = self.projected(features, counts)
        x = gated(x) if self.gates else x
        return Frames(x.masked_fill(~valid_frames(counts, x.shape[1])[..., None], 0.0), counts)

    def projected(self, features: Tensor, counts: Tensor) -> Tensor:
        """As `answers`, before the gate and with anything behind a row's end: float [B, T, D], gated D + 1."""
        x = deque(self._positions(features, counts), maxlen=1).pop()
        if self.layer:
            x = self.answer(x)[:, self.config.answers_after - self.config.smoothing + 1 :]
        return x[:, : features.shape[1]]

    def answer(self, x: Tensor) -> Tensor:
        """Means over `smoothing` positions, projected: float [B, T, D] -> float [B, T - smoothing + 1, D']."""
        count = self.config.smoothing
        if count > 1:
            length = x.shape[1] - count + 1
            total = x[:, :length]
            for i in range(1, count):
                total = total + x[:, i : i + length]
            x = total / count
        return self.projection(x) if self.projects else x

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
            ``layer + 1`` times, without smoothing and projection; zeros behind the end of each row.
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
        recent = torch.zeros(batch, self.config.smoothing - 1, self.config.hidden_size, device=seen.device)
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
        x = self.answer(x)
        return gated(x) if self.gates else x, W2vBertState(blocks, recent, state.seen + positions)


def gated(projected: Tensor) -> Tensor:
    """Directions of length 1 times a gate: float [..., D + 1] with the gate's logit last -> float [..., D]."""
    return F.normalize(projected[..., :-1], dim=-1) * projected[..., -1:].sigmoid()
