"""What all benchmarks share: interleaved timing, facts on the machine, JSON."""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["arguments", "interleaved", "lines", "machine", "parser", "share", "write"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Command line that all benchmarks have: ``--json FILE``."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, help="write the result here")
    return options


def arguments(description: str | None) -> argparse.Namespace:
    """Command line of a timing benchmark: also ``--repeats N`` and ``--threads N``, which are applied."""
    options = parser(description)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def interleaved(
    cases: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Time cases in turns, so that a slow moment of the machine meets all of them; one warm-up round is not counted.

    Parameters
    ----------
    cases : mapping of str to callable
    repeats : int
    clock : callable
        Seconds; ``time.process_time`` leaves out what other processes take of the core, for cases of one thread.

    Returns
    -------
    dict
        Per case the median, the smallest and the largest seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            begin = clock()
            case()
            if round_:
                seconds[name].append(clock() - begin)
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in seconds.items()
    }


def share(runs: Path, folder: Path, part: str) -> None:
    """Link what another run below `runs` has read and computed into the folder of a run: all hear the same sound."""
    known = next((path for path in runs.glob(f"*/{part}") if path.parent != folder), None)
    if known is not None and not (folder / part).exists():
        shutil.copytree(known, folder / part, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    """Lines of a run's metrics on "train" or "held out"; none if it never logged one."""
    metrics = folder / "metrics.jsonl"
    known = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [line for line in known if line["split"] == split]


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON and show it."""
    text = json.dumps(result, indent=2) + "\n"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(text, end="")
