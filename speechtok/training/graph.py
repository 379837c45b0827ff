"""Steps that make each other's inputs: in which order they run, and which of them can be left as they are.

What was built is kept in a record, a JSON file: for every step its settings, its data, the content of the steps that it
needs, and the hashes of the files that it wrote. A step is up to date while all of these are the same. A step that was
interrupted has no entry, or an old one, and is run again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechtok.errors import FormatError, InputError, SpeechtokError

__all__ = ["Product", "Record", "Step", "Task", "file_hash", "ordered", "plan", "run"]


@dataclass(frozen=True)
class Product:
    """What a step made.

    Parameters
    ----------
    files : tuple of Path
        Files that it wrote.
    facts : dict
        Plain values, for the record and for the steps that need it.
    """

    files: tuple[Path, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """The file of this name; InputError if there is none."""
        for path in self.files:
            if path.name == name:
                return path
        raise InputError(f"no file {name} was made; delete the step from the record and run it again")


@dataclass(frozen=True)
class Task:
    """What the function of a step is told.

    Parameters
    ----------
    fingerprint : str
        Of the step with all its inputs, 16 hexadecimal digits: names folders in which work is resumed.
    needs : mapping of str to Product
        Of the steps that it needs.
    """

    fingerprint: str
    needs: Mapping[str, Product]


@dataclass(frozen=True)
class Step:
    """One thing to be made.

    Parameters
    ----------
    name : str
    kind : str
        For the reader.
    build : callable
        ``Task -> Product``; replaces what an earlier run left.
    needs : tuple of str
        Names of steps.
    settings : mapping
        Plain values that decide the product.
    data : mapping of str to str
        Fingerprints of the data that it reads, by name.
    kept : bool
        Whether its files stay for good. Files of other steps may be gone; they are made again when a step needs them.
    expects : mapping of str to str
        Hashes that files must have, by file name: where they are given from outside.
    """

    name: str
    kind: str
    build: Callable[[Task], Product]
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    kept: bool = True
    expects: Mapping[str, str] = field(default_factory=dict)


class Record:
    """What was built, see the module.

    Parameters
    ----------
    path : Path
        The JSON file; made by the first step that ends.
    root : Path
        Files of kept steps are named relative to it.
    runs : Path
        Files of other steps are named relative to it.

    Raises
    ------
    FormatError
        If the file is damaged.
    """

    def __init__(self, path: Path, root: Path, runs: Path) -> None:
        self.path, self.root, self.runs = path, root.resolve(), runs.resolve()
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.entries = json.loads(path.read_text())
                for entry in self.entries.values():
                    entry["settings"], entry["data"], entry["needs"], entry["files"], entry["facts"]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{path} is damaged ({error!r}); delete it to build everything anew") from error

    def product(self, step: Step) -> Product:
        """What a step made; InputError if it was not run yet."""
        entry = self._entry(step.name)
        return Product(tuple(self._place(step, name) for name in entry["files"]), entry["facts"])

    def task(self, step: Step, steps: Mapping[str, Step]) -> Task:
        """What the step is to be run with; all that it needs must be there."""
        needs = {name: self._content(name) for name in step.needs}
        inputs = [step.kind, _plain(step.settings), _plain(step.data), needs]
        return Task(_hash(inputs)[:16], {name: self.product(steps[name]) for name in step.needs})

    def why(self, step: Step) -> str:
        """Why a step must run, seen from its own entry; empty if it need not."""
        if step.name not in self.entries:
            return "new"
        entry = self.entries[step.name]
        for part, wanted in (("settings", _plain(step.settings)), ("data", _plain(step.data))):
            differing = sorted(k for k in {*entry[part], *wanted} if entry[part].get(k) != wanted.get(k))
            if differing:
                return f"{part} changed ({', '.join(differing)})"
        if set(step.needs) != set(entry["needs"]):
            return "other inputs"
        for name in step.needs:
            if name not in self.entries or self._content(name) != entry["needs"][name]:
                return f"{name} changed"
        found = {Path(name).name: value for name, value in entry["files"].items()}
        for name, wanted in step.expects.items():
            if found.get(name) != wanted:
                return f"another {name} is given"
        return self._touched(step) if step.kept else ""

    def lacks_files(self, step: Step) -> bool:
        """Whether files of a step are missing or not those that it wrote."""
        return step.name not in self.entries or bool(self._touched(step))

    def add(self, step: Step, product: Product, known: Iterable[str]) -> None:
        """Note a finished step and write the file; entries of steps that are not `known` are dropped."""
        base = self.root if step.kept else self.runs
        self.entries[step.name] = {
            "kind": step.kind,
            "settings": _plain(step.settings),
            "data": _plain(step.data),
            "needs": {name: self._content(name) for name in step.needs},
            "files": {str(path.resolve().relative_to(base)): file_hash(path) for path in product.files},
            "facts": _plain(product.facts),
        }
        self.entries = {name: self.entries[name] for name in known if name in self.entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}")
        partial.write_text(json.dumps(self.entries, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.entries:
            raise InputError(f"{name} was not built yet")
        return self.entries[name]

    def _content(self, name: str) -> str:
        """Hash of what a step made; where it lies does not matter."""
        entry = self._entry(name)
        files = sorted((Path(path).name, value) for path, value in entry["files"].items())
        return _hash([files, entry["facts"]])[:16]

    def _place(self, step: Step, name: str) -> Path:
        return (self.root if step.kept else self.runs) / name

    def _touched(self, step: Step) -> str:
        for name, wanted in self.entries[step.name]["files"].items():
            path = self._place(step, name)
            if not path.is_file():
                return f"{name} is missing"
            if file_hash(path) != wanted:
                return f"{name} was changed"
        return ""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def ordered(steps: Sequence[Step], only: Sequence[str] = ()) -> list[Step]:
    """Steps in an order in which each stands behind all that it needs, otherwise as given.

    Parameters
    ----------
    steps : sequence of Step
    only : sequence of str
        Just these steps and all that they need; empty: all steps.

    Raises
    ------
    InputError
        If a name is unknown or occurs twice, or steps need each other in a circle.
    """
    named = {step.name: step for step in steps}
    if len(named) < len(steps):
        raise InputError(f"a step occurs twice among {', '.join(step.name for step in steps)}")
    result: dict[str, Step] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise InputError(f"steps need each other in a circle: {' -> '.join((*path[path.index(name) :], name))}")
        if name not in named:
            asker = f"{path[-1]} needs {name!r}" if path else f"no step {name!r}"
            raise InputError(f"{asker}; steps are {', '.join(named)}")
        if name not in result:
            for need in named[name].needs:
                visit(need, (*path, name))
            result[name] = named[name]

    for name in only or named:
        visit(name, ())
    return list(result.values())


def plan(steps: Sequence[Step], record: Record, only: Sequence[str] = ()) -> dict[str, str]:
    """What would be run.

    Parameters
    ----------
    steps, only
        See `ordered`.
    record : Record

    Returns
    -------
    dict of str to str
        Reason by name, in order; empty for what stays as it is. A step whose reason begins with "after" is spared if
        what it waits for comes out as it was.
    """
    chosen = ordered(steps, only)
    named = {step.name: step for step in chosen}
    reasons = {step.name: record.why(step) for step in chosen}
    before: dict[str, str] = {}
    while reasons != before:
        before = dict(reasons)
        for step in chosen:
            late = [name for name in step.needs if reasons[name]]
            if late and not reasons[step.name]:
                reasons[step.name] = f"after {late[0]}"
            for name in step.needs if reasons[step.name] else ():
                if not reasons[name] and record.lacks_files(named[name]):
                    reasons[name] = f"{step.name} needs its files"
    return reasons


def run(
    steps: Sequence[Step],
    record: Record,
    only: Sequence[str] = (),
    on_step: Callable[[str, str], None] = lambda name, reason: None,
) -> list[str]:
    """Bring everything up to date.

    Parameters
    ----------
    steps, record, only
        See `plan`.
    on_step : callable
        Told the name of each step that is run, and why.

    Returns
    -------
    list of str
        Steps that were run.

    Raises
    ------
    SpeechtokError
        If a step fails; the message names it. Finished steps stay.
    """
    chosen, planned = ordered(steps, only), plan(steps, record, only)
    named = {step.name: step for step in chosen}
    built = []
    for step in chosen:
        # Looked at again: what it waited for may have come out as it was.
        reason = record.why(step) or (planned[step.name] if record.lacks_files(step) else "")
        if not reason:
            continue
        on_step(step.name, reason)
        try:
            product = step.build(record.task(step, named))
        except SpeechtokError as error:
            raise SpeechtokError(
                f"step {step.name} failed: {error}; finished steps are kept, run the same command to go on"
            ) from error
        except Exception as error:
            error.add_note(f"in step {step.name}; finished steps are kept, run the same command to go on")
            raise
        record.add(step, product, [other.name for other in steps])
        built.append(step.name)
    return built
