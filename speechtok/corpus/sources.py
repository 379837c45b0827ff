"""Find what is to be tokenized: a folder, glob, manifest or archive becomes one `Listing`."""

import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from speechtok.audio.extensions import AUDIO_EXTENSIONS
from speechtok.errors import AudioError, InputError

__all__ = ["Listing", "Rejected", "Rows", "Utterance", "assign_keys", "scan"]

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class Utterance:
    """One sound to be tokenized: a file, or a member of a container.

    Parameters
    ----------
    key : str
        Path relative to the input root, '/'-separated, no extension (with it where two would collide).
        No component is empty, '.' or '..'.
    path : str
        The file as the input names it; ``archive.tar/member`` for members.
    file : str
        Absolute path of the audio file or of the container.
    size : int
        Bytes of the audio; 0 if unknown.
    container : {"", "tar", "parquet"}
    offset : int
        tar: byte offset of the member's data; parquet: row group.
    row : int
        parquet: row in the row group.
    column : str
        parquet: column with the bytes, ``audio.bytes`` for a struct.
    """

    key: str
    path: str
    file: str
    size: int
    container: str = ""
    offset: int = 0
    row: int = 0
    column: str = ""

    def open(self) -> str | BinaryIO:
        """Path of a plain file, or the bytes of a member.

        Raises
        ------
        AudioError
            If the file or member is gone, cut short or not a regular file.
        """
        if not self.container:
            _, reason = file_state(self.file)
            if reason:
                raise AudioError(f"{self.path}: {reason}")
            return self.file
        if self.container == "parquet":
            from speechtok.corpus.archives import read_cell

            return io.BytesIO(read_cell(self.file, self.offset, self.row, self.column, self.path))
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise AudioError(f"{self.path}: the archive cannot be read ({error.strerror})") from error
        if len(data) != self.size:
            raise AudioError(f"{self.path}: the archive ends inside this member; it was cut or changed after the scan")
        return io.BytesIO(data)


@dataclass(frozen=True)
class Rejected:
    """Something the input names that cannot be tokenized, and why."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What `scan` found.

    Parameters
    ----------
    root : str
        Absolute folder that relative paths start from.
    utterances, rejected : list
        Folders and globs sorted by relative path (code points); manifests and archives in their own order.
    ignored : int
        Files and members without an audio extension.
    """

    root: str
    utterances: list[Utterance]
    rejected: list[Rejected]
    ignored: int


def split_extension(name: str) -> tuple[str, str]:
    """Split off an audio extension: ``("a/b", ".WAV")``, or ``(name, "")`` if there is none."""
    dot = name.rfind(".")
    # names made of dots before the extension ("..wav") would give the components '.' and '..'
    if dot > 0 and name[dot:].lower() in AUDIO_EXTENSIONS and name[name.rfind("/") + 1 : dot].strip("."):
        return name[:dot], name[dot:]
    return name, ""


def text_problem(text: str) -> str:
    """Why a name cannot be stored anywhere, or ''."""
    if not text:
        return "empty name"
    if "\0" in text:
        return "name with a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "name is not valid UTF-8; rename the file"
    return ""


def key_problem(key: str) -> str:
    """Why a text cannot be a key, or ''."""
    problem = text_problem(key)
    if not problem and not {"", ".", ".."}.isdisjoint(key.split("/")):
        problem = "key with an empty, '.' or '..' component"
    return problem


def escape(name: str) -> str:
    """Printable UTF-8 form of any file name."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # lone surrogates from JSON escapes
        raw = name.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace").replace("\0", "\\0")


def normalise(path: str) -> str | None:
    """Relative path without empty, '.' and '..' components; None if it leaves its root or is the root."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or None


def file_state(path: str) -> tuple[int, str]:
    """Size of a regular file and '', or 0 and the reason why it cannot be used; never opens it."""
    try:
        state = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0, "no such file (a broken link)" if Path(path).is_symlink() else "no such file"
    except (OSError, ValueError) as error:
        return 0, f"cannot be looked up ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(state.st_mode):
        return state.st_size, ""
    return 0, kind_problem(state.st_mode)


def kind_problem(mode: int) -> str:
    """Why something of this mode cannot be read as a file, or ''."""
    return "" if stat.S_ISREG(mode) else f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False for names that no file system can hold."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def assign_keys(choices: Sequence[tuple[str, ...]]) -> tuple[list[str], dict[int, int]]:
    """Give every row the first of its possible keys that no other row wants.

    Parameters
    ----------
    choices : sequence of tuple of str
        Possible keys of each row, the shortest first. Rows that collide all move on to their next one.

    Returns
    -------
    keys : list of str
    repeats : dict
        Row -> earlier row that has the same key, for rows that ran out of choices.
    """
    level = [0] * len(choices)
    owners: dict[str, list[int]] = {}
    pending = [index for index, names in enumerate(choices) if names]
    while pending:
        touched: dict[str, None] = {}
        for index in pending:
            key = choices[index][level[index]]
            owners.setdefault(key, []).append(index)
            touched[key] = None
        pending = []
        for key in touched:
            if len(owners[key]) > 1:
                movers = [index for index in owners[key] if level[index] + 1 < len(choices[index])]
                owners[key] = [index for index in owners[key] if level[index] + 1 == len(choices[index])]
                for index in movers:
                    level[index] += 1
                pending.extend(movers)
    keys = [names[level[index]] if names else "" for index, names in enumerate(choices)]
    repeats = {index: min(group) for group in owners.values() for index in group if index != min(group)}
    return keys, repeats


class Rows:
    """Collects the rows of one input in order and makes their keys unique."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, tuple[str, ...], str, Utterance]] = []
        self.malformed = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, where: str, names: tuple[str, ...], utterance: Utterance, reason: str = "") -> None:
        """Add a row with its possible keys; with a reason it is rejected, but holds its key all the same."""
        self._rows.append((where, names, reason, utterance))

    def reject(self, where: str, path: str, reason: str, malformed: bool = False) -> None:
        """Add a row that has no usable name."""
        self.malformed += malformed
        shown = escape(path)[:500]
        self._rows.append((where, (), reason, Utterance(shown or where, shown, "", 0)))

    def first_reason(self) -> str:
        """Why the first rejected row was rejected, or ''."""
        return next((f"{where or item.path}: {reason}" for where, _, reason, item in self._rows if reason), "")

    def listing(self, root: str, ignored: int = 0) -> Listing:
        """Assign keys and sort rows into utterances and rejected."""
        keys, repeats = assign_keys([names for _, names, _, _ in self._rows])
        listing = Listing(root, [], [], ignored)
        for index, (where, names, reason, utterance) in enumerate(self._rows):
            key = keys[index] if names else utterance.key
            if not reason and index in repeats:
                first = self._rows[repeats[index]]
                reason = f"repeats the key {key!r} of {first[0] or first[3].path}"
            if reason:
                listing.rejected.append(Rejected(key, utterance.path, f"{where}: {reason}" if where else reason))
            else:
                u = utterance  # dataclasses.replace would take as long as the whole walk
                listing.utterances.append(
                    Utterance(key, u.path, u.file, u.size, u.container, u.offset, u.row, u.column)
                )
        return listing


def no_audio(named: str, note: str = "") -> InputError:
    """Error for an input without audio."""
    known = " ".join(sorted(AUDIO_EXTENSIONS))
    return InputError(
        f"{named} holds no audio{note}; name a folder or pattern with files that end in {known}, "
        "or a .tsv, .scp, .jsonl, .parquet or .tar that names or holds them"
    )


def _fixed_parts(parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        if re.search(r"[*?[]", part):
            return
        yield part


def scan(source: str | os.PathLike[str]) -> Listing:
    """List what is to be tokenized.

    Parameters
    ----------
    source : str or path-like
        A folder (recursive, follows links, never loops), an audio file, a glob pattern, a fairseq ``.tsv``,
        Kaldi ``.scp``, ``.jsonl``, lhotse ``recordings.jsonl(.gz)``, ``.parquet`` with audio or paths, an
        uncompressed ``.tar``, or a folder of ``.parquet`` or ``.tar`` shards.

    Raises
    ------
    InputError
        If the input does not exist, has no usable structure or holds no audio.
    """
    # the readers need the types of this module, and Parquet is slow to import
    from speechtok.corpus.folders import Pattern, scan_tree

    named = os.fspath(source)
    problem = text_problem(named)
    if problem:
        raise InputError(f"the input {escape(named)!r} cannot be used: {problem}")
    path = Path(os.path.abspath(named))  # noqa: PTH100 - resolves "..", but keeps links
    try:
        mode = path.stat().st_mode
    except OSError as error:
        fixed = list(_fixed_parts(path.parts))
        if len(fixed) == len(path.parts):
            raise InputError(f"the input {named} cannot be found ({error.strerror}); check the path") from error
        folder = Path(*fixed)
        if not is_folder(folder):
            raise InputError(f"the pattern {named} starts in {folder}, which is no folder; check it") from error
        return scan_tree(folder, Pattern(list(path.parts[len(fixed) :])), named)
    if stat.S_ISDIR(mode):
        return scan_tree(path, None, named)
    if not stat.S_ISREG(mode):
        raise InputError(f"the input {named} is {kind_problem(mode)}; name a file or folder")
    return _scan_file(path, named)


def _scan_file(path: Path, named: str) -> Listing:
    from speechtok.corpus.manifests import scan_jsonl, scan_scp, scan_tsv

    name = path.name.lower()
    stem, extension = split_extension(path.name)
    if extension:
        rows = Rows()
        size, reason = file_state(str(path))
        rows.add("", (stem,), Utterance("", path.name, str(path), size), reason)
        return rows.listing(str(path.parent))
    if name.endswith((".tar", ".parquet", *COMPRESSED_TARS)):
        from speechtok.corpus.archives import scan_archive

        return scan_archive(path)
    if name.endswith(".tsv"):
        return scan_tsv(path)
    if name.endswith(".scp"):
        return scan_scp(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return scan_jsonl(path)
    raise no_audio(named)
