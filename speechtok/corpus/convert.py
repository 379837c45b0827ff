"""From one output format to another."""

import json
import os
from pathlib import Path

from speechtok.bundle import read_description
from speechtok.corpus import formats
from speechtok.errors import InputError, OutputError

__all__ = ["convert"]


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str], output_format: str) -> list[Path]:
    """Rewrite an output folder of ``tokenize`` (Parquet or JSONL) in another format.

    Parameters
    ----------
    source : path
        The folder; its ``tokenizer.json`` goes along.
    out : path
        A new or empty folder.
    output_format : str
        A key of `speechtok.corpus.formats.FORMATS`.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError, FormatError
        If the source is unusable or holds rows that the format cannot.
    OutputError
        If the output folder is not empty or cannot be written.
    """
    source, out = Path(source), Path(out)
    if output_format not in formats.FORMATS:
        raise InputError(f"unknown format {output_format!r}; known are: {', '.join(formats.FORMATS)}")
    if not source.is_dir():
        raise InputError(f"{source} is no output folder of speechtok tokenize")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty; choose a new folder")
    description = read_description(source)
    for row in formats.read(source):
        reason = formats.check_units(output_format, row)
        if reason is not None:
            raise InputError(f"{row.key!r} cannot be stored as {output_format}: {reason}; choose another format")
    # What is written here is no job's output: nothing can be resumed, and errors.jsonl stays where it is.
    description.pop("job", None)
    target = out / "tokenizer.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = formats.write(output_format, formats.read(source), out, description, description.get("root", ""))
        target.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"{error.filename or out} cannot be written ({error.strerror})") from error
    return [*paths, target]
