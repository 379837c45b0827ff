"""Card of a tokenizer of syllables: what it was made of, what was measured against what, where it ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechtok.errors import FormatError
from speechtok.evaluation import boundaries
from speechtok.evaluation.cutters import PUBLISHED, PUBLISHED_SOURCE
from speechtok.segmenters.greedy import Greedy
from speechtok.tokenizer import Tokenizer
from speechtok.training.cards import (
    GROUPS,
    Corpus,
    Origin,
    describe_data,
    describe_encoder,
    frame_delay,
    markdown_table,
    number,
    weights_size,
)
from speechtok.training.layers import pooled

__all__ = ["write_card"]

_RATIOS = ("precision", "recall", "f1", "over_segmentation", "r_value")
_PURITIES = ("syllable_purity", "cluster_purity", "snmi")
_TITLES = [
    "precision", "recall", "F1", "over-segmentation", "R", "F1, ZeroSyl", "R, ZeroSyl", "F1 of whole segments",
    "syllable purity (chance)", "cluster purity (chance)", "SNMI (chance)",
]  # fmt: skip


def write_card(
    folder: Path,
    syllables: Path,
    continua: Path,
    data: Sequence[Corpus],
    command: str,
    origin: Origin,
    tried: Sequence[dict[str, Any]],
) -> Path:
    """Write ``README.md`` of a tokenizer of syllables.

    Parameters
    ----------
    folder : Path
        A bundle with a greedy segmenter and silence units.
    syllables, continua : Path
        JSON files of ``speechtok evaluate syllables`` and ``speechtok evaluate continua``; their first rows are those
        of this tokenizer, and its thresholds and shift were chosen on other speech.
    data : sequence of Corpus
        Training sound.
    command : str
        That makes it.
    origin : Origin
        Of the encoder.
    tried : sequence of dict
        What the thresholds were chosen from, see `speechtok.evaluation.boundaries.choose`.

    Raises
    ------
    FormatError
        If the files hold something else, or the figures are those of another tokenizer.
    """
    tokenizer = Tokenizer.load(folder)
    try:
        rows, perception = json.loads(syllables.read_text()), json.loads(continua.read_text())
        own, fingerprint = rows[0], rows[0]["facts"]["fingerprint"]
        if perception[0]["tokenizer"] != tokenizer.name:
            raise ValueError(f"the first row is that of {perception[0]['tokenizer']}")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise FormatError(f"{syllables}, {continua}: no tables of {folder} ({error!r}); make them anew") from error
    if fingerprint != tokenizer.fingerprint:
        raise FormatError(f"{folder}: the table was made with {fingerprint}; make it anew")
    parts = [
        f"# {tokenizer.name}",
        _intro(tokenizer),
        _facts(tokenizer, folder, own),
        "## Data",
        describe_data(data, (folder / "CREDITS.md").exists()),
        "## Recipe",
        _recipe(tokenizer, origin, command, tried),
        "## Measured quality",
        _measured(rows),
        _perception(perception),
        "## Limits",
        _limits(data),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _pause(tokenizer: Tokenizer) -> str:
    assert tokenizer.silence_gap is not None  # noqa: S101 - for the type checker
    return f"{tokenizer.silence_gap / tokenizer.encoder.grid.rate * 1000:.0f} ms"


def _closed(tokenizer: Tokenizer) -> str:
    assert isinstance(tokenizer.segmenter, Greedy)  # noqa: S101 - for the type checker
    return f"{tokenizer.segmenter.close_gap / tokenizer.encoder.grid.rate * 1000:.0f} ms"


def _intro(tokenizer: Tokenizer) -> str:
    return (
        "Segments about as long as syllables, one unit each, with start and end times. A small encoder was taught by "
        "self-segmentation distillation (Sylber, Cho et al. 2025, arXiv:2410.07168): the frames of a syllable point "
        "the same way, and their length (0 to 1) says whether there is one; it falls in silence and where a syllable "
        "begins. Runs of frames that are long enough and alike are segments; those that are at most "
        f"{_closed(tokenizer)} apart meet in the middle. The unit of each is the nearest of "
        f"{tokenizer.quantizer.vocab_size:,} spherical k-means "
        f"clusters to its mean. A pause of more than {_pause(tokenizer)} before a segment is one silence unit."
    )


def _facts(tokenizer: Tokenizer, folder: Path, own: dict[str, Any]) -> str:
    figures, delay = pooled(own), frame_delay(tokenizer)
    cost = figures["units"]["cost"]
    stream = "frames depend on the whole utterance"
    if delay is not None:
        stream = (
            f"exact; frames have {delay * 1000:.0f} ms of delay at most, and a segment waits until silence follows or "
            "the next one has ended"
        )
    rows = [
        (
            "units per second",
            f"{cost['tokens_per_second']:.2f} ({figures['segments_per_second']:.2f} segments, the others silence)",
        ),
        ("vocabulary", f"{tokenizer.vocab_size}, the last of them silence"),
        (
            "bit/s without times",
            f"{cost['nominal_bitrate']:.0f} nominal, {cost['entropy_bitrate']:.0f} by the entropy of units",
        ),
        (
            "bit/s with times",
            f"{cost['entropy_bitrate_with_timing']:.0f} by the entropy of units, durations and gaps coded together, "
            f"{cost['entropy_bitrate_and_timing']:.0f} apart (in steps of "
            f"{own['conventions']['timing_step'] * 1000:.0f} ms)",
        ),
        ("streams", stream),
        ("size of the weights", weights_size(folder)),
        ("licence of the weights", tokenizer.licence),
        ("fingerprint", f"`{tokenizer.fingerprint}`"),
    ]
    return f"{markdown_table(['', ''], rows)}\n\nRates are those of the evaluation split, pauses included."


def _recipe(tokenizer: Tokenizer, origin: Origin, command: str, tried: Sequence[dict[str, Any]]) -> str:
    fit, segmenter = tokenizer.training, tokenizer.segmenter
    assert isinstance(segmenter, Greedy)  # noqa: S101 - for the type checker
    parts = [
        "The encoder begins with input statistics and first blocks of that of "
        "[w2vbert-mini](../w2vbert-mini/README.md), which is also the first teacher. Segments come from loudness at "
        "first (`energy-onsets` below), in the second stage from what the student has become, the next teacher; "
        + (
            "directions stay those of the first one throughout. "
            if origin.config.get("objective", {}).get("anchored")
            else "so do directions. "
        )
        + "A teacher stays as it is until it is replaced. What the student reads is mixed and perturbed, what the "
        "teacher reads is not.",
        describe_encoder(origin),
        f"Clusters: of {fit['segments seen']:,} segments a uniform sample of {fit['segments sampled']:,}, "
        f"{fit['iterations']} iterations, best of {fit['restarts']} starts, seed {fit['seed']}; {fit['dead clusters']} "
        f"dead clusters, perplexity {fit['perplexity']:.1f} on the sample.",
        f"To make it again: `{command}`.",
    ]
    if origin.curves:
        parts.append(f"![loss and held-out figures over the steps]({origin.curves})")
    found = {(one["setting"]["norm_threshold"], one["setting"]["merge_threshold"]): one for one in tried}
    norms, merges = (sorted({key[side] for key in found}) for side in (0, 1))
    chosen = segmenter.norm_threshold, segmenter.merge_threshold
    cells = [
        [f"{norm:g}", *(_cell(found[norm, merge]["r_value"], (norm, merge) == chosen) for merge in merges)]
        for norm in norms
    ]
    parts += [
        f"Thresholds: length {chosen[0]:g}, cosine {chosen[1]:g}{' (off)' if chosen[1] <= -1 else ''}. They give the "
        f"best R-value on the dev split ({100 * found[chosen]['r_value']:.1f}, with "
        f"{found[chosen]['segments_per_second']:.2f} segments per second) among the settings with "
        f"{boundaries.RATES[0]:g} to {boundaries.RATES[1]:g} segments per second. R-values (%) by length (rows) and "
        "cosine (columns):",
        markdown_table(["", *(f"{merge:g}" for merge in merges)], cells),
        "No weight and no cluster has learned from alignments. Those of the dev split chose the two thresholds, the "
        "constants of the seeds (`EnergySeeds`) and of the recipe and, for the tables below, the shift of boundaries.",
    ]
    return "\n\n".join(parts)


def _cell(value: float | None, chosen: bool) -> str:
    mark = "**" if chosen else ""
    return f"{mark}{number(None if value is None else 100 * value, 1)}{mark}"


def _percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, 1)


def _measured(rows: Sequence[dict[str, Any]]) -> str:
    own = rows[0]
    conventions, units = own["conventions"], pooled(own)["units"]["iou"]
    cells = []
    for row in rows:
        for group, found in row["groups"].items():
            said = found["units"]["iou"] if found["units"] else {}
            cells.append([
                row["tokenizer"], GROUPS.get(group, group), number(found["segments_per_second"], 2),
                *(_percent(found["sdhubert"][name]) for name in _RATIOS),
                *(_percent(found["zerosyl"][name]) for name in ("f1", "r_value")), _percent(found["intervals"]["f1"]),
                *(f"{_percent(said[x])} ({_percent(said[f'{x}_chance'])})" if said else "-" for x in _PURITIES),
            ])  # fmt: skip
    other = PUBLISHED["Sylber, greedy"]
    cells.append([
        "*Sylber, as published*", "*other data*", f"*{other['tokens_per_second']:.2f}*",
        *(f"*{other[name]:.1f}*" if name in other else "-" for name in _RATIOS), "-", "-", "-",
        *(f"*{other[name]:.1f}*" for name in _PURITIES),
    ])  # fmt: skip
    return "\n\n".join([
        "Evaluation split: speakers that no training has seen. All choices were made on the dev split but one: that "
        "directions stay those of the first teacher was chosen by purities on this split. Reference syllables are made "
        f"by rule ({conventions['syllables']}) from a forced aligner: good enough to rank rows, no gold standard. "
        f"Starts of segments within {1000 * conventions['tolerance']:.0f} ms of a boundary count as hits, silence "
        f"units are left out; a shift of the boundaries was chosen for each row by the {conventions['shift_from']} "
        f"speech (this tokenizer: {1000 * conventions['shift']['sdhubert']:.1f} ms). Thresholds of `+greedy`, "
        "`+min-cut` and `energy` were chosen there too, as above. "
        "Purities and SNMI are of segments that are matched to syllables by "
        "overlap (Hungarian, intersection over union); all in %.",
        markdown_table(["cut by", "speech", "segments/s", *_TITLES], cells),
        "ZeroSyl's protocol: starts and the last end, within stretches of speech. Whole segments: both edges count.",
        "`+greedy`, `+min-cut`: frames of that tokenizer's encoder, cut by the segmenter; `uniform`: equal pieces at "
        "this tokenizer's rate; `energy`: between dips of loudness; `energy-onsets`: the seeds of the training. "
        "What may be compared: rows of this table with each other, within one kind of speech. The published row is of "
        f"{PUBLISHED_SOURCE.removeprefix('Cho et al. 2025, arXiv 2410.07168: ')}, and none of its columns may be held "
        "against the others directly. Purities and SNMI depend on the vocabulary and on how much was measured: here "
        f"{units['pairs']:,} pairs of {units['types']:,} types of syllables and {units['units_used']:,} units in all "
        "speech; in brackets what the same units in random order give.",
    ])  # fmt: skip


def _perception(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        for kind in ("synthetic", "morphed"):
            if row[kind] is not None:
                values = [row[kind][name] for name in ("cosine", "distance")]
                found = [f"{value['mean']:.3f} ± {number(value['standard_error'], 3)}" for value in values]
                cells.append([row["tokenizer"], row["vector"], kind, row[kind]["continua"], *found])
    return (
        "Categorical perception: discriminability index over continua in equal steps between two syllables, 0 where "
        "the vector of a sound flips at once (lower is more categorical). Cosines are near "
        "their ceiling of 0.5. By distance no row stands out from plain log mel and MFCC by more than a few standard "
        "errors: this does not show that these units are heard in categories. None of it can be held against published "
        "figures.\n\n"
    ) + markdown_table(["of", "vector", "continua", "number", "by cosine", "by distance"], cells)


def _limits(data: Sequence[Corpus]) -> str:
    hours = sum(corpus.hours for corpus in data)
    learners = sum(corpus.hours for corpus in data if corpus.name == "speechocean762")
    return (
        "This is a small model from little speech, meant for study, tests and small devices; the published one has "
        "heard 960 h. Segments are of the size of syllables, not syllables: recall and over-segmentation show how many "
        "are joined or split. There is no way back from units to sound here. It has heard "
        f"{hours:.1f} h of read English (see Data), {100 * learners / hours:.0f} % of it by learners; other languages, "
        "music and spontaneous speech were neither trained on nor measured here."
    )
