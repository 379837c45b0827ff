"""Manifests that name audio files: fairseq tsv, Kaldi scp, JSON lines and lhotse recordings."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechtok.corpus.sources import (
    Listing,
    Rows,
    Utterance,
    file_state,
    is_folder,
    key_problem,
    normalise,
    split_extension,
    text_problem,
)
from speechtok.errors import InputError

__all__ = ["add_named_file", "scan_jsonl", "scan_scp", "scan_tsv"]

PATH_FIELDS = ("path", "audio_filepath", "audio")
KEY_FIELDS = ("key", "id")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; only line feeds end a line, as names may hold other separators."""
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                # a byte-order mark is what editors on Windows put in front of UTF-8
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\n").removesuffix("\r")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); copy or write it again") from error


def add_named_file(rows: Rows, where: str, given: str, base: str, key: str = "", inside: bool = False) -> None:
    """Add the row of a manifest that names a plain file.

    Parameters
    ----------
    rows : Rows
    where : str
        Line or row, for messages.
    given : str
        Path as the manifest has it.
    base : str
        Absolute folder that relative paths start from.
    key : str
        Key that the manifest gives; used if it is fit to be one.
    inside : bool
        Whether absolute paths outside of the base are refused too.
    """
    problem = text_problem(given)
    if problem:
        rows.reject(where, given, problem)
        return
    base = base.rstrip("/")
    inner = normalise(given)
    if inner is None:
        rows.reject(where, given, "leaves the root" if ".." in given.split("/") else "names no file")
        return
    absolute = given.startswith("/")
    file = f"/{inner}" if absolute else f"{base}/{inner}"
    if file.startswith(f"{base}/"):
        inner = file[len(base) + 1 :]
    elif inside:
        rows.reject(where, given, "leaves the root")
        return
    size, reason = file_state(file)
    stem = split_extension(inner)[0]
    names = (key,) if key and not key_problem(key) else (stem, inner) if stem != inner else (inner,)
    rows.add(where, names, Utterance("", inner if inside else given, file, size), reason)


def _listing(rows: Rows, path: Path, root: str, shape: str) -> Listing:
    if not rows:
        raise InputError(f"{path} names no files; it must hold {shape}")
    if rows.malformed == len(rows):
        raise InputError(f"{path} has no usable row ({rows.first_reason()}); it must hold {shape}")
    return rows.listing(root)


def scan_tsv(path: Path) -> Listing:
    """Files of a fairseq manifest: the root folder, then ``relpath<TAB>n_samples`` on each line.

    A relative root starts at the manifest's folder.
    """
    shape = "the root folder on line 1, then relpath<TAB>n_samples on each line"
    rows = Rows()
    root = ""
    for number, text in _lines(path):
        where = f"line {number}"
        if not root:
            folder = path.parent / text.strip()
            if number != 1 or text_problem(text) or not is_folder(folder):
                raise InputError(f"{path} line 1 must name a folder, not {text[:200]!r}; the file must hold {shape}")
            root = str(folder)
            continue
        name, tab, samples = text.partition("\t")
        if not tab or not re.fullmatch(r"[0-9]+", samples.strip()):
            rows.reject(where, name, "is not relpath<TAB>n_samples", malformed=True)
        else:
            add_named_file(rows, where, name, root, inside=True)
    return _listing(rows, path, root, shape)


def scan_scp(path: Path) -> Listing:
    """Files of a Kaldi ``wav.scp``: ``id path`` on each line; the path may hold spaces.

    Relative paths start at the manifest's folder. Command pipes are refused, never run.
    """
    rows = Rows()
    for number, text in _lines(path):
        where = f"line {number}"
        parts = re.split(r"[ \t]+", text.strip(" \t"), maxsplit=1)
        if len(parts) < 2:
            rows.reject(where, text, "is not an id, a space and a path", malformed=True)
        elif parts[1].endswith("|"):
            rows.reject(where, parts[1], "is a command pipe, which is never run; name a file that holds its output")
        else:
            add_named_file(rows, where, parts[1], str(path.parent), parts[0])
    return _listing(rows, path, str(path.parent), "an id, a space and a path on each line")


def scan_jsonl(path: Path) -> Listing:
    """Files of JSON lines with ``path``, ``audio_filepath`` or ``audio``, and perhaps ``key`` or ``id``.

    Relative paths start at the manifest's folder. Objects with ``id`` and ``sources`` are lhotse recordings.
    """
    rows = Rows()
    recording: Any = None
    for number, text in _lines(path):
        where = f"line {number}"
        try:
            item = json.loads(text)
        except (ValueError, RecursionError):
            rows.reject(where, text, "is not JSON", malformed=True)
            continue
        if not isinstance(item, dict):
            rows.reject(where, text, "is not a JSON object", malformed=True)
        elif "id" in item and "sources" in item:
            recording = recording or _lhotse_recording(path)
            _add_recording(rows, where, item, str(path.parent), recording)
        else:
            _add_item(rows, where, item, str(path.parent))
    shape = f"an object with one of the fields {', '.join(PATH_FIELDS)} on each line"
    return _listing(rows, path, str(path.parent), shape)


def _add_item(rows: Rows, where: str, item: dict[str, Any], base: str) -> None:
    given = next((item[field] for field in PATH_FIELDS if isinstance(item.get(field), str)), None)
    if given is None:
        rows.reject(where, "", f"has none of the fields {', '.join(PATH_FIELDS)} with text", malformed=True)
        return
    key = next((item[field] for field in KEY_FIELDS if item.get(field) is not None), "")
    if isinstance(key, bool) or not isinstance(key, str | int):
        rows.reject(where, given, "its key or id must be text or a whole number", malformed=True)
        return
    add_named_file(rows, where, given, base, f"{key:d}" if isinstance(key, int) else key)


def _lhotse_recording(path: Path) -> Any:
    try:
        from lhotse import Recording
    except ImportError as error:
        raise InputError(
            f"{path} holds lhotse recordings, which need the lhotse extra: pip install 'speechtok[lhotse]'"
        ) from error
    return Recording


def _add_recording(rows: Rows, where: str, item: dict[str, Any], base: str, recording_type: Any) -> None:
    """Row of a lhotse recording, if it is one whole file as it lies on disk."""
    try:
        recording = recording_type.from_dict(item)
        sources = [(source.type, source.source) for source in recording.sources]
        name, transforms = str(recording.id), recording.transforms
    # lhotse checks little: a wrong field shows as whatever its constructors stumble over
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        rows.reject(where, str(item.get("id")), f"is not a lhotse recording ({error!r:.200})", malformed=True)
        return
    if len(sources) != 1 or sources[0][0] != "file" or not isinstance(sources[0][1], str):
        kinds = ", ".join(str(kind) for kind, _ in sources) or "none"
        rows.reject(where, name, f"has the sources {kinds}; only recordings of one file can be read")
    elif transforms:
        rows.reject(where, name, "carries transforms, which would not be applied; save the transformed audio first")
    else:
        add_named_file(rows, where, sources[0][1], base, name)
