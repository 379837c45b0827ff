"""Where augmentation takes its noises and room responses from."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.audio.extensions import AUDIO_EXTENSIONS
from speechtok.errors import InputError

__all__ = ["SPLITS", "ClipSource", "FileClips", "Report", "Wave", "clips_below", "clips_of_split"]

Wave = NDArray[np.float32]
Report = dict[str, float | str]

SPLITS = ("train", "valid", "test")
LISTING = "metadata.jsonl"
_KEPT_SAMPLES = 1 << 26  # 256 MB of decoded clips


class ClipSource(Protocol):
    """Where noises or room responses come from: files, or a simulator of rooms."""

    def draw(self, generator: np.random.Generator, sample_rate: int) -> tuple[Wave, Report]:
        """Give a sound, float32 [n] at `sample_rate` (Hz), and facts on it for a report.

        All chance must come from the generator, and as many values at every sample rate.
        """
        ...

    @property
    def identity(self) -> str:
        """Another one where other sounds can be drawn."""
        ...


@dataclass
class FileClips:
    """Sound files, decoded when they are first drawn and then kept, up to 256 MB of them.

    Parameters
    ----------
    folder : Path
    paths : sequence of str
        Files below the folder.
    groups : sequence of str, optional
        A group for each file. A group is drawn first and then one of its files, so that a room that was measured at
        many places counts as one room. Without it all files are equally likely.
    split : str
        Of a listing, for descriptions.
    """

    folder: Path
    paths: Sequence[str]
    groups: Sequence[str] | None = None
    split: str = ""
    _cache: dict[tuple[str, int], Wave] = field(default_factory=dict, init=False, repr=False)
    _kept: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.paths or (self.groups is not None and len(self.groups) != len(self.paths)):
            raise InputError(f"{self.folder}: at least one file, and a group for each or none, are needed")
        members: dict[str, list[str]] = {}
        for path, group in zip(self.paths, self.groups or self.paths, strict=True):
            members.setdefault(group, []).append(path)
        # Sorted: the order of a listing must not decide what is drawn.
        self._members = [sorted(members[group]) for group in sorted(members)]

    @property
    def identity(self) -> str:
        """Hash of names, groups and sizes of the files; InputError if one is missing."""
        try:
            sized = [[(path, (self.folder / path).stat().st_size) for path in group] for group in self._members]
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return hashlib.sha256(json.dumps(sized).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        """Describe them for tables, without the way to the folder."""
        split = f", split {self.split}" if self.split else ""
        return f"{len(self.paths)} files of {self.folder.resolve().name}{split}"

    def draw(self, generator: np.random.Generator, sample_rate: int) -> tuple[Wave, Report]:
        """Give a clip, float32 [n] at `sample_rate`, and its path; errors as `speechtok.audio.decode.load`."""
        group, member = generator.random(2).tolist()
        paths = self._members[int(group * len(self._members))]
        path = paths[int(member * len(paths))]
        # Two threads may decode the same file at once; both get the same samples.
        clip = self._cache.get((path, sample_rate))
        if clip is None:
            clip = load(self.folder / path, sample_rate)
            clip.setflags(write=False)  # it is handed out again
            if self._kept + len(clip) <= _KEPT_SAMPLES:
                self._cache[path, sample_rate] = clip
                self._kept += len(clip)
        return clip, {"clip": path}


def clips_of_split(folder: str | os.PathLike[str], split: str, group_by: str | None = None) -> FileClips | None:
    """Read a listing of sound files.

    Parameters
    ----------
    folder : path
        Holds ``metadata.jsonl``, one JSON object a line with the fields `path` (below the folder) and `split`.
    split : {"train", "valid", "test"}
        Which files to take.
    group_by : str, optional
        Field that makes the groups.

    Returns
    -------
    FileClips or None
        None where there is no file of that split.

    Raises
    ------
    InputError
        If there is no such listing, or it is damaged.
    """
    listing = Path(folder) / LISTING
    if split not in SPLITS:
        raise InputError(f"split={split!r}: one of {', '.join(SPLITS)} is needed")
    try:
        rows = [json.loads(line) for line in listing.read_text().splitlines() if line.strip()]
        rows = [row for row in rows if row["split"] == split]
        paths = [str(row["path"]) for row in rows]
        groups = None if group_by is None else [str(row[group_by]) for row in rows]
    except OSError as error:
        raise InputError(f"{listing}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{listing}: a line is no object with the fields it needs ({error!r})") from error
    for path in paths:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"{listing}: {path!r} leads out of the folder")
    return FileClips(Path(folder), paths, groups, split) if paths else None


def clips_below(folder: str | os.PathLike[str], split: str, group_by: str | None = None) -> FileClips:
    """Sound files of a folder, with or without a listing.

    Parameters
    ----------
    folder : path
        With a ``metadata.jsonl`` the files of a split, see `clips_of_split`; without one all sound files below it.
    split : {"train", "valid", "test"}
        Means nothing without a listing.
    group_by : str, optional
        Means nothing without a listing.

    Raises
    ------
    InputError
        If the folder is missing, holds no sound file or none of the split, or its listing is damaged. Files are opened
        when they are drawn; one that cannot be decoded is named then (AudioError).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; name one with sound files")
    if (folder / LISTING).exists():
        clips = clips_of_split(folder, split, group_by)
        if clips is None:
            raise InputError(f"{folder / LISTING} names no file of split {split!r}; choose another split or folder")
        return clips
    # Sorted by FileClips: the order of the file system must not decide what is drawn.
    found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_EXTENSIONS and path.is_file())
    paths = [path.relative_to(folder).as_posix() for path in found]
    if not paths:
        raise InputError(f"{folder} holds no sound file ({' '.join(sorted(AUDIO_EXTENSIONS))})")
    return FileClips(folder, paths)
