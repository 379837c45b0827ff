"""Walk folders for audio: once each, links included, in the same order on every file system."""

import heapq
import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from speechtok.corpus.sources import (
    COMPRESSED_TARS,
    Listing,
    Rejected,
    Rows,
    Utterance,
    escape,
    kind_problem,
    no_audio,
    split_extension,
    text_problem,
)
from speechtok.errors import InputError

__all__ = ["Pattern", "Tree", "scan_tree"]


class Pattern:
    """Glob below a fixed folder: '**' spans folders, '*', '?' and '[...]' stay inside one name."""

    def __init__(self, parts: list[str]) -> None:
        self.parts = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]

    @staticmethod
    def _one(name: str, pattern: str) -> bool:
        return (pattern.startswith(".") or not name.startswith(".")) and fnmatchcase(name, pattern)

    def _match(self, names: list[str], at: int) -> bool:
        if at == len(self.parts):
            return not names
        if self.parts[at] == "**":
            if self._match(names, at + 1):
                return True
            return bool(names) and not names[0].startswith(".") and self._match(names[1:], at)
        return bool(names) and self._one(names[0], self.parts[at]) and self._match(names[1:], at + 1)

    def matches(self, relative: str) -> bool:
        """Whether a file fits the pattern."""
        return self._match(relative.split("/"), 0)

    def enters(self, folder: str) -> bool:
        """Whether something below the folder can match."""
        names = folder.split("/")
        for name, part in zip(names, self.parts, strict=False):
            if part == "**":
                return True
            if not self._one(name, part):
                return False
        return len(names) < len(self.parts)


class Tree:
    """One walk over a folder.

    Real folders are walked first and links to folders after them, in sorted order, so that a folder
    that is reached twice is known by its real name, whatever order the file system lists names in.
    """

    def __init__(self, root: str, pattern: Pattern | None = None) -> None:
        self.root = root.rstrip("/")
        self.pattern = pattern
        self.found: list[tuple[str, int, str]] = []  # relative path, size, reason against it
        self.folders: list[Rejected] = []
        self.shards: dict[str, list[str]] = {".tar": [], ".parquet": [], "compressed": []}
        self.ignored = 0
        self._seen: dict[tuple[int, int], str] = {}
        self._links: list[str] = []

    def walk(self) -> None:
        """Fill the lists; raises InputError if the root cannot be read."""
        state = Path(self.root or "/").stat()
        self._seen[state.st_dev, state.st_ino] = "."
        stack = [""]
        while stack or self._links:
            linked = not stack
            folder = heapq.heappop(self._links) if linked else stack.pop()
            try:
                if linked and not self._first_visit(folder, Path(f"{self.root}/{folder}").stat()):
                    continue
                with os.scandir(f"{self.root}/{folder}") as entries:
                    for entry in entries:
                        self._visit(entry, f"{folder}/{entry.name}" if folder else entry.name, stack)
            except OSError as error:
                if not folder:
                    raise InputError(f"{self.root or '/'} cannot be read ({error.strerror})") from error
                self._reject_folder(folder, f"folder cannot be read ({error.strerror})")

    def _reject_folder(self, folder: str, reason: str) -> None:
        name = escape(folder)
        self.folders.append(Rejected(name, name, reason))

    def _first_visit(self, folder: str, state: os.stat_result) -> bool:
        before = self._seen.setdefault((state.st_dev, state.st_ino), folder)
        if before != folder:
            self._reject_folder(folder, f"folder visited before as {escape(before)!r}; it is not read twice")
        return before == folder

    def _visit(self, entry: os.DirEntry[str], relative: str, stack: list[str]) -> None:
        try:
            if entry.is_dir():
                if self.pattern is not None and not self.pattern.enters(relative):
                    return
                if entry.is_symlink():
                    heapq.heappush(self._links, relative)
                elif self._first_visit(relative, entry.stat()):
                    stack.append(relative)
                return
            if self.pattern is not None and not self.pattern.matches(relative):
                return
            if split_extension(entry.name)[1]:
                state = entry.stat()
                reason = kind_problem(state.st_mode)
                self.found.append((relative, 0 if reason else state.st_size, reason))
            elif "." not in entry.name.lstrip(".") and entry.is_symlink():
                entry.stat()  # a broken link without any extension may have been a folder of audio: its loss is told
                self.ignored += 1
            else:
                self._other(relative)
        except OSError as error:
            reason = f"link that leads nowhere ({error.strerror})" if entry.is_symlink() else f"lost ({error.strerror})"
            if self.pattern is not None and not self.pattern.matches(relative):
                return
            if split_extension(entry.name)[1]:
                self.found.append((relative, 0, reason))
            else:
                self._reject_folder(relative, reason)

    def _other(self, relative: str) -> None:
        lower = relative.lower()
        kind = "compressed" if lower.endswith(COMPRESSED_TARS) else lower[lower.rfind(".") :]
        if kind in self.shards:
            self.shards[kind].append(relative)
        self.ignored += 1


def scan_tree(root: Path, pattern: Pattern | None, named: str) -> Listing:
    """Audio below a folder, or its shards if it holds no audio but tar or Parquet files.

    Parameters
    ----------
    root : Path
        Absolute.
    pattern : Pattern or None
        Which files below it are wanted; None for all.
    named : str
        The input as the user named it.
    """
    tree = Tree(str(root), pattern)
    tree.walk()
    if not tree.found and any(tree.shards.values()):
        from speechtok.corpus.archives import scan_shards

        return scan_shards(tree.root, tree.shards, tree.ignored, named)
    rows = Rows()
    for relative, size, reason in sorted(tree.found):
        reason = text_problem(relative) or reason
        path = escape(relative) if reason else relative
        stem = split_extension(path)[0]
        file = f"{tree.root}/{relative}"
        rows.add("", (stem, path) if stem != path else (path,), Utterance("", path, file, size), reason)
    listing = rows.listing(tree.root or "/", tree.ignored)
    if not rows:
        note = "".join(f"; {folder.path}: {folder.reason}" for folder in tree.folders[:1])
        raise no_audio(named, note)
    return replace(listing, rejected=sorted([*listing.rejected, *tree.folders], key=lambda item: item.path))
