"""The report of `speechtok.evaluation.invariance`: a picture of the curves, and a page with all figures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechtok.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_of", "lines", "write_report"]

_AXES = {
    "noise": "signal-to-noise ratio (dB)",
    "stretch": "speed",
    "reverb": "reverberation time RT60 (s)",
    "pitch": "shift (semitones)",
}
_NEUTRAL = {"stretch": 1.0, "pitch": 0.0}
_LETTERS = 55  # of a legend, on the width of a panel
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
_MARKERS = "osD^v<>"


def figure_of(result: dict[str, Any]) -> "Figure | None":
    """Draw edit distance against strength, a panel for each family; None if there are no curves.

    Parameters
    ----------
    result : dict
        Of `speechtok.evaluation.invariance.evaluate`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokenizers = result["tokenizers"]
    families = list(next(iter(tokenizers.values()))["curves"])
    if not families:
        return None
    columns = min(2, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(panels.flat):
        if place >= len(families):
            axes.set_axis_off()
            continue
        family = families[place]
        for index, (name, figures) in enumerate(tokenizers.items()):
            curve = figures["curves"][family]
            # No line leads across the strength that changes nothing.
            gap = [int(np.searchsorted(curve["strength"], _NEUTRAL[family]))] if family in _NEUTRAL else []
            strength, value, low, high = np.insert(
                np.column_stack([curve["strength"], curve["ued"], curve["ued_ci"]]), gap, np.nan, axis=0
            ).T
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(
                strength, value, label=name, color=colour, marker=_MARKERS[index % len(_MARKERS)],
                markersize=4, linewidth=1.4,
            )  # fmt: skip
            axes.fill_between(strength, low, high, color=colour, alpha=0.15, linewidth=0)
        drawn = result["conventions"]["ranges"].get(family)
        if drawn is not None:
            axes.axvspan(drawn["low"], drawn["high"], color="black", alpha=0.06, linewidth=0)
        axes.set_title(family)
        axes.set_xlabel(_AXES.get(family, "strength"))
        axes.grid(alpha=0.3)
        if place % columns == 0:
            axes.set_ylabel("unit edit distance (%)")
    panels.flat[0].set_ylim(bottom=0)  # of all panels, and only now: it ends the search for an upper end
    handles, labels = panels.flat[0].get_legend_handles_labels()
    beside = _LETTERS * columns // (max(map(len, labels)) + 8)  # 8: of the line in front of a name
    ncols = max(1, min(4, len(labels), beside))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    return figure


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write ``ued.png`` and ``report.html``, which holds everything in itself, into a folder.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    OutputError
        If they cannot be written.
    """
    picture, figure = io.BytesIO(), figure_of(result)
    if figure is not None:
        figure.savefig(picture, dpi=130, format="png")
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if figure is not None:
            (folder / "ued.png").write_bytes(picture.getvalue())
        page.write_text(_page(result, base64.b64encode(picture.getvalue()).decode()))
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written ({error.strerror})") from error
    return page


def lines(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a table: the label and figures of each tokenizer, and under it those of its groups of files."""
    found = []
    for name, figures in result["tokenizers"].items():
        found.append((name, figures))
        found += [(f"{name}, {group}", part) for group, part in figures.get("groups", {}).items()]
    return found


def _page(result: dict[str, Any], picture: str) -> str:
    tokenizers, families = result["tokenizers"], result["conventions"]["families"]
    steady = [
        [
            name,
            *(_with_interval(one["ued"][f], one["ued_ci"][f]) for f in families),
            _rounded(one["floor"]["pad"]), _rounded(one["floor"]["delay"]), _rounded(one["chance"]),
        ]
        for name, one in lines(result)
    ]  # fmt: skip
    use = [
        [
            name, f"{one['units_per_second']:.1f}", f"{one['runs_per_second']:.1f}",
            f"{one['vocab_used']} of {one['vocab_size']}", f"{one['perplexity']:.0f}",
            *(f"{one['edits_per_second'][f]:.1f}" for f in families), "collapsed" if one["collapsed"] else "",
        ]
        for name, one in lines(result)
    ]  # fmt: skip
    apart = [
        [name, *(_bits(one["complexity"][part]) for part in ("units", "frames")), f"{_most_bits(one):.1f}"]
        for name, one in tokenizers.items() if "complexity" in one
    ]  # fmt: skip
    parts = [
        "<h1>Units under augmentation</h1>",
        f"<p>{result['files']} files of {html.escape(result['data'])}</p>",
        "<h2>Unit edit distance (%)</h2>",
        _table(["tokenizer", *families, "floor: pad", "floor: delay", "chance"], steady),
    ]
    if picture:
        parts.append(f'<img alt="unit edit distance against strength" src="data:image/png;base64,{picture}">')
    columns = ["tokenizer", "units/s", "runs/s", "vocabulary used", "perplexity", *(f"edits/s: {f}" for f in families)]
    parts += ["<h2>What stands beside it</h2>", _table([*columns, ""], use)]
    if apart:
        columns = ["tokenizer", "units", "frames", "at most"]
        parts += ["<h2>Augmentation complexity (bits)</h2>", _table(columns, apart)]
    notes = "".join(f"<li>{note}</li>" for note in _notes(result, bool(picture)))
    parts += ["<h2>Conventions</h2>", f"<ul>{notes}</ul>"]
    return _FRAME.replace("BODY", "\n".join(parts))


def _notes(result: dict[str, Any], curves: bool) -> list[str]:
    """HTML of what figures depend on besides tokenizers and data."""
    said = result["conventions"]
    reverb = any("reverb" in family.split("+") for family in said["families"])
    ranges = "; ".join(
        f"{family}: {one['low']:g} to {one['high']:g} {one['unit']}"
        for family, one in said["ranges"].items()
        if family != "reverb"  # rooms have their own ways
    )
    notes = [
        f"One draw for each file and family, seed {said['seed']}; every tokenizer hears the same sounds.",
        f"Distance: Levenshtein between runs of units, divided by {_NORMS[said['norm']]}; {_AGGS[said['agg']]}. "
        f"Codebook {said['codebook']}. Intervals: {said['interval']}.",
        f"Drawn: {ranges or 'see the families'}. Noises: {html.escape(said['noise'])}; signal-to-noise ratios are "
        f"{said['snr']}.",
        f"Floor: {said['floor']['pad']} (pad), {said['floor']['delay']} (delay). Chance: {said['chance']}. "
        "Units are collapsed where their entropy is below half of what the vocabulary allows.",
    ]
    if reverb:
        notes.insert(3, f"Reverberation: {html.escape(said['rir'])}. Its direct sound stays in place.")
    if curves:
        notes.append(
            f"Curves: {said['curve_files']} of the files, rooms are {said['curve_rooms']}; bands are 95 % intervals, "
            "shaded strengths are those that are drawn in the table."
        )
    if any("complexity" in one for one in result["tokenizers"].values()):
        notes.append(
            f"Augmentation complexity: {said['complexity']}; log2 of the 99th percentile of K(x, x). More is better: "
            "utterances stay apart. Values with &ge; are saturated, near the log2 of the number of files, and say no "
            "more than &ldquo;at least&rdquo;."
        )
    if result["failed"]:
        notes.append(f"{len(result['failed'])} files could not be measured and count for no tokenizer.")
    return notes


_FRAME = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Units under augmentation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; }
small { color: #666; } img { max-width: 100%; } li { margin: .3rem 0; } .wide { overflow-x: auto; }
</style></head><body>
BODY
</body></html>
"""
_NORMS = {
    "dedup_ref": "the runs of the clean sequence",
    "frames": "the frames of the clean sequence",
    "max_len": "the runs of the longer sequence",
}
_AGGS = {"mean": "mean of the ratios of utterances", "pooled": "edits and lengths pooled over utterances"}


def _bits(found: dict[str, Any]) -> str:
    return ("&ge; " if found["saturated"] else "") + _with_interval(found["bits"], found["ci"], 2)


def _most_bits(figures: dict[str, Any]) -> float:
    return float(figures["complexity"]["units"]["most_bits"])


def _with_interval(value: float, ends: Sequence[float], digits: int = 1) -> str:
    return f"{value:.{digits}f} <small>[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]</small>"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table; names of tokenizers are escaped, other cells are made here."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
