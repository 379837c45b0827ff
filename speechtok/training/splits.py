"""Files of a split across data folders: what models of all sound are trained on and measured with.

Folders of music and noise name the split of each file in their ``metadata.jsonl`` (``split``: train, valid or test);
speech has a folder for each split.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from speechtok.audio.clips import clips_of_split
from speechtok.corpus.sources import scan
from speechtok.errors import InputError

__all__ = ["MUSIC", "NOISE", "SPEECH", "fingerprint", "labelled", "listed", "spoken", "write_manifest"]

MUSIC, NOISE = ("music/tracks", "music/notes"), "noise"
SPEECH = {"train": "speech/train", "valid": "speech/dev", "test": "speech/eval"}


def listed(data: Path, folder: str, split: str) -> list[PurePosixPath]:
    """Paths below `data` of the files of a split of a folder; InputError if there are none."""
    clips = clips_of_split(data / folder, split)
    if clips is None:
        raise InputError(f"{data / folder / 'metadata.jsonl'} names no file of split {split!r}")
    return [PurePosixPath(folder, path) for path in clips.paths]


def spoken(data: Path, split: str, every: int = 1) -> list[PurePosixPath]:
    """Paths below `data` of every n-th file of the speech of a split."""
    folder = SPEECH[split]
    listing = scan(data / folder)
    files = listing.utterances[::every]
    return [PurePosixPath(folder, PurePosixPath(file.file).relative_to(listing.root)) for file in files]


def labelled(data: Path, folder: str, splits: Sequence[str], manifest: Path) -> Path:
    """Write the lines of some splits of a folder's ``metadata.jsonl`` as a manifest of their own; it is returned."""
    wanted = {path for split in splits for path in listed(data, folder, split)}
    lines = [json.loads(line) for line in (data / folder / "metadata.jsonl").read_text().splitlines() if line.strip()]
    kept = [line for line in lines if PurePosixPath(folder, line["path"]) in wanted]
    return _write(manifest, [line | {"path": str((data / folder / line["path"]).resolve())} for line in kept])


def write_manifest(data: Path, paths: Sequence[PurePosixPath], manifest: Path) -> Path:
    """Write a manifest of files below `data`, keyed by their paths without extension; it is returned."""
    return _write(
        manifest, [{"key": str(path.with_suffix("")), "path": str((data / path).resolve())} for path in paths]
    )


def _write(manifest: Path, lines: Sequence[dict[str, Any]]) -> Path:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def fingerprint(data: Path, paths: Sequence[PurePosixPath]) -> str:
    """Of the names and sizes of files below `data`; InputError if one is missing."""
    try:
        listing = [[str(path), (data / path).stat().st_size] for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); it is a part of the data") from error
    return f"{len(listing)} files, {hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]}"
