"""What several commands share: options, tables, progress."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "DEFAULT_TOKENIZER", "Agg", "AggChoice", "Device", "Json", "Limit", "Log", "LogMode", "Noises", "Norm",
    "NormChoice", "Rooms", "TokenizerName", "Tokenizers", "print_table", "progress", "write_json",
]  # fmt: skip

TokenizerName = Annotated[
    str,
    typer.Option(
        "--tokenizer", "-t", metavar="NAME", help="A tokenizer folder, or a name that `speechtok models` lists."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, ...")]

DEFAULT_TOKENIZER = "w2vbert-mini"


Tokenizers = Annotated[
    list[str] | None,
    typer.Option(
        "--tokenizer", "-t", metavar="NAME", help=f"A tokenizer folder or name; may be repeated; {DEFAULT_TOKENIZER}."
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit-files", min=1, help="Use at most this many utterances, evenly spread.")
]
Noises = Annotated[
    Path | None,
    typer.Option("--noise", metavar="DIR", help="Noises: sound files, or metadata.jsonl; default shipped ones."),
]
Rooms = Annotated[
    Path | None, typer.Option("--rir", metavar="DIR", help="Room responses, likewise; default simulated rooms.")
]


class Norm(StrEnum):
    """What edits are divided by."""

    dedup_ref = "dedup_ref"
    frames = "frames"
    max_len = "max_len"


class Agg(StrEnum):
    """How utterances are averaged."""

    mean = "mean"
    pooled = "pooled"


NormChoice = Annotated[Norm, typer.Option(help="Length that unit edits are divided by.")]
AggChoice = Annotated[Agg, typer.Option(help="Mean of the utterances' ratios, or pooled.")]


class LogMode(StrEnum):
    """How progress is told."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    json = "json"
    quiet = "quiet"


Log = Annotated[
    LogMode,
    typer.Option(
        "--log",
        help="Progress on standard error: a bar, plain lines, JSON lines or nothing; auto: the bar on a terminal.",
    ),
]


def write_json(path: Path | None, result: Any) -> None:
    """Write a result where ``--json`` says."""
    if path is not None:
        from speechtok.errors import OutputError

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror})") from error


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(f"{cell:,g}" if isinstance(cell, float) else str(cell)) for cell in row))
    # A pipe has no width of its own: do not break lines for it.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(Text(title, style="bold"))
    console.print(table)


def peak_megabytes() -> float:
    """Peak resident memory of this process and of its largest finished child."""
    import resource

    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return used / (1e6 if sys.platform == "darwin" else 1e3)


_LABELS = {
    "scan": "looking for files",
    "plan": "reading headers",
    "run": "encoding",
    "decode": "decoding",
    "write": "writing",
    "sample": "sampling",
    "fit": "k-means",
    "read": "reading sound",
    "train": "training",
}


@contextmanager
def progress(mode: LogMode) -> Iterator[Callable[[Any], None]]:
    """Give a function that takes `speechtok.corpus.engine.Event` and tells the user."""
    if mode is LogMode.auto:
        mode = LogMode.bar if sys.stderr.isatty() else LogMode.plain
    if mode is LogMode.quiet:
        yield lambda event: None
    elif mode is LogMode.bar:
        with _bar() as tell:
            yield tell
    else:
        logging.captureWarnings(True)
        yield _lines(mode)


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}
        begin: dict[str, float] = {}

        def tell(event: Any) -> None:
            if event.stage not in tasks:
                begin[event.stage] = time.perf_counter()
                tasks[event.stage] = bar.add_task(_LABELS[event.stage], total=event.total or None, rate="")
            speed = event.done / max(1e-9, time.perf_counter() - begin[event.stage])
            rate = f"{speed:,.0f} audio-s/s" if event.stage in ("run", "decode") and event.done else event.note
            bar.update(tasks[event.stage], completed=event.done, total=event.total or None, rate=rate)

        yield tell


def _lines(mode: LogMode, interval: float = 5.0) -> Callable[[Any], None]:
    last: dict[str, Any] = {"stage": "", "time": 0.0, "begin": 0.0, "first": 0.0}

    def tell(event: Any) -> None:
        now = time.perf_counter()
        if event.stage != last["stage"]:
            last.update(stage=event.stage, begin=now, first=event.done)  # a resumed run does not begin at 0
        elif now - last["time"] < interval and event.done < event.total:
            return
        last["time"] = now
        elapsed = now - last["begin"]
        speed = (event.done - last["first"]) / elapsed if elapsed > 0 else 0.0
        left = (event.total - event.done) / speed if speed else None
        if mode is LogMode.json:
            record = {"stage": event.stage, "done": round(event.done, 3), "total": round(event.total, 3)}
            record |= {"per_second": round(speed, 3), "seconds_left": None if left is None else round(left, 1)}
            sys.stderr.write(json.dumps(record) + "\n")
        else:
            tail = "" if left is None else f", {speed:,.0f}/s, {left:,.0f} s left"
            note = f", {event.note}" if event.note else ""
            sys.stderr.write(f"{_LABELS[event.stage]}: {event.done:,.0f} of {event.total:,.0f}{tail}{note}\n")
        sys.stderr.flush()

    return tell
