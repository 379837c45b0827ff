"""Run one shard: decode threads feed a bounded queue, the encoder takes batches from it."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.decode import AudioFile, resampled
from speechtok.corpus.rows import Row
from speechtok.corpus.sources import Utterance
from speechtok.errors import AudioError, InputError, SpeechtokError
from speechtok.frames import Context, FrameGrid, Window, WindowRule
from speechtok.tokenizer import Tokenizer
from speechtok.windows import EncodedWindow, cut

__all__ = ["Decoder", "ShardResult", "Source", "run_shard"]

_QUEUE = 32  # windows that wait for the encoder

Job = tuple[int, Window, NDArray[np.float32]]


@dataclass
class ShardResult:
    """Rows in input order, errors in input order, and seconds of audio that were encoded."""

    rows: list[Row]
    errors: list[dict[str, str]]
    seconds: float


@dataclass
class Source:
    """What is known of a file once it was decoded."""

    sample_rate: int = 0
    num_samples: int = 0
    error: str | None = None


class Decoder:
    """Decodes utterances in threads, from its construction on; iterate over it for (index, window, samples).

    Parameters
    ----------
    utterances : sequence of Utterance
    grid : FrameGrid
    rule : WindowRule
    threads : int
        One thread keeps the order of the files.
    context : Context, optional
        Of the tokenizer, see `WindowBuffer`.

    Attributes
    ----------
    sources : list of Source
        One per utterance; complete when the iteration ends.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        grid: FrameGrid,
        rule: WindowRule,
        threads: int,
        context: Context | None = None,
    ):
        self.utterances, self.grid, self.rule, self.context = utterances, grid, rule, context
        self.sources = [Source() for _ in utterances]
        self._ready: queue.Queue[Job | BaseException | None] = queue.Queue(_QUEUE)
        self._stop, self._lock, self._todo = threading.Event(), threading.Lock(), iter(range(len(utterances)))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max(1, threads))]
        for thread in self._threads:
            thread.start()

    def _put(self, item: Job | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    index = next(self._todo, None)
                if index is None:
                    break
                self._decode(index)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._put(error)
        self._put(None)

    def _decode(self, index: int) -> None:
        utterance, source, grid = self.utterances[index], self.sources[index], self.grid
        frames = 0
        try:
            with AudioFile(utterance.open(), utterance.path) as file:
                blocks = resampled(file.blocks(), file.sample_rate, grid.sample_rate)
                for window, wave in cut(blocks, grid, self.rule, self.context):
                    frames += window.count
                    self._put((index, window, wave))
                    if self._stop.is_set():
                        return
                source.sample_rate, source.num_samples = file.sample_rate, file.num_samples
            if frames == 0:
                raise AudioError(
                    f"{utterance.path}: too short: {file.num_samples} samples at {file.sample_rate} Hz; "
                    f"the first unit needs {grid.receptive_field / grid.sample_rate * 1000:g} ms"
                )
        except (SpeechtokError, OSError, MemoryError) as error:
            source.error = str(error) or type(error).__name__

    def __iter__(self) -> Iterator[Job]:
        try:
            running = len(self._threads)
            while running:
                item = self._ready.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop the threads, wherever they are."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def run_shard(
    tokenizer: Tokenizer,
    decoder: Decoder,
    *,
    batch_seconds: float,
    on_progress: Callable[[float], None],
    no_units: str = "",
) -> ShardResult:
    """Tokenize the utterances of a decoder.

    Parameters
    ----------
    tokenizer : Tokenizer
    decoder : Decoder
        With the tokenizer's grid, window rule and context.
    batch_seconds : float
        Padded audio per batch; changes speed and memory, never the units.
    on_progress : callable
        Gets the seconds of audio encoded since the last call.
    no_units : str
        Why an utterance without any segment is an error; it is a row without units where this is empty.
    """
    parts: list[list[EncodedWindow]] = [[] for _ in decoder.utterances]
    seconds = 0.0
    for index, encoded in tokenizer.encode_windows(decoder, batch_seconds):
        parts[index].append(encoded)
        length = encoded.count * tokenizer.encoder.grid.hop_seconds
        seconds += length
        on_progress(length)
    rows, errors = [], []
    for utterance, source, part in zip(decoder.utterances, decoder.sources, parts, strict=True):
        reason, units = source.error, None
        if reason is None:
            try:
                units = tokenizer.assemble(part)
            except InputError as error:
                reason = str(error)
            else:
                reason = None if len(units) else no_units or None
        if reason is not None:
            errors.append({"key": utterance.key, "path": utterance.path, "reason": reason})
        elif units is not None:
            names = utterance.key, utterance.path, source.sample_rate, source.num_samples
            rows.append(Row.from_units(*names, units, tokenizer.segment_hop))
    return ShardResult(rows, errors, seconds)
