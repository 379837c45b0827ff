"""`tokenize`: a whole input to an output folder, with processes, ranks and resume."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechtok.corpus import formats
from speechtok.corpus.ledger import Ledger
from speechtok.corpus.plan import Plan, cut_shards, plan_hash, probe, storable
from speechtok.corpus.shard import Decoder, ShardResult, run_shard
from speechtok.corpus.sources import Utterance, scan
from speechtok.errors import InputError, OutputError, SpeechtokError
from speechtok.hub import load
from speechtok.registry import DEFAULT
from speechtok.tokenizer import Tokenizer

__all__ = ["Event", "Summary", "rank_and_world", "tokenize"]


@dataclass(frozen=True)
class Event:
    """Progress of a job.

    Parameters
    ----------
    stage : {"scan", "plan", "run", "write"}
    done, total : float
        Files while planning, seconds of audio while running.
    """

    stage: str
    done: float
    total: float


@dataclass(frozen=True)
class Summary:
    """Result of a job (of this rank's share of it).

    Parameters
    ----------
    files, failed, ignored : int
        Files with units, files in ``errors.jsonl``, files without an audio extension.
    audio_seconds, wall_seconds : float
        Of the shards that this process ran now (resumed shards are not counted).
    complete : bool
        Whether the final output is in place (False while other ranks still work).
    resumed : int
        Shards that were done before.
    """

    files: int
    failed: int
    ignored: int
    audio_seconds: float
    wall_seconds: float
    shards: int
    resumed: int
    complete: bool


def rank_and_world(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """This process's share: the arguments, else Slurm's or torchrun's variables, else (0, 1).

    ``SLURM_ARRAY_TASK_ID`` and ``_COUNT`` (with ``_MIN`` and ``_STEP``), else ``SLURM_PROCID`` and ``SLURM_NTASKS``,
    else ``RANK`` and ``WORLD_SIZE``.
    """
    if (rank is None) != (world is None):
        raise InputError("--rank and --world go together; give both or neither")
    if rank is None or world is None:
        env = os.environ
        try:
            if "SLURM_ARRAY_TASK_COUNT" in env:
                first = int(env.get("SLURM_ARRAY_TASK_MIN", 0))
                step = int(env.get("SLURM_ARRAY_TASK_STEP", 1))
                rank, world = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step, int(env["SLURM_ARRAY_TASK_COUNT"])
            elif "SLURM_NTASKS" in env and "SLURM_PROCID" in env:
                rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
            elif "WORLD_SIZE" in env and "RANK" in env:
                rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
            else:
                rank, world = 0, 1
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the rank variables of Slurm or torchrun are malformed ({error}); give --rank and --world"
            ) from error
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}: ranks go from 0 to world - 1")
    return rank, world


# -- worker processes -------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Any, devices: Any, threads: int, options: dict[str, Any], progress: Any) -> None:
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
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else load(tokenizer)
    loaded.to(devices.get())
    _worker.update(tokenizer=loaded, options=options, progress=progress)


def _work(ledger: Ledger, shard: int, utterances: list[Utterance], metadata: dict[str, str]) -> tuple[int, float]:
    tokenizer, options, progress = _worker["tokenizer"], _worker["options"], _worker["progress"]
    result = next(_run_shards(tokenizer, [utterances], on_progress=progress.put, **options))
    ledger.commit(shard, result.rows, result.errors, result.seconds, metadata)
    return shard, result.seconds


def _run_shards(
    tokenizer: Tokenizer,
    shards: Sequence[list[Utterance]],
    *,
    batch_seconds: float,
    decode_threads: int,
    on_progress: Callable[[float], None],
) -> Iterator[ShardResult]:
    """Run shards one after the other; the next one is decoded while this one is encoded."""

    def decoder(index: int) -> Decoder | None:
        if index >= len(shards):
            return None
        return Decoder(shards[index], tokenizer.encoder.grid, tokenizer.window, decode_threads)

    following = decoder(0)
    try:
        for index in range(len(shards)):
            current, following = following, decoder(index + 1)
            if current is not None:
                yield run_shard(tokenizer, current, batch_seconds=batch_seconds, on_progress=on_progress)
    finally:
        if following is not None:
            following.close()


@contextmanager
def _pool(
    tokenizer: Any, device: str, workers: int, options: dict[str, Any], on_progress: Callable[[float], None]
) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    progress, devices = context.SimpleQueue(), context.SimpleQueue()
    for index in range(workers):
        devices.put(f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device)
    threads = max(1, (os.cpu_count() or 1) // workers)

    def listen() -> None:
        while (seconds := progress.get()) is not None:
            on_progress(seconds)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tokenizer, devices, threads, options, progress)
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        progress.put(None)
        listener.join(timeout=5)


# -- the job ----------------------------------------------------------------------------------------------------------


def tokenize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer = DEFAULT,
    output_format: str = "parquet",
    workers: int = 1,
    device: str = "cpu",
    rank: int | None = None,
    world: int | None = None,
    batch_seconds: float = 60.0,
    decode_threads: int | None = None,
    shard_seconds: float | None = None,
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Summary:
    """Tokenize a folder, manifest or archive; call it again to go on after any interruption.

    Parameters
    ----------
    source : path or glob pattern
        See `speechtok.corpus.sources.scan`.
    out : path
        Output folder: ``part-*.parquet`` (or the files of another format), ``tokenizer.json`` and, if files failed,
        ``errors.jsonl``.
    tokenizer : name, path or Tokenizer
    output_format : str
        A key of `speechtok.corpus.formats.FORMATS`.
    workers : int
        Processes; on GPUs one per device (``device="cuda"`` spreads them over the devices).
    rank, world : int, optional
        Share of a job that several machines run into one folder; default from the environment (`rank_and_world`).
    batch_seconds, decode_threads : float, int
        Change speed and memory, never the output.
    shard_seconds : float, optional
        Audio per shard and part; part of the plan.
    overwrite : bool
        Replace the output of another job.

    Raises
    ------
    SpeechtokError
        If the job as a whole cannot be done. A file that cannot be done is a row in ``errors.jsonl``.
    """
    if output_format not in formats.FORMATS:
        raise InputError(f"unknown format {output_format!r}; known are: {', '.join(formats.FORMATS)}")
    if workers < 1 or not all(
        0 < value < float("inf") for value in (batch_seconds, 1.0 if shard_seconds is None else shard_seconds)
    ):
        raise InputError("workers, batch_seconds and shard_seconds must be positive and finite")
    rank, world = rank_and_world(rank, world)
    loaded = (
        tokenizer if isinstance(tokenizer, Tokenizer) else load(tokenizer, device=device if workers == 1 else "cpu")
    )
    on_event(Event("scan", 0, 0))
    listing = storable(scan(source), output_format)
    job = plan_hash(listing, loaded.fingerprint, output_format, shard_seconds)
    ledger = Ledger(Path(out), job, output_format)
    try:
        complete = ledger.open(overwrite=overwrite)
        if complete:
            return _completed(Path(out), listing.ignored)
        seconds = _durations(ledger, listing.utterances, on_event)
        plan = Plan(job, listing, seconds, cut_shards(seconds, shard_seconds))
        return _run(
            plan, ledger, loaded, tokenizer, device, workers, rank, world, batch_seconds, decode_threads, on_event
        )
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: cannot be written ({error.strerror}); finished work is kept, run again to go on"
        ) from error


def _durations(ledger: Ledger, utterances: list[Utterance], on_event: Callable[[Event], None]) -> list[float]:
    """Header durations, remembered in the work folder: opening a million files once is enough."""
    path = ledger.work / "seconds.npy"
    if path.exists():
        try:
            known = np.load(path, allow_pickle=False)
            if len(known) == len(utterances):
                return [float(value) for value in known]
        except ValueError:
            pass  # half written by a process that was killed: probe again
    seconds = probe(utterances, lambda done: on_event(Event("plan", done, len(utterances))))
    partial = ledger.work / f".seconds.{os.getpid()}.npy"
    np.save(partial, np.array(seconds))
    partial.replace(path)
    return seconds


def _run(
    plan: Plan, ledger: Ledger, loaded: Tokenizer, tokenizer: Any, device: str, workers: int, rank: int, world: int,
    batch_seconds: float, decode_threads: int | None, on_event: Callable[[Event], None],
) -> Summary:  # fmt: skip
    utterances = plan.listing.utterances
    mine = range(rank, len(plan.shards), world)
    todo = [shard for shard in mine if ledger.marker(shard) is None]
    total = sum(sum(plan.seconds[slice(*plan.shards[shard])]) for shard in todo)
    metadata = {
        "speechtok.tokenizer": loaded.name,
        "speechtok.fingerprint": loaded.fingerprint,
        "speechtok.root": plan.listing.root,
    }
    options: dict[str, Any] = {
        "batch_seconds": batch_seconds,
        "decode_threads": decode_threads or min(4, os.cpu_count() or 1),
    }
    done = 0.0
    encoded = 0.0
    begin = time.perf_counter()

    def on_progress(value: float) -> None:
        nonlocal done
        done += value
        on_event(Event("run", done, max(total, done)))

    on_event(Event("run", 0, total))
    if workers == 1 or len(todo) < 2:
        shards = [utterances[slice(*plan.shards[shard])] for shard in todo]
        for shard, result in zip(todo, _run_shards(loaded, shards, on_progress=on_progress, **options), strict=True):
            ledger.commit(shard, result.rows, result.errors, result.seconds, metadata)
            encoded += result.seconds
    else:
        with _pool(tokenizer, device, min(workers, len(todo)), options, on_progress) as pool:
            futures = {
                pool.submit(_work, ledger, shard, utterances[slice(*plan.shards[shard])], metadata) for shard in todo
            }
            encoded = sum(seconds for _, seconds in _results(futures))
    wall = time.perf_counter() - begin
    on_event(Event("write", 0, len(plan.shards)))
    markers = [marker for shard in range(len(plan.shards)) if (marker := ledger.marker(shard))]
    rejected = [asdict(bad) for bad in plan.listing.rejected]
    complete = ledger.finish(len(plan.shards), rejected, loaded.describe(), plan.listing.root)
    return Summary(
        files=sum(marker["rows"] for marker in markers),
        failed=sum(len(marker["errors"]) for marker in markers) + len(plan.listing.rejected),
        ignored=plan.listing.ignored,
        audio_seconds=encoded,
        wall_seconds=wall,
        shards=len(plan.shards),
        resumed=len(mine) - len(todo),
        complete=complete,
    )


def _results(futures: set[Future[tuple[int, float]]]) -> Iterator[tuple[int, float]]:
    waiting = futures
    while waiting:
        finished, waiting = wait(waiting, return_when="FIRST_COMPLETED")
        for future in finished:
            try:
                yield future.result()
            except BrokenProcessPool as error:
                raise SpeechtokError(
                    "a worker process died (out of memory, or killed); finished shards are kept: run the same command "
                    "again to go on, with fewer workers or a smaller --batch-seconds"
                ) from error


def _completed(out: Path, ignored: int) -> Summary:
    """Summary of a job that was complete before."""
    facts = json.loads((out / "tokenizer.json").read_text())
    return Summary(facts["files"], facts["failed"], ignored, 0.0, 0.0, 0, 0, True)
