"""The report of `speechtok.evaluation.invariance`: a picture of the curves, and a page with all figures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechtok.errors import OutputError

__all__ = ["draw", "write_report"]

_AXES = {
    "noise": "signal-to-noise ratio (dB)",
    "stretch": "speed",
    "reverb": "reverberation time RT60 (s)",
    "pitch": "shift (semitones)",
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
_MARKERS = "osD^v<>"


def draw(result: dict[str, Any], target: Path | io.BytesIO) -> bool:
    """Draw edit distance against strength, a panel for each family; False if there are no curves.

    Parameters
    ----------
    result : dict
        Of `speechtok.evaluation.invariance.evaluate`.
    target : Path or BytesIO
        Gets a PNG.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokenizers = result["tokenizers"]
    families = list(next(iter(tokenizers.values()))["curves"])
    if not families:
        return False
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
            low, high = zip(*curve["ued_ci"], strict=True)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(
                curve["strength"], curve["ued"], label=name, color=colour, marker=_MARKERS[index % len(_MARKERS)],
                markersize=4, linewidth=1.4,
            )  # fmt: skip
            axes.fill_between(curve["strength"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(family)
        axes.set_xlabel(_AXES.get(family, "strength"))
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        if place % columns == 0:
            axes.set_ylabel("unit edit distance (%)")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    try:
        figure.savefig(target, dpi=130, format="png")
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror})") from error
    return True


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
    picture = io.BytesIO()
    drawn = draw(result, picture)
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if drawn:
            (folder / "ued.png").write_bytes(picture.getvalue())
        page.write_text(_page(result, base64.b64encode(picture.getvalue()).decode() if drawn else ""))
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written ({error.strerror})") from error
    return page


def _page(result: dict[str, Any], picture: str) -> str:
    tokenizers, said = result["tokenizers"], result["conventions"]
    families = said["families"]
    steady = [
        [
            name,
            *(_with_interval(one["ued"][f], one["ued_ci"][f]) for f in families),
            _rounded(one["floor"]["pad"]), _rounded(one["floor"]["delay"]), _rounded(one["chance"]),
        ]
        for name, one in tokenizers.items()
    ]  # fmt: skip
    use = [
        [
            name, f"{one['units_per_second']:.1f}", f"{one['runs_per_second']:.1f}",
            f"{one['vocab_used']} of {one['vocab_size']}", f"{one['perplexity']:.0f}",
            *(f"{one['edits_per_second'][f]:.1f}" for f in families), "collapsed" if one["collapsed"] else "",
        ]
        for name, one in tokenizers.items()
    ]  # fmt: skip
    ranges = "; ".join(
        f"{family}: {one['low']:g} to {one['high']:g} {one['unit']}" for family, one in said["ranges"].items()
    )
    apart = [
        [name, *(_with_interval(*_bits(one["complexity"][part])) for part in ("units", "frames"))]
        for name, one in tokenizers.items() if "complexity" in one
    ]  # fmt: skip
    notes = [
        f"{result['files']} files of {html.escape(result['data'])}, one draw for each file and family, "
        f"seed {said['seed']}; every tokenizer hears the same sounds.",
        f"Distance: Levenshtein between runs of units, divided by {_NORMS[said['norm']]}; {_AGGS[said['agg']]}. "
        f"Intervals: {said['interval']}.",
        f"Drawn uniformly: {ranges}. Measured room responses, where they are used, have the reverberation that they "
        f"have. Signal-to-noise ratios are {said['snr']}.",
        f"Floor: {said['floor']['pad']} (pad), {said['floor']['delay']} (delay). Chance: {said['chance']}. "
        "Units are collapsed where their entropy is below half of what the vocabulary allows.",
    ]
    if picture:
        notes.append(f"Curves: {said['curve_files']} of the files; rooms are simulated; bands are 95 % intervals.")
    if apart:
        notes.append(
            f"Augmentation complexity: {said['complexity']}; log2 of the 99th percentile of K(x, x), at most "
            f"{next(iter(tokenizers.values()))['complexity']['units']['most_bits']:.1f} bits, where it says no more "
            "than at least. More is better: utterances stay apart."
        )
    if result["failed"]:
        notes.append(f"{len(result['failed'])} files could not be measured.")
    image = f'<img alt="unit edit distance against strength" src="data:image/png;base64,{picture}">' if picture else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Units under augmentation</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }} thead th {{ border-bottom: 2px solid #444; }}
small {{ color: #666; }} img {{ max-width: 100%; }} li {{ margin: .3rem 0; }} .wide {{ overflow-x: auto; }}
</style></head><body>
<h1>Units under augmentation</h1>
<h2>Unit edit distance (%)</h2>
{_table(["tokenizer", *families, "floor: pad", "floor: delay", "chance"], steady)}
{image}
<h2>What stands beside it</h2>
{
        _table(
            [
                "tokenizer",
                "units/s",
                "runs/s",
                "vocabulary used",
                "perplexity",
                *(f"edits/s: {f}" for f in families),
                "",
            ],
            use,
        )
    }
{"<h2>Augmentation complexity (bits)</h2>" + _table(["tokenizer", "units", "frames"], apart) if apart else ""}
<h2>Conventions</h2>
<ul>{"".join(f"<li>{note}</li>" for note in notes)}</ul>
</body></html>
"""


_NORMS = {
    "dedup_ref": "the runs of the clean sequence",
    "frames": "the frames of the clean sequence",
    "max_len": "the runs of the longer sequence",
}
_AGGS = {"mean": "mean of the ratios of utterances", "pooled": "edits and lengths pooled over utterances"}


def _bits(found: dict[str, Any]) -> tuple[float, Sequence[float]]:
    return found["bits"], found["ci"]


def _with_interval(value: float, ends: Sequence[float]) -> str:
    return f"{value:.1f} <small>[{ends[0]:.1f}, {ends[1]:.1f}]</small>"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table; names of tokenizers are escaped, other cells are made here."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
