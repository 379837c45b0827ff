"""The plan of a job: which files, in which order, in which shards. Never depends on workers or memory."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from speechtok.audio.decode import AudioFile
from speechtok.corpus.formats import check_name
from speechtok.corpus.sources import Listing, Rejected, Utterance
from speechtok.errors import SpeechtokError

__all__ = ["Plan", "cut_shards", "plan_hash", "probe", "storable"]

# Shards are the unit of resuming and of output parts: at most about this much audio, at least 1/32 of the job.
_SHARD_SECONDS, _SHORTEST_SHARD, _SHARDS_PER_JOB = 3600.0, 120.0, 32


@dataclass(frozen=True)
class Plan:
    """What a job does.

    Parameters
    ----------
    hash : str
        Of everything that decides the output; equal hashes may continue each other's work.
    listing : Listing
        What the input holds, in input order.
    seconds : list of float
        Length of each utterance as its header tells (0 where it cannot be read).
    shards : list of (int, int)
        Ranges of utterances; shard i becomes part i of the output.
    """

    hash: str
    listing: Listing
    seconds: list[float]
    shards: list[tuple[int, int]]


def storable(listing: Listing, output_format: str) -> Listing:
    """Move utterances whose names the output format cannot hold to the rejected ones."""
    kept, rejected = [], list(listing.rejected)
    for utterance in listing.utterances:
        reason = check_name(output_format, utterance.key, utterance.path)
        if reason is None:
            kept.append(utterance)
        else:
            rejected.append(Rejected(utterance.key, utterance.path, reason))
    return Listing(listing.root, kept, rejected, listing.ignored)


def plan_hash(listing: Listing, fingerprint: str, output_format: str, shard_seconds: float | None) -> str:
    """Hash of all that decides the output: names, sizes and order of the input, tokenizer, format, shards."""
    digest = hashlib.sha256(json.dumps([fingerprint, output_format, shard_seconds]).encode())
    for item in listing.utterances:
        digest.update(json.dumps([item.key, item.path, item.size]).encode())
    for bad in listing.rejected:
        digest.update(json.dumps([bad.key, bad.path, bad.reason]).encode())
    return digest.hexdigest()[:32]


def _seconds(utterance: Utterance) -> float:
    try:
        with AudioFile(utterance.open(), utterance.path) as file:
            return file.declared_samples / file.sample_rate
    except SpeechtokError:
        return 0.0  # the run will open it again and record why


def probe(utterances: Sequence[Utterance], on_progress: Callable[[int], None]) -> list[float]:
    """Seconds of each utterance, from the headers, with threads; `on_progress` gets the number done so far."""
    seconds = []
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        for done, value in enumerate(pool.map(_seconds, utterances, chunksize=64), 1):
            seconds.append(value)
            on_progress(done)
    return seconds


def cut_shards(seconds: Sequence[float], shard_seconds: float | None = None) -> list[tuple[int, int]]:
    """Consecutive ranges of about equal audio; at least one, possibly empty."""
    target = shard_seconds or min(_SHARD_SECONDS, max(_SHORTEST_SHARD, sum(seconds) / _SHARDS_PER_JOB))
    shards, begin, filled = [], 0, 0.0
    for index, value in enumerate(seconds):
        filled += value
        # Files that cannot be read count for nothing, but a shard of 10,000 of them is long enough too.
        if filled >= target or index + 1 - begin >= 10_000:
            shards.append((begin, index + 1))
            begin, filled = index + 1, 0.0
    if begin < len(seconds) or not shards:
        shards.append((begin, len(seconds)))
    return shards
