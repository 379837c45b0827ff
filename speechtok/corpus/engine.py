"""`tokenize`: a whole input to an output folder, with processes, ranks and resume."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechtok.corpus import formats
from speechtok.corpus import workers as processes
from speechtok.corpus.ledger import Ledger
from speechtok.corpus.plan import Plan, cut_shards, plan_hash, probe, storable
from speechtok.corpus.shard import Decoder, ShardResult, run_shard
from speechtok.corpus.sources import Listing, Utterance, scan
from speechtok.devices import usable_device
from speechtok.errors import InputError, OutputError, SpeechtokError
from speechtok.registry import DEFAULT
from speechtok.tokenizer import Tokenizer

__all__ = ["Event", "Summary", "rank_and_world", "tokenize"]


@dataclass(frozen=True)
class Event:
    """Progress of a job.

    Parameters
    ----------
    stage : str
        "scan", "plan", "run", "write"; of synthesis "decode"; of training "read", "train", "sample", "fit".
    done, total : float
        Files while planning or reading, seconds of audio while running or decoding, steps while training.
    note : str
        What else is worth showing beside the progress; may be empty.
    """

    stage: str
    done: float
    total: float
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """Result of a job.

    Parameters
    ----------
    files, failed : int
        Files with units and files without: of the whole job if it is complete, else of this rank's share.
    ignored : int
        Files without an audio extension.
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
    rank: int = 0
    world: int = 1


def rank_and_world(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """This process's share: the arguments, else Slurm's or torchrun's variables, else (0, 1).

    In this order: ``RANK`` and ``WORLD_SIZE``; ``SLURM_ARRAY_TASK_ID`` and ``_COUNT`` (with ``_MIN`` and ``_STEP``);
    ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS`` or ``SLURM_NTASKS``, unless this is a batch script itself (a Slurm job
    without a step), where all tasks are this one process.
    """
    if (rank is None) != (world is None):
        raise InputError("--rank and --world go together; give both or neither")
    if rank is None or world is None:
        env = os.environ
        try:
            in_step = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env or "SLURM_JOB_ID" not in env
            if "WORLD_SIZE" in env and "RANK" in env:
                rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
            elif "SLURM_ARRAY_TASK_COUNT" in env:
                first = int(env.get("SLURM_ARRAY_TASK_MIN", 0))
                step = int(env.get("SLURM_ARRAY_TASK_STEP", 1))
                rank, world = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step, int(env["SLURM_ARRAY_TASK_COUNT"])
            elif "SLURM_PROCID" in env and in_step:
                rank, world = int(env["SLURM_PROCID"]), int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
            else:
                rank, world = 0, 1
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the rank variables of Slurm or torchrun are malformed ({error}); give --rank and --world"
            ) from error
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}: ranks go from 0 to world - 1")
    return rank, world


def _work(ledger: Ledger, shard: int, utterances: list[Utterance], metadata: dict[str, str]) -> tuple[int, float]:
    tokenizer, options = processes.here.tokenizer, processes.here.options
    result = next(_run_shards(tokenizer, [utterances], on_progress=processes.here.progress.put, **options))
    ledger.commit(shard, result.rows, result.errors, result.seconds, metadata)
    return shard, result.seconds


def _run_shards(
    tokenizer: Tokenizer,
    shards: Sequence[list[Utterance]],
    *,
    batch_seconds: float,
    decode_threads: int,
    no_units: str,
    on_progress: Callable[[float], None],
) -> Iterator[ShardResult]:
    """Run shards one after the other; the next one is decoded while this one is encoded."""

    def decoder(index: int) -> Decoder | None:
        if index >= len(shards):
            return None
        return Decoder(shards[index], tokenizer.encoder.grid, tokenizer.window, decode_threads, tokenizer.context)

    following = decoder(0)
    try:
        for index in range(len(shards)):
            current, following = following, decoder(index + 1)
            if current is not None:
                yield run_shard(
                    tokenizer, current, batch_seconds=batch_seconds, on_progress=on_progress, no_units=no_units
                )
    finally:
        if following is not None:
            following.close()


# -- the job ----------------------------------------------------------------------------------------------------------


def tokenize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer = DEFAULT,
    codebooks: int | None = None,
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
    codebooks : int, optional
        Of a tokenizer with several, use the first so many; None: all.
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
    no_units = formats.FORMATS[output_format].no_units
    share = rank_and_world(rank, world)
    options = _Options(*share, workers, device, batch_seconds, decode_threads, no_units, codebooks)
    loaded = processes.loaded(tokenizer, codebooks)
    if loaded.codebooks > 1 and not formats.FORMATS[output_format].codebooks:
        raise InputError(
            f"{loaded.name} has {loaded.codebooks} codebooks; {output_format} holds one: use "
            f"{', '.join(formats.several_codebooks())}, or one codebook"
        )
    usable_device(device)
    on_event(Event("scan", 0, 0))
    listing = storable(_without(scan(source), Path(out)), output_format)
    ledger = Ledger(Path(out), plan_hash(listing, loaded.fingerprint, output_format, shard_seconds), output_format)
    try:
        if ledger.open(overwrite=overwrite):
            return _completed(ledger, listing, options)
        seconds = _durations(ledger, listing.utterances, on_event)
        plan = Plan(ledger.plan_hash, listing, seconds, cut_shards(seconds, shard_seconds))
        summary = _run(plan, ledger, loaded, tokenizer, options, on_event)
        if not summary.complete and ledger.complete():
            # Another process with the same job was quicker; it could not take away what was written meanwhile.
            ledger.tidy()
            return _completed(ledger, listing, options)
        return summary
    except (OSError, SpeechtokError) as error:
        if ledger.complete() and not overwrite:
            # Another process with the same job was quicker and took the work folder away.
            ledger.tidy()
            return _completed(ledger, listing, options)
        if isinstance(error, SpeechtokError):
            raise
        raise OutputError(
            f"{error.filename or out}: cannot be written ({error.strerror}); finished work is kept, run again to go on"
        ) from error


@dataclass(frozen=True)
class _Options:
    """How a job is run; but for `codebooks` and `no_units` (of the format), nothing here changes its output."""

    rank: int
    world: int
    workers: int
    device: str
    batch_seconds: float
    decode_threads: int | None
    no_units: str
    codebooks: int | None

    def shard_options(self) -> dict[str, Any]:
        threads = self.decode_threads or min(4, os.cpu_count() or 1)
        return {"batch_seconds": self.batch_seconds, "decode_threads": threads, "no_units": self.no_units}


def _without(listing: Listing, out: Path) -> Listing:
    """Leave out what lies in the output folder: an output inside the input is not input."""
    folder, root = out.resolve(), Path(listing.root)

    def outside(path: str) -> bool:
        return not (root / path).resolve().is_relative_to(folder)

    return Listing(
        listing.root,
        [item for item in listing.utterances if outside(item.file)],
        [bad for bad in listing.rejected if outside(bad.path.replace("\0", ""))],
        listing.ignored,
    )


def _durations(ledger: Ledger, utterances: list[Utterance], on_event: Callable[[Event], None]) -> list[float]:
    """Header durations, remembered in the work folder: opening a million files once is enough."""
    path = ledger.work / "seconds.npy"
    if path.exists():
        try:
            known = np.load(path, allow_pickle=False)
            if len(known) == len(utterances):
                return [float(value) for value in known]
        except (ValueError, EOFError):
            pass  # damaged: probe again
    seconds = probe(utterances, lambda done: on_event(Event("plan", done, len(utterances))))
    partial = ledger.work / f".{uuid.uuid4().hex}.npy"
    np.save(partial, np.array(seconds))
    partial.replace(path)
    return seconds


def _run(
    plan: Plan,
    ledger: Ledger,
    loaded: Tokenizer,
    tokenizer: Any,
    options: _Options,
    on_event: Callable[[Event], None],
) -> Summary:
    utterances = plan.listing.utterances
    mine = range(options.rank, len(plan.shards), options.world)
    todo = [shard for shard in mine if ledger.marker(shard) is None]
    total = sum(sum(plan.seconds[slice(*plan.shards[shard])]) for shard in todo)
    metadata = {
        "speechtok.tokenizer": loaded.name,
        "speechtok.fingerprint": loaded.fingerprint,
        "speechtok.root": plan.listing.root,
    }
    done = 0.0
    encoded = 0.0
    begin = time.perf_counter()

    def on_progress(value: float) -> None:
        nonlocal done
        done += value
        on_event(Event("run", done, max(total, done)))

    on_event(Event("run", 0, total))
    shards = [utterances[slice(*plan.shards[shard])] for shard in todo]
    count = min(options.workers, len(todo))
    if count < 2:
        loaded.to(options.device)
        results = _run_shards(loaded, shards, on_progress=on_progress, **options.shard_options())
        for shard, result in zip(todo, results, strict=True):
            ledger.commit(shard, result.rows, result.errors, result.seconds, metadata)
            encoded += result.seconds
    else:
        source = processes.Source(tokenizer, options.codebooks, options.device)
        with processes.pool(source, count, options.shard_options(), on_progress) as pool:
            work = zip(todo, shards, strict=True)
            futures = {pool.submit(_work, ledger, shard, items, metadata) for shard, items in work}
            encoded = sum(seconds for _, seconds in processes.results(futures))
    wall = time.perf_counter() - begin
    on_event(Event("write", 0, len(plan.shards)))
    share = [marker for shard in mine if (marker := ledger.marker(shard))]
    rejected = [asdict(bad) for bad in plan.listing.rejected]
    complete = ledger.finish(len(plan.shards), rejected, loaded.describe(), plan.listing.root)
    summary = Summary(
        files=sum(marker["rows"] for marker in share),
        failed=sum(len(marker["errors"]) for marker in share) + len(rejected),
        ignored=plan.listing.ignored,
        audio_seconds=encoded,
        wall_seconds=wall,
        shards=len(plan.shards),
        resumed=len(mine) - len(todo),
        complete=complete,
        rank=options.rank,
        world=options.world,
    )
    job = ledger.job()
    return replace(summary, files=job["files"], failed=job["failed"]) if complete and job else summary


def _completed(ledger: Ledger, listing: Listing, options: _Options) -> Summary:
    """Summary of a job that was complete before."""
    job = ledger.job() or {}
    return Summary(job["files"], job["failed"], listing.ignored, 0.0, 0.0, 0, 0, True, options.rank, options.world)
