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
from speechtok.errors import AudioError, SpeechtokError
from speechtok.frames import FrameGrid, Window, WindowRule
from speechtok.tokenizer import Tokenizer
from speechtok.windows import cut

__all__ = ["ShardResult", "Source", "decode_windows", "run_shard"]

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


def _decode(
    utterance: Utterance, source: Source, grid: FrameGrid, rule: WindowRule
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    with AudioFile(utterance.open(), utterance.path) as file:
        frames = 0
        for window, wave in cut(resampled(file.blocks(), file.sample_rate, grid.sample_rate), grid, rule):
            frames += window.count
            yield window, wave
        source.sample_rate, source.num_samples = file.sample_rate, file.num_samples
        if frames == 0:
            raise AudioError(
                f"{utterance.path}: too short: {file.num_samples} samples at {file.sample_rate} Hz; "
                f"the first unit needs {grid.receptive_field / grid.sample_rate * 1000:g} ms"
            )


def decode_windows(
    utterances: Sequence[Utterance], sources: list[Source], grid: FrameGrid, rule: WindowRule, threads: int
) -> Iterator[Job]:
    """Windows of all utterances as (index, window, samples), decoded by threads; one thread keeps the files' order.

    Parameters
    ----------
    sources : list
        Filled with one `Source` per utterance; complete when the iterator ends.
    threads : int
    """
    sources.extend(Source() for _ in utterances)
    ready: queue.Queue[Job | BaseException | None] = queue.Queue(_QUEUE)
    stop, todo, lock = threading.Event(), iter(range(len(utterances))), threading.Lock()

    def put(item: Job | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    index = next(todo, None)
                if index is None:
                    break
                try:
                    for window, wave in _decode(utterances[index], sources[index], grid, rule):
                        put((index, window, wave))
                        if stop.is_set():
                            break
                except (SpeechtokError, MemoryError) as error:
                    sources[index].error = str(error) or type(error).__name__
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            put(error)
        put(None)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, threads))]
    for worker in workers:
        worker.start()
    try:
        running = len(workers)
        while running:
            item = ready.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def run_shard(
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    *,
    batch_seconds: float,
    decode_threads: int,
    on_progress: Callable[[float], None],
) -> ShardResult:
    """Tokenize utterances.

    Parameters
    ----------
    batch_seconds : float
        Padded audio per batch; changes speed and memory, never the units.
    decode_threads : int
    on_progress : callable
        Gets the seconds of audio encoded since the last call.
    """
    sources: list[Source] = []
    parts: list[list[tuple[int, NDArray[np.int32]]]] = [[] for _ in utterances]
    seconds = 0.0
    jobs = decode_windows(utterances, sources, tokenizer.encoder.grid, tokenizer.window, decode_threads)
    for index, window, encoded in tokenizer.encode_windows(jobs, batch_seconds):
        parts[index].append((window.first, encoded.ids))
        length = window.count * tokenizer.encoder.grid.hop_seconds
        seconds += length
        on_progress(length)
    rows, errors = [], []
    for utterance, source, part in zip(utterances, sources, parts, strict=True):
        if source.error is not None:
            errors.append({"key": utterance.key, "path": utterance.path, "reason": source.error})
        else:
            units = tokenizer.assemble(part)
            rows.append(Row.from_units(utterance.key, utterance.path, source.sample_rate, source.num_samples, units))
    return ShardResult(rows, errors, seconds)
