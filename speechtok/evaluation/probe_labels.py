"""Labelled sounds for probes: a manifest, what is asked of each sound, and which source it comes from.

A manifest is a ``.jsonl`` file (or a folder with ``metadata.jsonl``) as `speechtok.corpus.sources.scan` takes it: one
object per sound with its ``path`` and any other fields. A `Task` makes of such an object a label, or none, and a
group: sounds of one group are never in training and test at once.

`TASKS` are made for music with these fields, as far as a task needs them:

- ``pitch_class``, ``octave``: of ``pitch_midi`` (60 is C4), without notes whose ``pitch_verified`` is false.
- ``instrument_family``: of ``instrument``, in the families of NSynth (Engel et al. 2017, arXiv 1704.01279) and
  percussion. Loops, effects and electronic sounds have none.
- ``excitation``: of ``instrument``, how it is played: keyboard, plucked, sustained or percussion. Fewer classes of more
  instruments than families are, where few instruments were sampled.
- ``drum_piece``: of ``instrument``, or of the file's name where the instrument names a whole set of pieces.
- ``genre``: of ``genre``, near names put together; grouped by ``artist``. ``artist``: every sound is its own group.

The first five are grouped by `source_instrument`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from speechtok.corpus.manifests import PATH_FIELDS
from speechtok.corpus.sources import Utterance, scan
from speechtok.errors import InputError

__all__ = [
    "TASKS",
    "Labelled",
    "Manifest",
    "Task",
    "apply",
    "by_column",
    "column",
    "read",
    "source_instrument",
    "with_field",
]

Row = Mapping[str, Any]

NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


@dataclass(frozen=True)
class Task:
    """What is asked of a sound.

    Parameters
    ----------
    name : str
    field : str
        The column that the label is made of.
    label : callable
        From an object and `field` to a label, None where it has none.
    group : callable or None
        From an object to the name of its group; None where every sound is a group of its own.
    grouped_by : str
        The group in words.
    """

    name: str
    field: str
    label: Callable[[Row, str], str | None]
    group: Callable[[Row], str] | None
    grouped_by: str


@dataclass(frozen=True)
class Manifest:
    """Sounds with their objects in order, and by path why others cannot be used."""

    name: str
    items: list[tuple[Utterance, Row]]
    failed: dict[str, str]

    @property
    def fields(self) -> list[str]:
        """Columns that any object has."""
        return list(dict.fromkeys(field for _, row in self.items for field in row))


@dataclass(frozen=True)
class Labelled:
    """What a task says of a manifest: by path the label and the group of those that have a label.

    `unlabelled` counts the others.
    """

    task: Task
    labels: dict[str, str]
    groups: dict[str, str]
    unlabelled: int


def read(data: str | os.PathLike[str]) -> Manifest:
    """Read a manifest.

    Parameters
    ----------
    data : path
        A ``.jsonl`` file, or a folder with ``metadata.jsonl``.

    Raises
    ------
    InputError
        If there is none, or none of its rows names a sound.
    """
    path = Path(data)
    file = path / "metadata.jsonl" if path.is_dir() else path
    if file.suffix != ".jsonl" or not file.is_file():
        raise InputError(f"{data}: a probe reads labels from a .jsonl manifest, or a folder with metadata.jsonl")
    listing = scan(file)
    rows: dict[str | None, Row] = {}
    for line in file.read_text(encoding="utf-8-sig").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # empty, or told by the listing
        if isinstance(row, dict):
            # Of two objects with one path the listing keeps the first.
            named = next((row[field] for field in PATH_FIELDS if isinstance(row.get(field), str)), None)
            rows.setdefault(named, row)
    items = [(sound, rows[sound.path]) for sound in listing.utterances if sound.path in rows]
    if not items:
        reason = next((f" ({one.path}: {one.reason})" for one in listing.rejected), "")
        raise InputError(f"{file} names no sound that can be used{reason}; check its paths")
    name = file.parent.resolve().name if path.is_dir() else file.name
    return Manifest(name, items, {one.path or one.key: one.reason for one in listing.rejected})


def apply(manifest: Manifest, task: Task) -> Labelled:
    """Labels and groups of a manifest.

    Raises
    ------
    InputError
        If no object has the field, a value of it is unusable, or a labelled sound has no group.
    """
    if task.field not in manifest.fields:
        raise InputError(
            f"{manifest.name} has no field {task.field!r}, which {task.name} is made of; name another with --label. "
            f"Its fields are {', '.join(manifest.fields)}"
        )
    labels, groups = {}, {}
    for sound, row in manifest.items:
        try:
            label = None if row.get(task.field) is None else task.label(row, task.field)
            if label is None:
                continue
            labels[sound.path] = label
            groups[sound.path] = sound.path if task.group is None else task.group(row)
        except InputError as error:
            raise InputError(f"{manifest.name}, {sound.path}: {error}") from error
    return Labelled(task, labels, groups, len(manifest.items) - len(labels))


def column(field: str) -> Task:
    """The task to tell the values of a column; every sound is a group of its own."""
    return Task(field, field, _text, None, "file")


def with_field(task: Task, field: str) -> Task:
    """The same task, made of another column."""
    return replace(task, field=field)


def by_column(task: Task, field: str) -> Task:
    """The same task, grouped by the values of a column."""

    def group(row: Row) -> str:
        if row.get(field) is None:
            raise InputError(f"has no {field!r} to be grouped by; give every labelled sound one")
        return _text(row, field)

    return replace(task, group=group, grouped_by=field)


def _text(row: Row, field: str) -> str:
    value = row[field]
    if isinstance(value, list | dict):
        raise InputError(f"its {field!r} is {value!r}; a label is text, a number or true or false")
    return str(value)


def _midi(row: Row, field: str) -> int | None:
    """Number of a note whose pitch is not in doubt."""
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 128:
        raise InputError(f"its {field!r} is {value!r}, no MIDI note number; 60 is C4")
    return None if row.get("pitch_verified") is False else value


def _pitch_class(row: Row, field: str) -> str | None:
    midi = _midi(row, field)
    return None if midi is None else NOTES[midi % 12]


def _octave(row: Row, field: str) -> str | None:
    midi = _midi(row, field)
    return None if midi is None else f"{midi // 12 - 1}"


# How one instrument was struck, or which of several drums of a set: what tells samples of one source apart.
_MANNER = re.compile(r"(?:\d*Edge|Choke|Bell|Shank|SemiOpen|Closed|Pedal|Swish|Hi|Mid|Lo|-closed|-open|-\d+)$")


def source_instrument(row: Row) -> str:
    """Name of the instrument that was sampled: the same for all ways to strike a drum, and for a whole drum machine.

    Parameters
    ----------
    row : mapping
        With ``instrument``; ``artist`` (who made the samples) and ``label`` where there are.

    Raises
    ------
    InputError
        If the instrument is missing.
    """
    instrument = row.get("instrument")
    if not isinstance(instrument, str):
        raise InputError("has no 'instrument' to be grouped by; name another field with --group")
    maker = str(row.get("artist") or "")
    if row.get("label") == "drum_machine":
        return maker or instrument
    return f"{maker}/{_MANNER.sub('', instrument).casefold()}".lstrip("/")


_KEYBOARDS = ("acoustic_grand_piano", "electric_grand_piano", "electric_piano_rhodes", "upright_piano")
_PERCUSSION = ("bd", "drum", "hat", "sn", "tabla")
_FAMILIES = {
    "bass": ("bass", "electric_bass_finger"),
    "guitar": ("acoustic_guitar_steel", "guit", "sitar"),
    "keyboard": _KEYBOARDS,
    "percussion": _PERCUSSION,
    "reed": ("shanai",),
    "string": ("pizzicato_strings", "tremolo_strings"),
}
_EXCITATIONS = {
    "keyboard": _KEYBOARDS,
    "percussion": _PERCUSSION,
    "plucked": ("acoustic_guitar_steel", "electric_bass_finger", "guit", "pizzicato_strings", "sitar"),
    "sustained": ("shanai", "tremolo_strings"),
}


def _kind(kinds: Mapping[str, tuple[str, ...]]) -> Callable[[Row, str], str | None]:
    """Which of some kinds an instrument is of."""

    def label(row: Row, field: str) -> str | None:
        if row.get("label") in ("drum", "drum_machine"):
            return "percussion"
        instrument = _text(row, field)
        return next((kind for kind, instruments in kinds.items() if instrument in instruments), None)

    return label


# The first that fits counts: the rim of a snare is no snare. A cymbal that opens, closes or has a pedal is a hi-hat.
_PIECES = {
    "rim": r"(?<![a-z])rim|stick",
    "hi-hat": r"hat|cymbal_(closed|open|pedal)",
    "cymbal": r"crash|ride|splash|cymbal|paiste",
    "kick": r"kick|^bd_|drum_bass",
    "snare": r"snare|^sn_",
    "tom": r"tom",
    "clap": r"clap",
    "cowbell": r"cowb",
    "hand drum": r"conga|bongo|timbal",
    "tambourine": r"tamb",
    "shaker": r"cabasa|maraca",
    "guiro": r"guiro",
    "block": r"block",
    "claves": r"clave",
    "tabla": r"^tabla",
}
# Instruments of one piece or of a kit; of the rest (loops, effects, pitched notes) no piece is asked.
_SETS = ("bd", "drum", "elec", "hat", "sn", "tabla")


def _drum_piece(row: Row, field: str) -> str | None:
    name = _text(row, field)
    if name in _SETS:
        name = PurePosixPath(str(row.get("path"))).stem
    elif row.get("label") not in ("drum", "drum_machine"):
        return None
    return next((piece for piece, pattern in _PIECES.items() if re.search(pattern, name.lower())), None)


_GENRES = {
    "classical": "classical",
    "game": "game soundtrack",
    "wind band": "wind band",
    "chiptune": "synth",
    "synth": "synth",
}


def _genre(row: Row, field: str) -> str:
    name = _text(row, field)
    return next((genre for part, genre in _GENRES.items() if part in name), name)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("pitch_class", "pitch_midi", _pitch_class, source_instrument, "source instrument"),
        Task("octave", "pitch_midi", _octave, source_instrument, "source instrument"),
        Task("instrument_family", "instrument", _kind(_FAMILIES), source_instrument, "source instrument"),
        Task("excitation", "instrument", _kind(_EXCITATIONS), source_instrument, "source instrument"),
        Task("drum_piece", "instrument", _drum_piece, source_instrument, "source instrument"),
        by_column(Task("genre", "genre", _genre, None, ""), "artist"),
        Task("artist", "artist", _text, None, "file"),
    )
}
