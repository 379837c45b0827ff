"""Hold tokenizers of one vocabulary against each other under augmentation, on held-out speakers.

All aligned files of the speech: unit edit distance under the four families (noises and measured rooms of the split
"test"), what guards it (floors, chance, use of the vocabulary, edits per second), phone information (PNMI), ABX, and
augmentation complexity of units; native, lossy and accented speech apart and pooled, and everything relative to a
baseline. Every row hears the same sounds. Rows that are not shipped are fitted on the training speech. What is fitted
and measured is kept in the folder of ``--work``: another row later costs its own time. Delete that folder when the
program has changed.

A row is a tokenizer's name or folder, or LABEL=NAME. Rows whose units are segments have no PNMI and no ABX of units.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from speechtok.benchmarks.runner import machine, parser, write

import speechtok
from speechtok.audio.augment import FAMILIES, AugmentResources
from speechtok.encoders.lipcot import LipcotEncoder
from speechtok.errors import InputError
from speechtok.evaluation import abx, invariance, units
from speechtok.evaluation.alignments import read
from speechtok.evaluation.units import POOLED, spread
from speechtok.tokenizer import Tokenizer
from speechtok.training.jobs import Choices
from speechtok.training.kmeans import fit
from speechtok.training.splits import write_manifest

VOCABULARY = 100
TARGETS = {"noise": -0.20, "stretch": -0.25, "reverb": -0.25, "pitch": -0.25, "pnmi": -0.03}  # relative to the baseline
FIGURES = (
    "utterances", "seconds", "ued", "ued_ci", "edits_per_second", "floor", "chance", "units_per_second",
    "runs_per_second", "vocab_used", "vocab_size", "perplexity", "collapsed",
)  # fmt: skip


FIT: dict[str, Any] = {  # as shipped units of encoders are fitted
    "sample_frames": Choices.encoder_sample_frames,
    "iterations": Choices.iterations,
    "restarts": Choices.restarts,
    "seed": Choices.seed,
}


def lipcot(train: str, device: str) -> Tokenizer:
    """LiPCoT with its defaults."""
    return fit(train, LipcotEncoder(), VOCABULARY, name="lipcot-k100", device=device, **FIT)[0]


def syllables(train: str, device: str) -> Tokenizer:
    """The shipped segments of syllables with a smaller vocabulary."""
    shipped = speechtok.load("sylber-mini")
    return fit(
        train, shipped.encoder, VOCABULARY, name="sylber-mini-k100", segmenter=shipped.segmenter,
        silence_gap=shipped.silence_gap, spherical=True, device=device, **FIT,
    )[0]  # fmt: skip


FITTED: dict[str, Callable[[str, str], Tokenizer]] = {"lipcot-k100": lipcot, "sylber-mini-k100": syllables}
ROWS = ("mfcc-k100", "lipcot-k100", "w2vbert-mini-k100", "sylber-mini-k100")


def opened(row: str, chosen: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a row, fitted if it must be, under the row's label."""
    label, _, name = row.rpartition("=")
    kept = chosen.work / "tokenizers" / name
    if name in FITTED and not (kept / "tokenizer.json").exists():
        FITTED[name](str(chosen.data / "speech" / "train"), chosen.device).save(kept)
    tokenizer = speechtok.load(kept if name in FITTED else name, device=chosen.device)
    tokenizer.name = label or tokenizer.name
    return tokenizer


def measured(tokenizer: Tokenizer, chosen: argparse.Namespace) -> dict[str, Any]:
    """All figures of a row, by group of speech; read back if they are known."""
    settings = {
        "tokenizer": tokenizer.fingerprint, "limit_files": chosen.limit_files, "seed": chosen.seed,
        "complexity_files": chosen.complexity_files,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    known = chosen.work / "rows" / f"{digest}.json"
    if not known.exists():
        write_row(known, measure(tokenizer, chosen))
    row: dict[str, Any] = json.loads(known.read_text())
    return row


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row, in whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row))
    part.replace(path)


def measure(tokenizer: Tokenizer, chosen: argparse.Namespace) -> dict[str, Any]:
    """All figures of a row, by group of speech."""
    folder, limit = chosen.data / "speech" / "eval", chosen.limit_files
    paths = [PurePosixPath(one.path) for one in spread(read(folder), limit)]
    sounds = write_manifest(folder, paths, chosen.work / "sounds.jsonl")
    found = invariance.evaluate(
        sounds, [tokenizer], resources=AugmentResources.from_folder(chosen.data, "test"), seed=chosen.seed,
        groups=True, curve_files=0, complexity_files=chosen.complexity_files,
    )  # fmt: skip
    (steady,) = found["tokenizers"].values()
    parts = steady["groups"] if len(steady["groups"]) == 1 else steady["groups"] | {POOLED: steady}
    groups = {name: {key: part[key] for key in FIGURES} for name, part in parts.items()}
    kinds: list[abx.Representation] = ["frames"]
    if tokenizer.segmenter is None:
        kinds.append("units")
        for name, part in units.evaluate(folder, tokenizer, limit_files=limit)["groups"].items():
            groups[name]["pnmi"] = {key: part[f"{key}_silence"]["pnmi_miller_madow"] for key in ("with", "without")}
    for kind in kinds:
        table = abx.evaluate(folder, tokenizer, representation=kind, limit_files=limit)
        for name, part in table["groups"].items():
            errors = {condition: part[condition]["error"] for condition in ("within", "across")}
            groups[name].setdefault("abx", {})[kind] = errors
    return {
        "fingerprint": tokenizer.fingerprint, "files": found["files"], "failed": found["failed"],
        "conventions": found["conventions"] | {"abx": table["conventions"]}, "groups": groups,
        "complexity": {key: value["units"] for key, value in steady.items() if key == "complexity"},
    }  # fmt: skip


def changes(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Relative change of edit distances and PNMI (silence kept) against the baseline, by group."""
    result = {}
    for group, figures in row["groups"].items():
        other = baseline["groups"][group]
        result[group] = {family: figures["ued"][family] / other["ued"][family] - 1 for family in FAMILIES}
        if "pnmi" in figures and "pnmi" in other:
            result[group]["pnmi"] = figures["pnmi"]["with"] / other["pnmi"]["with"] - 1
    return result


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows]) + "\n"


def pair(errors: Mapping[str, float | None] | None) -> str:
    """ABX within and across speakers."""
    if errors is None:
        return "-"
    return " / ".join("-" if value is None else f"{value:.1f}" for value in errors.values())


def cells(name: str, figures: Mapping[str, Any]) -> list[str]:
    """One line of a group's table."""
    ends = figures["ued_ci"]
    return [
        name,
        *(f"{figures['ued'][family]:.1f} [{ends[family][0]:.1f}, {ends[family][1]:.1f}]" for family in FAMILIES),
        f"{figures['floor']['pad']:.1f} / {figures['floor']['delay']:.1f}",
        f"{figures['chance']:.0f}",
        f"{figures['pnmi']['with']:.3f} / {figures['pnmi']['without']:.3f}" if "pnmi" in figures else "-",
        *(pair(figures["abx"].get(kind)) for kind in ("frames", "units")),
        f"{figures['units_per_second']:.1f} / {figures['runs_per_second']:.1f}",
        f"{figures['vocab_used']} / {figures['perplexity']:.0f}",
        " ".join(f"{figures['edits_per_second'][family]:.1f}" for family in FAMILIES),
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """All tables."""
    rows, parts = result["rows"], []
    columns = [
        "tokenizer", *FAMILIES, "floor: pad / delay", "chance", "PNMI, silence kept / dropped", "ABX frames", "units",
        "units / runs per s", "used / perplexity", f"edits/s: {' '.join(FAMILIES)}",
    ]  # fmt: skip
    for group in next(iter(rows.values()))["groups"]:
        lines = [cells(name, row["groups"][group]) for name, row in rows.items()]
        first = next(iter(rows.values()))["groups"][group]
        parts.append(f"{group}: {first['utterances']} files, {first['seconds']:.0f} s\n\n{table(columns, lines)}")
    told = [
        [name, group, *(f"{100 * change[key]:+.1f} %" if key in change else "-" for key in (*FAMILIES, "pnmi"))]
        for name, by_group in result["relative"].items() for group, change in by_group.items()
    ]  # fmt: skip
    wanted = ", ".join(f"{key} {100 * value:+.0f} %" for key, value in TARGETS.items())
    parts.append(
        f"Relative to {result['baseline']} (targets: {wanted})\n\n"
        + table(["tokenizer", "speech", *FAMILIES, "PNMI"], told)
    )
    bits = [
        [name, f"{one['bits']:.2f} [{one['ci'][0]:.2f}, {one['ci'][1]:.2f}]", f"{one['most_bits']:.2f}",
         "yes" if one["saturated"] else "", f"{one['mean']:.1f}"]
        for name, row in rows.items() for one in row["complexity"].values()
    ]  # fmt: skip
    parts.append(
        'Augmentation complexity of units; saturated bits say no more than "at least"\n\n'
        + table(["tokenizer", "bits", "at most", "saturated", "mean of K(x, x)"], bits)
    )
    return "\n".join(parts)


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument(
        "--tokenizer", action="append", metavar="ROW", help=f"may be repeated; default {' '.join(ROWS)}"
    )
    options.add_argument(
        "--baseline", default="w2vbert-mini-k100", help="label of the row that others are held against"
    )
    options.add_argument("--work", type=Path, default=Path("runs/invariance"))
    options.add_argument("--limit-files", type=int, help="at most so many of the aligned files, evenly spread")
    options.add_argument("--complexity-files", type=int, default=110, help="at most so many of them; 0: none")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    tokenizers = {one.name: one for one in (opened(name, chosen) for name in chosen.tokenizer or ROWS)}
    if chosen.baseline not in tokenizers:
        raise InputError(f"the baseline {chosen.baseline} is none of the rows {', '.join(tokenizers)}")
    rows = {name: measured(tokenizer, chosen) for name, tokenizer in tokenizers.items()}
    if len({json.dumps([row["files"], sorted(row["failed"])]) for row in rows.values()}) > 1:
        raise InputError("some rows could not be measured on files that others were: figures cannot be compared")
    conventions = [row.pop("conventions") for row in rows.values()]
    result = {
        "machine": machine(), "data": "aligned files of speech/eval", "conventions": conventions[0], "targets": TARGETS,
        "baseline": chosen.baseline, "rows": rows,
        "relative": {
            name: changes(row, rows[chosen.baseline]) for name, row in rows.items() if name != chosen.baseline
        },
    }  # fmt: skip
    write(chosen.json, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
