"""What a run began with: its sound, its first weights, its teacher. It never goes on with anything else."""

import json
from collections.abc import Mapping
from pathlib import Path

from speechtok.errors import FormatError, OutputError

__all__ = ["BEGINNING", "same_beginning"]

BEGINNING = "beginning.json"


def same_beginning(folder: Path, facts: Mapping[str, str | None]) -> None:
    """Note what the run in `folder` begins with, or compare it with what was noted.

    Parameters
    ----------
    folder : Path
        Of the run.
    facts : mapping of str to str or None
        An identity of everything that it begins with, by name.

    Raises
    ------
    OutputError
        If the run began with something else; the message names it.
    FormatError
        If the note is damaged.
    """
    path, partial = folder / BEGINNING, folder / f".{BEGINNING}"
    if not path.exists():
        partial.write_text(json.dumps(facts) + "\n")
        partial.replace(path)
        return
    try:
        begun = json.loads(path.read_text())
        changed = ", ".join(name for name in facts if facts[name] != begun.get(name))
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path} is damaged ({error}); choose another folder for the run") from error
    if changed:
        raise OutputError(f"{folder} holds a run that began with another {changed}; choose another folder")
