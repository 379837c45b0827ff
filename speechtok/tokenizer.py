"""`Tokenizer`: an encoder, a segmenter where units are segments, and a quantizer; from sound to `Units`.

Batching never changes a file's units: rows of a batch are masked, and a frame whose two nearest
centroids are closer than the rounding error (a near-tie) is decided again on one canonical path, which
is the frame's own window alone on one thread (for encoders of bounded context: just what the frame
depends on, alone). `speechtok.segments` says how it is with segments. Recurrent encoders take the canonical path
throughout: chunk by chunk, one sound at a time.

A tokenizer with a decoder is a codec: `Tokenizer.decode` turns its units back into sound.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok import bundle
from speechtok.audio.decode import AudioFile, as_mono, resampled
from speechtok.canonical import block_context
from speechtok.decoding import DecoderStream, WavePass, check_parts
from speechtok.devices import usable_device
from speechtok.encoders.base import ChunkState, Encoder
from speechtok.errors import AudioError, FingerprintError, FormatError, InputError
from speechtok.frame_units import encoded_chunks, encoded_frames, encoded_in_order, frames_of
from speechtok.frames import Context, Window, WindowRule
from speechtok.quantizers.base import Quantizer
from speechtok.quantizers.residual import ResidualQuantizer
from speechtok.segments import SegmentPass, cut_sound, whole_sounds
from speechtok.units import Units
from speechtok.windows import EncodedWindow, cut

if TYPE_CHECKING:
    from speechtok.codecs.base import Decoder
    from speechtok.segmenters.base import Segmenter
    from speechtok.streaming import Stream, Streams

__all__ = ["DEFAULT_WINDOW", "Tokenizer"]

DEFAULT_WINDOW = WindowRule(max_seconds=30.0, context_seconds=3.0)
# Windows are pooled and sorted by length before they are cut into batches, so that little is padded.
_POOL_BATCHES = 4


class Tokenizer:
    """Turns sound into units.

    Parameters
    ----------
    encoder : Encoder
    quantizer : Quantizer
    name : str
    segmenter : Segmenter, optional
        Cuts the frames into segments, whose means are quantized: a *segment tokenizer*. None: every frame is a unit.
    silence_gap : int, optional
        Segment tokenizers only. Where the gap between a segment and the one before it (or the start of the sound) is
        more than so many frames, one silence unit that spans the gap stands before the segment. Its id is the
        quantizer's ``vocab_size``. A gap behind the last segment has no unit. None: there are no silence units.
    decoder : Decoder, optional
        Makes sound of quantized frames. The units do not depend on it, so it is no part of the fingerprint: units that
        were made before it was trained on, or without it, can be decoded.
    window : WindowRule
        How files longer than ``window.max_seconds`` are cut; part of the fingerprint.
    licence : str
        Of the weights.
    training : dict
        What the tokenizer was made from; for the reader, not part of the fingerprint.

    Raises
    ------
    FormatError
        If the parts do not fit together.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        *,
        name: str,
        segmenter: "Segmenter | None" = None,
        silence_gap: int | None = None,
        decoder: "Decoder | None" = None,
        window: WindowRule = DEFAULT_WINDOW,
        licence: str = "unknown",
        training: dict[str, Any] | None = None,
    ):
        if encoder.dim != quantizer.dim:
            raise FormatError(
                f"{name}: the encoder's frames have {encoder.dim} dimensions, the quantizer expects {quantizer.dim}; "
                "encoder, layer or centroids are not those that belong together"
            )
        if segmenter is not None and quantizer.codebooks != 1:
            raise FormatError(
                f"{name}: segments have one unit each, but the quantizer has {quantizer.codebooks} codebooks"
            )
        if silence_gap is not None and (segmenter is None or silence_gap < 0):
            raise FormatError(
                f"{name}: silence_gap {silence_gap} is a number of frames between segments; "
                "give 0 or more together with a segmenter, or leave it out"
            )
        if segmenter is not None and (encoder.recurrent or decoder is not None):
            raise FormatError(f"{name}: segments exist of encoders without unbounded state, and have no decoder")
        if decoder is not None:
            check_parts(name, encoder, quantizer, decoder)
        self.segmenter, self.silence_gap = segmenter, silence_gap
        self.decoder = None if decoder is None else decoder.eval()
        self.encoder, self.quantizer = encoder.eval(), quantizer.eval()
        window.core(encoder.grid, self.context)  # refuses a rule that does not fit
        self.name, self.window, self.licence, self.training = name, window, licence, training or {}
        self.device = torch.device("cpu")

    @property
    def sample_rate(self) -> int:
        """Rate of the waves it reads (Hz)."""
        return self.encoder.sample_rate

    @property
    def context(self) -> Context | None:
        """In which windows of long sounds are cut: the encoder's; for segments in the blocks of the canonical path."""
        return self.encoder.context if self.segmenter is None else block_context(self.encoder)

    @property
    def in_order(self) -> bool:
        """Whether the windows of a long sound must be encoded in order: what comes before reaches into a window."""
        return self.segmenter is not None or self.encoder.recurrent

    @property
    def segment_hop(self) -> int | None:
        """Of segment tokenizers, samples from frame to frame, in which the spans of units are counted; else None."""
        return None if self.segmenter is None else self.encoder.hop

    @property
    def vocab_size(self) -> int:
        """Ids are below this; the silence unit, where there is one, is the last of them."""
        return self.quantizer.vocab_size + (self.silence_gap is not None)

    @property
    def silence_unit(self) -> int | None:
        """The id that stands for silence between segments; None without `silence_gap`."""
        return None if self.silence_gap is None else self.quantizer.vocab_size

    @property
    def rate(self) -> float | None:
        """Units per second (before run-length coding); None for segments, whose number depends on the sound."""
        return self.encoder.grid.rate if self.segmenter is None else None

    @property
    def codebooks(self) -> int:
        """Ids per frame."""
        return self.quantizer.codebooks

    @property
    def bitrate(self) -> float | None:
        """Nominal bits per second: ``rate * codebooks * log2(vocab_size)``; None where `rate` is."""
        return None if self.rate is None else self.rate * self.quantizer.codebooks * float(np.log2(self.vocab_size))

    def to(self, device: str | torch.device) -> "Tokenizer":
        """Move the models to a device, in place.

        Raises
        ------
        InputError
            If this machine or this build of torch has no such device.
        """
        self.device = usable_device(device)
        for part in self._parts.values():
            part.to(self.device)
        return self

    @property
    def _parts(self) -> "dict[str, torch.nn.Module]":
        """The parts that have weights."""
        decoder = {} if self.decoder is None else {"decoder": self.decoder}
        return {"encoder": self.encoder, "quantizer": self.quantizer, **decoder}

    # -- encode ---------------------------------------------------------------------------------------------------

    def encode(self, source: Any, sample_rate: int | None = None) -> Units:
        """Units of one file or array.

        Parameters
        ----------
        source : path, binary stream, or samples float [N] / [N, C]
            Arrays in [-1, 1] (int16 is scaled); channels are averaged.
        sample_rate : int
            Of an array (Hz). Where it is the tokenizer's own, however low, nothing is resampled.

        Returns
        -------
        Units
            Empty if the sound is shorter than one frame, or has no segment.

        Raises
        ------
        AudioError
            If the sound cannot be used.
        InputError
            If its segmenter cannot cut it (`MinCut`: longer than 6000 frames without silence).
        """
        return self.encode_batch([source], sample_rate)[0]

    def encode_batch(
        self, sources: Sequence[Any], sample_rate: int | None = None, *, batch_seconds: float = 60.0
    ) -> list[Units]:
        """Units of several files or arrays, encoded together; parameters as `encode`.

        Parameters
        ----------
        batch_seconds : float
            Padded audio per batch; changes speed and memory, never the units.
        """
        jobs = (
            (i, window, wave) for i, source in enumerate(sources) for window, wave in self.windows(source, sample_rate)
        )
        parts: list[list[EncodedWindow]] = [[] for _ in sources]
        for index, encoded in self.encode_windows(jobs, batch_seconds):
            parts[index].append(encoded)
        return [self.assemble(part) for part in parts]

    def windows(self, source: Any, sample_rate: int | None = None) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        """Decode, resample and cut one source (see `encode`) into windows with their samples, float32 [n]."""
        grid, context = self.encoder.grid, self.context
        if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
            with AudioFile(source) as file:
                blocks = resampled(file.blocks(), file.sample_rate, self.sample_rate)
                yield from cut(blocks, grid, self.window, context)
        else:
            if sample_rate is None:
                raise AudioError("an array needs its sample_rate; pass sample_rate=...")
            blocks = resampled(iter([as_mono(source)]), sample_rate, self.sample_rate)
            yield from cut(blocks, grid, self.window, context)

    def encode_windows(
        self, jobs: Iterable[tuple[Any, Window, NDArray[np.float32]]], batch_seconds: float
    ) -> Iterator[tuple[Any, EncodedWindow]]:
        """Encode windows in batches of similar length; results come in any order.

        Parameters
        ----------
        jobs : iterable of (hashable name of the sound, window, samples float32 [n])
            The windows of a sound come in order; those of several sounds may be mixed.
        batch_seconds : float
            Padded audio per batch.

        Yields
        ------
        (name of the sound, EncodedWindow)
            One per window. Recurrent encoders take windows one by one. So do segment tokenizers with those of long
            sounds, whose last segments come when there are no more jobs, as one more result.
        """
        limit = int(batch_seconds * self.sample_rate)
        pool: list[tuple[Any, Window, NDArray[np.float32]]] = []
        pooled = 0
        long: dict[Any, SegmentPass] = {}
        states: dict[Any, ChunkState] = {}
        for name, window, wave in jobs:
            if self.encoder.recurrent:
                before = states.pop(name, None) or self.encoder.stream_state(1)
                encoded, state = encoded_in_order(self, window, wave, before)
                if window.stop is not None:
                    states[name] = state
                yield name, encoded
                continue
            if self.segmenter is not None and window.stop is not None:
                if name not in long:
                    long[name] = SegmentPass.new(self)
                push = partial(long[name].push, self, window, wave)
                yield name, cut_sound(window.first, window.count, push)
                continue
            pool.append((name, window, wave))
            pooled += len(wave)
            if pooled >= _POOL_BATCHES * limit:
                yield from self._encode_pool(pool, limit)
                pool, pooled = [], 0
        yield from self._encode_pool(pool, limit)
        for name, sound in long.items():
            yield name, cut_sound(sound.cutter.frames, 0, partial(sound.flush, self))

    def _encode_pool(
        self, pool: list[tuple[Any, Window, NDArray[np.float32]]], limit: int
    ) -> Iterator[tuple[Any, EncodedWindow]]:
        pool = sorted(pool, key=lambda job: len(job[2]))
        while pool:
            # From the longest down: the batch is as wide as its first window.
            size = min(len(pool), max(1, limit // max(1, len(pool[-1][2]))))
            batch, pool = pool[-size:], pool[:-size]
            results = self.encode_batch_of_windows([(window, wave) for _, window, wave in batch])
            yield from zip((name for name, _, _ in batch), results, strict=True)

    @torch.inference_mode()
    def encode_batch_of_windows(self, batch: Sequence[tuple[Window, NDArray[np.float32]]]) -> list[EncodedWindow]:
        """Encode windows as one padded batch and decide near-ties on the canonical path.

        Raises
        ------
        InputError
            If `in_order` and a window is not a whole sound: `encode_windows` takes those in order.
        """
        if self.in_order and any(window.stop is not None for window, _ in batch):
            raise InputError(
                f"{self.name}: a segment, or the encoder's state, may cross windows; give the windows of a sound to "
                "encode_windows"
            )
        if self.encoder.recurrent:
            return [encoded_in_order(self, *job, self.encoder.stream_state(1))[0] for job in batch]
        # This very pass is the canonical one where the window is alone and nothing can split its sums differently.
        canonical = len(batch) == 1 and self.encoder.context is None and torch.get_num_threads() == 1
        frames = frames_of(self, [wave for _, wave in batch])
        if self.segmenter is not None:
            return whole_sounds(self, batch, frames, canonical)
        return encoded_frames(self, batch, frames, canonical)

    @torch.inference_mode()
    def encode_chunks(
        self, batch: Sequence[tuple[Window, NDArray[np.float32]]], frames: Sequence[int], state: ChunkState
    ) -> tuple[list[EncodedWindow], ChunkState]:
        """Encode the next chunk of every stream in one batch and decide near-ties on the canonical path.

        Parameters
        ----------
        batch : sequence of (window, samples float32 [n])
            Of each stream, the window of its next chunk, see `Context.window`.
        frames : sequence of int
            Frames of each stream's sound, as far as it is known.
        state : ChunkState
            Of the encoder before these chunks, one row per stream.

        Returns
        -------
        list of EncodedWindow
        ChunkState
            After these chunks.
        """
        return encoded_chunks(self, batch, frames, state)

    def assemble(self, parts: Iterable[EncodedWindow], first: int = 0) -> Units:
        """Join the results of a sound's windows, in any order, to `Units`; those of frames begin with frame `first`.

        Raises
        ------
        InputError
            If the sound cannot be cut into segments.
        """
        parts = sorted(parts, key=lambda part: part.first)
        for part in parts:
            if part.error is not None:
                raise part.error
        ids = np.concatenate([np.zeros((self.quantizer.codebooks, 0), np.int32), *(part.ids for part in parts)], axis=1)
        grid = self.encoder.grid
        if self.segmenter is None:
            begin = first + np.arange(ids.shape[1], dtype=np.int64)
            spans = np.stack([begin, begin + 1], axis=1)
        else:
            spans = np.concatenate([np.zeros((0, 2), np.int64), *(p.spans for p in parts if p.spans is not None)])
        starts, ends = grid.offset + grid.hop * spans.T
        if grid.partial and len(ends) and parts[-1].stop is not None:
            ends[-1] = min(ends[-1], parts[-1].stop)  # the last frame ends with its sound
        flat = ids[0] if self.quantizer.codebooks == 1 else ids
        return Units(flat, starts, ends, self.sample_rate, self.vocab_size, self.fingerprint)

    def stream(self, sample_rate: int | None = None, *, window: WindowRule | None = None) -> "Stream":
        """Open a stream of units; see `speechtok.streaming.Stream`."""
        from speechtok.streaming import Stream

        return Stream(self, self.sample_rate if sample_rate is None else sample_rate, window=window)

    def streams(self, *, window: WindowRule | None = None) -> "Streams":
        """Many streams that are encoded together; see `speechtok.streaming.Streams`."""
        from speechtok.streaming import Streams

        return Streams(self, window=window)

    # -- decode ---------------------------------------------------------------------------------------------------

    def decode(self, units: Units) -> NDArray[np.float32]:
        """Sound of units that this tokenizer made, or the one of its first codebooks (`with_codebooks`).

        The wave is computed in blocks of fixed size, so that `DecoderStream` gives the same bits.

        Parameters
        ----------
        units : Units
            Of a whole sound.

        Returns
        -------
        float32 [N]
            At `sample_rate`; N = hop times frames, less what the last unit lacks of a whole frame. If the units are
            those of a whole sound, that is its length where frames cover it all (`FrameGrid.partial`), else less.

        Raises
        ------
        FormatError
            If this tokenizer has no decoder.
        FingerprintError
            If the units are those of another tokenizer.
        """
        sound = WavePass.new(self)
        return np.concatenate([sound.push(self, units), sound.flush(self)])

    def decoder_stream(self) -> DecoderStream:
        """Open a stream of sound; see `speechtok.decoding.DecoderStream`."""
        return DecoderStream(self)

    def with_codebooks(self, count: int) -> "Tokenizer":
        """The tokenizer of the first `count` codebooks: the same first ids at a lower bitrate.

        It has the same name and shares encoder and decoder, but has a fingerprint of its own. What it made can be
        decoded by it and by the one with all codebooks.

        Raises
        ------
        InputError
            If there are not so many codebooks.
        """
        if count == self.codebooks:
            return self
        if not 1 <= count < self.codebooks or not isinstance(self.quantizer, ResidualQuantizer):
            raise InputError(f"{self.name} has {self.codebooks} codebooks, not {count}; give 1 to {self.codebooks}")
        fewer = Tokenizer(
            self.encoder, self.quantizer.first(count), name=self.name, decoder=self.decoder, window=self.window,
            licence=self.licence, training=self.training,
        )  # fmt: skip
        fewer.device = self.device
        return fewer

    # -- save and load --------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration and weights, 32 hexadecimal digits."""
        return bundle.digest(bundle.identity(self), {"encoder": self.encoder, "quantizer": self.quantizer})

    @cached_property
    def decoder_fingerprint(self) -> str:
        """Hash of the decoder's configuration and weights; empty without one."""
        if self.decoder is None:
            return ""
        identity = {"decoder": self.decoder.type, "decoder_config": self.decoder.config_dict()}
        return bundle.digest(identity, {"decoder": self.decoder})

    def describe(self) -> dict[str, Any]:
        """The contents of ``tokenizer.json``: in a bundle and beside every output."""
        return bundle.describe(self)

    def save(self, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
        """Write the bundle: ``tokenizer.json`` and for each part with weights a file like ``encoder.safetensors``.

        Float32 weights take half the space where all values of a tensor are whole bfloat16 numbers.

        Parameters
        ----------
        folder : path
        base : str, optional
            Name of a bundle beside `folder`. Encoder weights that it has, too, are not written again: the bundle can be
            read only beside that one.

        Raises
        ------
        InputError
            If `base` has none of the encoder's weights.
        OutputError
            If the folder holds another tokenizer or cannot be written.
        """
        bundle.write(Path(folder), self.describe(), self._parts, base)
        return Path(folder)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read a bundle that `save` wrote.

        Raises
        ------
        FormatError
            If a file is missing or malformed.
        FingerprintError
            If configuration or weights are not those that the fingerprint was made of.
        """
        description, parts = bundle.read(Path(folder))
        tokenizer = Tokenizer(
            name=description["name"],
            licence=description.get("licence", "unknown"),
            training=description.get("training", {}),
            **parts,
        )
        found = tokenizer.describe()
        for name in ("fingerprint", "decoder_fingerprint"):
            if found.get(name) != description.get(name):
                raise FingerprintError(
                    f"{folder}: tokenizer.json says {name} {description.get(name)}, but its files give "
                    f"{found.get(name)}; the bundle is damaged or was edited, fetch or make it again"
                )
        return tokenizer
