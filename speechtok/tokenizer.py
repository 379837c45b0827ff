"""`Tokenizer`: an encoder, a segmenter where units are segments, and a quantizer; from sound to `Units`.

Batching never changes a file's units: rows of a batch are masked, and a frame whose two nearest
centroids are closer than the rounding error (a near-tie) is decided again on one canonical path, which
is the frame's own window alone on one thread (for encoders of bounded context: just what the frame
depends on, alone). `speechtok.segments` says how it is with segments.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok import bundle
from speechtok.audio.decode import AudioFile, as_mono, resampled
from speechtok.canonical import block_context, one_thread, padded
from speechtok.encoders.base import ChunkState, Encoder, Frames
from speechtok.errors import AudioError, CheckpointError, FingerprintError, FormatError, InputError
from speechtok.frames import Context, Window, WindowRule
from speechtok.quantizers.base import Quantizer
from speechtok.segments import SegmentPass, cut_sound, whole_sound
from speechtok.units import Units
from speechtok.windows import EncodedWindow, cut

if TYPE_CHECKING:
    from speechtok.segmenters.base import Segmenter
    from speechtok.streaming import Stream, Streams

__all__ = ["DEFAULT_WINDOW", "Tokenizer"]

DEFAULT_WINDOW = WindowRule(max_seconds=30.0, context_seconds=3.0)
# Windows are pooled and sorted by length before they are cut into batches, so that little is padded.
_POOL_BATCHES = 4


def usable_device(name: str | torch.device) -> torch.device:
    """Check a device by putting something on it; InputError if it cannot be used here."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"device {str(name)!r} cannot be used here ({reason}); the CPU is device 'cpu'") from error


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
        self.segmenter, self.silence_gap = segmenter, silence_gap
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
        self.encoder.to(self.device)
        self.quantizer.to(self.device)
        return self

    # -- encode ---------------------------------------------------------------------------------------------------

    def encode(self, source: Any, sample_rate: int | None = None) -> Units:
        """Units of one file or array.

        Parameters
        ----------
        source : path, binary stream, or samples float [N] / [N, C]
            Arrays in [-1, 1] (int16 is scaled); channels are averaged.
        sample_rate : int
            Of an array (Hz).

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
            One per window. Segment tokenizers take the windows of long sounds one by one, and give the last segments of
            these sounds when there are no more jobs, as one more result.
        """
        limit = int(batch_seconds * self.sample_rate)
        pool: list[tuple[Any, Window, NDArray[np.float32]]] = []
        pooled = 0
        long: dict[Any, SegmentPass] = {}
        for name, window, wave in jobs:
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
            If this is a segment tokenizer and a window is not a whole sound: `encode_windows` takes those in order.
        """
        if self.segmenter is not None and any(window.stop is not None for window, _ in batch):
            raise InputError(f"{self.name}: a segment may cross windows; give the windows of a sound to encode_windows")
        # This very pass is the canonical one where the window is alone and nothing can split its sums differently.
        canonical = len(batch) == 1 and self.encoder.context is None and torch.get_num_threads() == 1
        frames = self._frames([wave for _, wave in batch])
        if self.segmenter is not None:
            sounds = [
                (window, wave, row[:count].cpu().numpy())
                for (window, wave), row, count in zip(batch, frames.features, frames.lengths, strict=True)
            ]
            return [
                cut_sound(window.first, window.count, partial(whole_sound, self, window, wave, row, canonical))
                for window, wave, row in sounds
            ]
        results = []
        for (window, wave), (ids, tied) in zip(batch, self._quantized_whole(frames), strict=True):
            kept = slice(window.skip, window.skip + window.count)
            ids, ties = ids[:, kept], np.flatnonzero(tied[kept])
            ids = ids if canonical else self._decided(window, wave, ids, ties)
            results.append(EncodedWindow(window.first, window.count, ids, len(ties)))
        return results

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
        encoder, context = self.encoder, self.encoder.context
        if context is None:
            raise InputError(f"{self.name}: its encoder depends on the whole sound and has no chunks")
        seen, hop = state.seen.tolist(), encoder.hop
        width = encoder.grid.num_samples(context.chunk)
        pieces = [wave[at * hop - w.start :][:width] for (w, wave), at in zip(batch, seen, strict=True)]
        positions = [min(context.chunk, n + context.look_ahead - at) for n, at in zip(frames, seen, strict=True)]
        features, state = encoder.advance(
            *padded(pieces, width, self.device), torch.tensor(positions, device=self.device), state
        )
        skips = [w.first + context.look_ahead - at for (w, _), at in zip(batch, seen, strict=True)]
        kept = [slice(skip, skip + w.count) for skip, (w, _) in zip(skips, batch, strict=True)]
        results = []
        for (window, wave), (ids, tied) in zip(batch, self._quantized(features, kept), strict=True):
            ties = np.flatnonzero(tied)
            ids = self._decided(window, wave, ids, ties)
            results.append(EncodedWindow(window.first, window.count, ids, len(ties)))
        return results, state

    def _frames(self, waves: Sequence[NDArray[np.float32]]) -> Frames:
        """Pad and encode."""
        return self.encoder(*padded(waves, max(len(wave) for wave in waves), self.device))

    def _quantized_whole(self, frames: Frames) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Ids int32 [K, T] and near-ties bool [T] of each wave."""
        return self._quantized(frames.features, [slice(0, count) for count in frames.lengths.tolist()])

    def _quantized(self, features: Tensor, kept: Sequence[slice]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Quantize float [B, T, D] frames: ids int32 [K, t] and near-ties bool [t] of the kept ones of each row."""
        codes = self.quantizer(features)
        ids, margins = codes.ids.cpu().numpy(), codes.margins.cpu().numpy()
        if any(np.isnan(row[frames]).any() for row, frames in zip(margins, kept, strict=True)):
            raise CheckpointError(f"{self.name}: the encoder gave NaN frames for finite sound; its weights are damaged")
        tied = margins < self.encoder.rounding
        return [(ids[i, :, frames], tied[i, frames]) for i, frames in enumerate(kept)]

    def _decided(
        self, window: Window, wave: NDArray[np.float32], ids: NDArray[np.int32], ties: NDArray[np.intp]
    ) -> NDArray[np.int32]:
        """Ids int32 [K, T] of a window's kept frames, the near-tied ones of them by their canonical decision."""
        if not len(ties):
            return ids
        grid, context = self.encoder.grid, self.encoder.context
        total = grid.num_frames(len(wave))
        spans: dict[tuple[int, int], list[int]] = {}  # the frames of a chunk depend on the same samples
        for tie in ties.tolist():
            frame = window.skip + tie
            begin, end = (0, total) if context is None else context.needs(frame, frame + 1)
            spans.setdefault((begin, min(end, total)), []).append(tie)
        ids = ids.copy()
        with one_thread():
            for (begin, end), chosen in spans.items():
                piece = wave if context is None else wave[begin * grid.hop :][: grid.num_samples(end - begin)]
                again, _ = self._quantized_whole(self._frames([piece]))[0]
                ids[:, chosen] = again[:, window.skip - begin + np.array(chosen)]
        return ids

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

    # -- save and load --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What decides the units, besides the weights."""
        segments = {}
        if self.segmenter is not None:  # without one nothing is said, so that older fingerprints stay as they are
            segments = {
                "segmenter": self.segmenter.type,
                "segmenter_config": self.segmenter.config_dict(),
                "silence_gap": self.silence_gap,
            }
        return {
            "format": bundle.FORMAT,
            "encoder": self.encoder.type,
            "encoder_config": self.encoder.config_dict(),
            "layer": self.encoder.layer,
            "quantizer": self.quantizer.type,
            "quantizer_config": self.quantizer.config_dict(),
            **segments,
            "window": asdict(self.window),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration and weights, 32 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode())
        for part, module in (("encoder", self.encoder), ("quantizer", self.quantizer)):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def describe(self) -> dict[str, Any]:
        """The contents of ``tokenizer.json``: in a bundle and beside every output."""
        grid = self.encoder.grid
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            **self._identity(),
            "vocab_size": self.vocab_size,
            "codebooks": self.quantizer.codebooks,
            "sample_rate": self.sample_rate,
            "hop_seconds": grid.hop_seconds,
            "offset_seconds": grid.offset_seconds,
            "bitrate": None if self.bitrate is None else round(self.bitrate, 3),
            "licence": self.licence,
            "training": self.training,
            "versions": {name: version(name) for name in ("speechtok", "torch", "numpy")},
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the bundle: ``tokenizer.json``, ``encoder.safetensors`` (if it has weights), ``quantizer.safetensors``.

        Float32 weights take half the space where all values of a tensor are whole bfloat16 numbers.

        Raises
        ------
        OutputError
            If the folder holds another tokenizer or cannot be written.
        """
        bundle.write(Path(folder), self.describe(), {"encoder": self.encoder, "quantizer": self.quantizer})
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
        if tokenizer.fingerprint != description["fingerprint"]:
            raise FingerprintError(
                f"{folder}: tokenizer.json says fingerprint {description['fingerprint']}, but its files give "
                f"{tokenizer.fingerprint}; the bundle is damaged or was edited, fetch or make it again"
            )
        return tokenizer
