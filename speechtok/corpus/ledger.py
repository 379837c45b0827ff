"""What is done: the hidden work folder of a job, and the step from there to the final output.

A shard is first written as a file, synced and renamed, then a marker with its hash is written in the same way. So a
marker proves a complete shard, and a job that was killed anywhere goes on where markers are missing. The final step
only renames and may be repeated. ``tokenizer.json`` is written last: it says that the output is complete. Each plan has
a work folder of its own, so that one job can never take another one's shards for its own.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from speechtok.corpus import formats
from speechtok.corpus.rows import Row, read_part, write_part
from speechtok.errors import OutputError

__all__ = ["Ledger"]


def _unique() -> str:
    """A name that no other process uses, on whatever machine it runs."""
    return uuid.uuid4().hex


def _write(path: Path, text: str, work: Path) -> None:
    """Write a small file durably under its final name; what a killed process leaves is in the work folder."""
    partial = work / f".{_unique()}"
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
        A key of `formats.FORMATS`.
    """

    def __init__(self, out: Path, plan_hash: str, output_format: str):
        self.out, self.plan_hash, self.format = out, plan_hash, output_format
        self.work = out / ".work" / plan_hash

    def open(self, *, overwrite: bool = False) -> bool:
        """Claim the folder. True if the job is complete already.

        Parameters
        ----------
        overwrite : bool
            Replace what another job left there, or a finished output of this very job; only files that jobs write are
            deleted, ``tokenizer.json`` last, so that a process killed on the way leaves a folder that still says whose
            it is.

        Raises
        ------
        OutputError
            If the folder cannot be used or belongs to something else.
        """
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; give a folder for the output")
        description = self.out / "tokenizer.json"
        if description.exists() and self.job() is None:
            raise OutputError(f"{self.out} holds a tokenizer.json that no job wrote; choose another folder")
        if self.complete() and not overwrite:
            self.tidy()
            return True
        if not self._owners() and self.out.is_dir() and any(self.out.glob("part-*.parquet")):
            raise OutputError(f"{self.out} holds Parquet parts that no job of this tool claims; choose another folder")
        if not overwrite:
            self._refuse_others()
        self.work.mkdir(parents=True, exist_ok=True)
        _write(self.work / "plan.json", json.dumps({"plan": self.plan_hash, "format": self.format}), self.work)
        if overwrite and (self.complete() or set(self._owners()) - {self.plan_hash}):
            self._clear()
        else:
            # Two jobs may have looked at an empty folder at once: whoever looks again now sees the other one.
            self._refuse_others()
        description.unlink(missing_ok=True)
        return False

    def _refuse_others(self) -> None:
        if set(self._owners()) - {self.plan_hash}:
            if self.work.exists() and not any(self.work.glob("*.part")):
                shutil.rmtree(self.work, ignore_errors=True)
            raise OutputError(
                f"{self.out} holds the output of another job (other input, tokenizer or format); choose another "
                "folder, or --overwrite to replace it"
            )

    def job(self) -> dict[str, Any] | None:
        """What ``tokenizer.json`` says of the finished job whose output this is; None if there is none."""
        try:
            job = json.loads((self.out / "tokenizer.json").read_text())["job"]
            return job if {"plan", "format", "parts", "files", "failed"} <= set(job) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _owners(self) -> dict[str, str]:
        """Plan and format of each job that has something here."""
        owners = {}
        if (job := self.job()) is not None:
            owners[str(job["plan"])] = str(job["format"])
        for path in (self.out / ".work").glob("*/plan.json"):
            try:
                owners[path.parent.name] = str(json.loads(path.read_text())["format"])
            except (OSError, ValueError, KeyError, TypeError):
                owners[path.parent.name] = "parquet"
        return owners

    def complete(self) -> bool:
        """Whether this job's output is in place."""
        job = self.job()
        if job is None or job["plan"] != self.plan_hash:
            return False
        if self.format == "parquet":
            return all(self._final(shard).exists() for shard in range(job["parts"]))
        return all(any(self.out.glob(pattern)) for pattern in formats.FORMATS[self.format].files) or not job["files"]

    def _clear(self) -> None:
        owned = set(self._owners().values())
        if any(not formats.FORMATS[name].files for name in owned if name in formats.FORMATS):
            raise OutputError(
                f"{self.out} holds a tree of arrays, which --overwrite does not delete; delete it by hand"
            )
        for name in owned & set(formats.FORMATS):
            for pattern in formats.FORMATS[name].files:
                for path in self.out.glob(pattern):
                    path.unlink(missing_ok=True)
        (self.out / "errors.jsonl").unlink(missing_ok=True)
        for folder in (self.out / ".work").iterdir():
            if folder != self.work:
                shutil.rmtree(folder, ignore_errors=True)

    def tidy(self) -> None:
        """Remove this job's work folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # another job is at work here, or another process was quicker
            self.work.parent.rmdir()

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
        partial = self.work / f".{_unique()}"
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

        Several processes may get here at once and one may be killed on the way: every step can be repeated. A process
        whose files another one has moved away meanwhile fails with an OSError or OutputError; it must look whether the
        job is `complete` by then.
        """
        markers = [marker for shard in range(shards) if (marker := self.marker(shard)) is not None]
        if len(markers) < shards:
            return False
        if self.format == "parquet":
            for shard in range(shards):
                self._move(shard)
        else:
            self._convert(shards, description, root)
        errors = rejected + [error for marker in markers for error in marker["errors"]]
        if errors:
            lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
            _write(self.out / "errors.jsonl", lines, self.work)
        rows = sum(marker["rows"] for marker in markers)
        job = {"plan": self.plan_hash, "format": self.format, "parts": shards, "files": rows, "failed": len(errors)}
        text = json.dumps({**description, "root": root, "job": job}, indent=2, ensure_ascii=False) + "\n"
        _write(self.out / "tokenizer.json", text, self.work)
        self.tidy()
        return True

    def _move(self, shard: int) -> None:
        try:
            self._part(shard).replace(self._final(shard))
        except FileNotFoundError:
            if not self._final(shard).exists():
                raise

    def _convert(self, shards: int, description: dict[str, Any], root: str) -> None:
        """Write another format inside the work folder, then rename file by file."""
        staging = self.work / f"final.{_unique()}"
        staging.mkdir()
        for path in formats.write(self.format, self._rows(shards), staging, description, root):
            target = self.out / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def _rows(self, shards: int) -> Iterator[Row]:
        for shard in range(shards):
            yield from read_part(self._part(shard))
