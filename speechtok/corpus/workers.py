"""Processes that work on one job: each with a tokenizer of its own, on a device of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from speechtok.errors import SpeechtokError
from speechtok.hub import load
from speechtok.tokenizer import Tokenizer

__all__ = ["Source", "Worker", "here", "loaded", "pool", "results"]


@dataclass(frozen=True)
class Source:
    """Where the tokenizer of a worker comes from.

    Parameters
    ----------
    tokenizer : name, path or Tokenizer
    codebooks : int or None
        Use the first so many; None: all.
    device : str
        Workers with device "cuda" are spread over all of them.
    """

    tokenizer: Any
    codebooks: int | None
    device: str


@dataclass
class Worker:
    """What a worker process has at hand.

    Parameters
    ----------
    tokenizer : Tokenizer
    options : dict
        Of the job.
    progress : queue
        Takes the seconds of audio done since the last time.
    """

    tokenizer: Any = None
    options: Any = None
    progress: Any = None


here = Worker()  # of this process


def loaded(tokenizer: Any, codebooks: int | None) -> Tokenizer:
    """A tokenizer by name, path or itself, with its first codebooks only if so asked; errors as `load`."""
    found = tokenizer if isinstance(tokenizer, Tokenizer) else load(tokenizer)
    return found if codebooks is None else found.with_codebooks(codebooks)


def _start(source: Source, devices: Any, threads: int, options: dict[str, Any], progress: Any) -> None:
    def die_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    # A parent that is killed cannot tell its workers; they must not go on alone.
    threading.Thread(target=die_with_parent, daemon=True).start()
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    here.tokenizer = loaded(source.tokenizer, source.codebooks).to(devices.get())
    here.options, here.progress = options, progress


@contextmanager
def pool(
    source: Source, workers: int, options: dict[str, Any], on_progress: Callable[[float], None]
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes whose tasks find their tokenizer and `options` in `here`.

    They are ended when the block is left; at once if it fails.
    """
    context = multiprocessing.get_context("spawn")
    progress, devices = context.SimpleQueue(), context.SimpleQueue()
    for index in range(workers):
        devices.put(f"cuda:{index % torch.cuda.device_count()}" if source.device == "cuda" else source.device)
    threads = max(1, (os.cpu_count() or 1) // workers)

    def listen() -> None:
        while (seconds := progress.get()) is not None:
            on_progress(seconds)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    executor = ProcessPoolExecutor(
        workers, context, initializer=_start, initargs=(source, devices, threads, options, progress)
    )
    try:
        yield executor
        executor.shutdown()
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        progress.put(None)
        listener.join(timeout=5)


def results(futures: Iterable[Future[Any]]) -> Iterator[Any]:
    """Results as they come.

    Raises
    ------
    SpeechtokError
        If a worker died.
    """
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, return_when="FIRST_COMPLETED")
        for future in finished:
            try:
                yield future.result()
            except BrokenProcessPool as error:
                raise SpeechtokError(
                    "a worker process died (out of memory, or killed); finished work is kept: run the same command "
                    "again to go on, with fewer workers or a smaller --batch-seconds"
                ) from error
