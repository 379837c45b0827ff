"""Fingerprints of data folders, for the graph of models: another file, label or noise gives another one."""

import hashlib
import json
from functools import cache
from pathlib import Path

from speechtok.corpus.sources import scan
from speechtok.errors import InputError
from speechtok.training.graph import file_hash

__all__ = ["aligned", "changes", "sounds", "text"]


@cache
def sounds(folder: Path) -> str:
    """Of the keys and sizes of the sound files in a folder; kept until ``sounds.cache_clear()``."""
    listing = [[utterance.key, utterance.size] for utterance in scan(folder).utterances]
    return f"{len(listing)} files, {hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]}"


def text(folder: Path, *names: str) -> str:
    """Of the content of text files in a folder; InputError if one cannot be read."""
    try:
        return ", ".join(file_hash(folder / name)[:16] for name in names)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); it is a part of the data") from error


def aligned(folder: Path) -> dict[str, str]:
    """Of an aligned folder (see `speechtok.evaluation.alignments`)."""
    labels = text(folder, "metadata.jsonl", "alignments.jsonl")
    return {f"sounds of {folder.name}": sounds(folder), f"labels of {folder.name}": labels}


def changes(data: Path) -> dict[str, str]:
    """Of what augmentations draw from (see `speechtok.audio.augment`)."""
    return {name: f"{sounds(data / name)}, {text(data / name, 'metadata.jsonl')}" for name in ("noise", "rir")}
