"""What is done: the hidden work folder of a job, and the step from there to the final output.

A shard is first written as a file, synced and renamed, then a marker with its hash is written in the same
way. So a marker proves a complete shard, and a job that was killed anywhere goes on where markers are
missing. The final step only renames and is repeated safely. ``tokenizer.json`` is written last: it says that
the output is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechtok.corpus import formats
from speechtok.corpus.rows import Row, read_part, write_part
from speechtok.errors import FormatError, OutputError

__all__ = ["Ledger"]


def _write(path: Path, text: str, work: Path) -> None:
    """Write a small file durably under its final name; what a killed process leaves is in the work folder."""
    partial = work / f".{path.name}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Ledger:
    """The output folder of one job.

    Parameters
    ----------
    out : Path
    plan_hash : str
    output_format : str

    Raises
    ------
    OutputError
        If the folder cannot be used or belongs to another job.
    """

    def __init__(self, out: Path, plan_hash: str, output_format: str):
        self.out, self.plan_hash, self.format = out, plan_hash, output_format
        self.work = out / ".work"

    def open(self, *, overwrite: bool = False) -> bool:
        """Claim the folder. True if the job is complete already.

        Parameters
        ----------
        overwrite : bool
            Delete what another job left there (only files that speechtok writes).
        """
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; give a folder for the output")
        if overwrite and self._owner() not in (None, self.plan_hash):
            self._clear()
        owner = self._owner()
        if owner not in (None, self.plan_hash):
            raise OutputError(
                f"{self.out} holds the output of another job (other input, tokenizer or format); choose another "
                "folder, or --overwrite to replace it"
            )
        if owner is None and self.out.is_dir() and any(self.out.glob("part-*.parquet")):
            raise OutputError(f"{self.out} holds Parquet parts that no job of this tool claims; choose an empty folder")
        if self._complete():
            shutil.rmtree(self.work, ignore_errors=True)
            return True
        self.work.mkdir(parents=True, exist_ok=True)
        _write(self.work / "plan.json", json.dumps({"plan": self.plan_hash}), self.work)
        return False

    def _owner(self) -> str | None:
        for path in (self.out / "tokenizer.json", self.work / "plan.json"):
            if path.exists():
                try:
                    return str(json.loads(path.read_text())["plan"])
                except (ValueError, KeyError, TypeError):
                    return "unreadable"
        return None

    def _complete(self) -> bool:
        return (self.out / "tokenizer.json").exists()

    def _clear(self) -> None:
        (self.out / "tokenizer.json").unlink(missing_ok=True)
        (self.out / "errors.jsonl").unlink(missing_ok=True)
        for path in self.out.glob("part-*.parquet"):
            path.unlink()
        shutil.rmtree(self.work, ignore_errors=True)

    # -- shards -----------------------------------------------------------------------------------------------------

    def _part(self, shard: int) -> Path:
        return self.work / f"{shard:05d}.part"

    def _marker(self, shard: int) -> Path:
        return self.work / f"{shard:05d}.json"

    def _final(self, shard: int) -> Path:
        return self.out / f"part-{shard:05d}.parquet"

    def commit(
        self, shard: int, rows: list[Row], errors: list[dict[str, str]], seconds: float, metadata: dict[str, str]
    ) -> None:
        """Store a finished shard durably."""
        partial = self.work / f".{shard:05d}.{os.getpid()}"
        write_part(partial, rows, metadata)
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        partial.replace(self._part(shard))
        marker = {"rows": len(rows), "errors": errors, "seconds": seconds, "sha256": digest}
        _write(self._marker(shard), json.dumps(marker), self.work)

    def marker(self, shard: int) -> dict[str, Any] | None:
        """Facts on a finished shard; None if it must be run (again)."""
        try:
            marker: dict[str, Any] = json.loads(self._marker(shard).read_text())
        except (FileNotFoundError, ValueError):
            return None
        for path in (self._part(shard), self._final(shard)):
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == marker["sha256"]:
                return marker
        return None

    # -- final step ---------------------------------------------------------------------------------------------------

    def finish(self, shards: int, rejected: list[dict[str, str]], description: dict[str, Any], root: str) -> bool:
        """Put the final output in place. False if shards (of other ranks) are still missing.

        Several processes may get here at once and one may be killed on the way: every step can be repeated, and
        whoever finds a file moved already takes it as done.
        """
        markers = [self.marker(shard) for shard in range(shards)]
        if not self._complete():
            if any(marker is None for marker in markers):
                return self._complete()
            try:
                if self.format == "parquet":
                    for shard in range(shards):
                        self._move(shard)
                else:
                    self._convert(shards, description, root)
                errors = rejected + [error for marker in markers if marker for error in marker["errors"]]
                if errors:
                    lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
                    _write(self.out / "errors.jsonl", lines, self.work)
                rows = sum(marker["rows"] for marker in markers if marker)
                description |= {"plan": self.plan_hash, "root": root, "files": rows, "failed": len(errors)}
                text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
                _write(self.out / "tokenizer.json", text, self.work)
            except (FileNotFoundError, FormatError):
                if not self._complete():  # another process finished first and took the work folder away
                    raise
        shutil.rmtree(self.work, ignore_errors=True)
        return True

    def _move(self, shard: int) -> None:
        try:
            self._part(shard).replace(self._final(shard))
        except FileNotFoundError:
            if not self._final(shard).exists():
                raise

    def _convert(self, shards: int, description: dict[str, Any], root: str) -> None:
        """Write another format inside the work folder, then rename file by file."""
        staging = self.work / f"final.{os.getpid()}"
        staging.mkdir(exist_ok=True)
        for path in formats.write(self.format, self._rows(shards), staging, description, root):
            target = self.out / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def _rows(self, shards: int) -> Iterator[Row]:
        for shard in range(shards):
            yield from read_part(self._part(shard))
