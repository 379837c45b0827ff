"""``speechtok evaluate``: tokenizers measured on aligned speech, on continua, and by probes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    DEFAULT_TOKENIZER,
    Agg,
    AggChoice,
    Device,
    Json,
    Limit,
    Log,
    LogMode,
    Norm,
    NormChoice,
    Tokenizers,
    print_table,
    progress,
    write_json,
)
from .evaluate_codec import codec
from .evaluate_invariance import invariance
from .evaluate_probe import probe

__all__ = ["evaluate"]

evaluate = typer.Typer(
    help="Measure tokenizers on aligned speech, on continua, by probes, and codecs by their sound.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Holds sound files, metadata.jsonl and alignments.jsonl.")
]
Shift = Annotated[
    int, typer.Option("--shift-frames", help="Frame i takes the label at the centre of frame i + this many.")
]


class Representation(StrEnum):
    """What is compared."""

    frames = "frames"
    units = "units"


class Condition(StrEnum):
    """Who says X."""

    within = "within"
    across = "across"


class Distance(StrEnum):
    """Of two frames."""

    angular = "angular"
    euclidean = "euclidean"
    symmetric_kl = "symmetric_kl"
    identical = "identical"


class Slicing(StrEnum):
    """Which frames belong to a phone."""

    inclusive = "inclusive"
    librilight = "librilight"


@evaluate.command()
def units(
    folder: Folder,
    tokenizer: Tokenizers = None,
    augment_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Holds noise/ and rir/: also measure edit distances under augmentation."),
    ] = None,
    augment_split: Annotated[str, typer.Option(help="Split of its noises and rooms.")] = "test",
    norm: NormChoice = Norm.dedup_ref,
    agg: AggChoice = Agg.mean,
    shift: Shift = 0,
    codebook: Annotated[int, typer.Option(min=0, help="The one that is compared with phones.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the augmentations.")] = 0,
    limit_files: Limit = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """Phones in units (PNMI, purity), codebook use, bitrate, and edit distance under augmentation."""
    import speechtok
    from speechtok.evaluation.units import evaluate as run

    results = []
    for name in tokenizer or [DEFAULT_TOKENIZER]:
        with progress(log) as tell:
            results.append(
                run(
                    folder, speechtok.load(name, device=device), shift=shift, codebook=codebook,
                    augment_data=augment_data, augment_split=augment_split, seed=seed, norm=norm.value, agg=agg.value,
                    limit_files=limit_files, on_event=tell,
                )
            )  # fmt: skip
    write_json(json_file, results)
    _tell_left_out(results)
    if log is not LogMode.quiet:
        _show_units(str(folder), results)


def _tell_left_out(results: list[dict[str, Any]]) -> None:
    for result in results:
        for group, reason in result["left_out"].items():
            typer.echo(f"{result['tokenizer']}: {group} speech is left out: {reason}", err=True)


def _show_units(folder: str, results: list[dict[str, Any]]) -> None:
    phones: list[list[Any]] = []
    costs: list[list[Any]] = []
    edits: list[list[Any]] = []
    for result in results:
        for group, figures in result["groups"].items():
            row = [result["tokenizer"], group]
            for silence in ("without", "with"):
                found = figures[f"{silence}_silence"]
                phones.append([*row, silence, found["frames"]])
                names = (
                    "pnmi", "pnmi_miller_madow", "phone_purity", "cluster_purity", "conditional_entropy_nats",
                    "speaker_leakage_miller_madow",
                )  # fmt: skip
                phones[-1] += [round(found[name], 4) if name in found else "" for name in names]
            use, cost = figures["codebook"], figures["bitrate"]
            names = (
                "units_per_second", "runs_per_second", "nominal_bitrate", "entropy_bitrate", "entropy_bitrate_runs",
                "entropy_bitrate_runs_and_durations",
            )  # fmt: skip
            costs.append([*row, round(figures["seconds"], 1), use["units_used"], use["usage"], use["dead_codes"]])
            costs[-1] += [round(use["perplexity"], 1)]
            costs[-1] += [round(cost[name], 2) if name in cost else "" for name in names]
            if figures["ued"]:
                edits.append([*row, *(round(found["ued"], 2) for found in figures["ued"].values())])
    conventions = results[0]["conventions"]
    print_table(
        f"Units and phones on {folder} (labels shifted by {conventions['shift_frames']} frames)",
        [
            "tokenizer", "speech", "silence", "frames", "PNMI", "PNMI (MM)", "phone purity", "cluster purity",
            "H(unit|phone)", "speaker leakage (MM)",
        ],
        phones,
    )  # fmt: skip
    print_table(
        "Codebook (all frames) and cost",
        [
            "tokenizer", "speech", "seconds", "used", "p>1/10K", "dead", "perplexity", "units/s", "runs/s",
            "nominal bit/s", "entropy bit/s", "of runs", "+durations",
        ],
        costs,
    )  # fmt: skip
    if edits:
        chosen = conventions["ued"]
        print_table(
            f"Unit edit distance in % (norm {chosen['norm']}, agg {chosen['agg']}, seed {chosen['seed']})",
            ["tokenizer", "speech", *chosen["families"]],
            edits,
        )


@evaluate.command()
def abx(
    folder: Folder,
    tokenizer: Tokenizers = None,
    representation: Annotated[
        list[Representation] | None, typer.Option("--representation", "-r", help="May be repeated; default both.")
    ] = None,
    condition: Annotated[list[Condition] | None, typer.Option(help="May be repeated; default both.")] = None,
    distance: Annotated[Distance | None, typer.Option(help="Of frames; default angular, for units identical.")] = None,
    slicing: Annotated[
        Slicing, typer.Option(help="librilight drops the last frame of each phone, as published figures do.")
    ] = Slicing.inclusive,
    shift: Shift = 0,
    items_per_cell: Annotated[int, typer.Option(min=0, help="Items of a phone, context and speaker; 0: all.")] = 10,
    x_speakers: Annotated[int, typer.Option(min=0, help="X speakers per A, B and context; 0: all.")] = 5,
    seed: Annotated[int, typer.Option(help="Of this subsampling.")] = 0,
    limit_files: Limit = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """ABX error of phones between equal neighbours, within and across speakers."""
    import speechtok
    from speechtok.evaluation.abx import check
    from speechtok.evaluation.abx import evaluate as run

    conditions: list[Literal["within", "across"]] = [one.value for one in condition or Condition]
    results = []
    for name in tokenizer or [DEFAULT_TOKENIZER]:
        loaded = speechtok.load(name, device=device)
        for kind in representation or Representation:
            check(loaded, kind.value)  # all of them before the first is computed
        for kind in representation or Representation:
            with progress(log) as tell:
                results.append(
                    run(
                        folder, loaded, representation=kind.value, conditions=conditions,
                        distance=None if distance is None else distance.value, slicing=slicing.value, shift=shift,
                        items_per_cell=items_per_cell or None, x_speakers=x_speakers or None, seed=seed,
                        limit_files=limit_files, on_event=tell,
                    )
                )  # fmt: skip
    write_json(json_file, results)
    _tell_left_out(results)
    if log is LogMode.quiet:
        return
    rows: list[list[Any]] = []
    for result in results:
        for group, figures in result["groups"].items():
            rows.append([result["tokenizer"], result["representation"], result["conventions"]["distance"], group])
            rows[-1] += [figures["items"]]
            for one in conditions:
                found = figures[one]
                rows[-1] += ["-" if found["error"] is None else round(found["error"], 2), found["cells"]]
    print_table(
        f"ABX error in % on {folder} ({slicing.value} slicing, labels shifted by {shift} frames, at most "
        f"{items_per_cell or 'all'} items per cell and {x_speakers or 'all'} X speakers, seed {seed})",
        ["tokenizer", "of", "distance", "speech", "items", *(x for one in conditions for x in (one, "cells"))],
        rows,
    )


@evaluate.command()
def syllables(
    folder: Folder,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            "--tokenizer", "-t", metavar="NAME",
            help="A tokenizer with a segmenter; or NAME+greedy, NAME+min-cut, NAME+norm-peaks, to cut the frames of "
            "the encoder of a tokenizer, of an encoder folder or of a published encoder (ENCODER:LAYER+greedy for "
            "another layer than the last) by that segmenter, with thresholds from --dev. May be repeated.",
        ),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Aligned speech of others, on which thresholds and shifts are chosen."),
    ] = None,
    shift_ms: Annotated[
        float | None,
        typer.Option(help="Added to all reference boundaries; default the best R on --dev, 0 without --dev."),
    ] = None,
    tolerance_ms: Annotated[
        float, typer.Option(min=0, help="Of boundaries; 50 for syllables, phones and words are measured at 20.")
    ] = 50.0,
    silence_starts: Annotated[
        bool, typer.Option("--silence-starts", help="Count silence units as segments in boundaries and intervals.")
    ] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also a grid at the first row's rate, and loudness.")
    ] = True,
    limit_files: Limit = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:  # fmt: skip
    """Segments against syllables: boundaries (F1, R), intervals, what units say (SP, CP, SNMI), and bitrate."""
    from speechtok.evaluation.cutters import compare

    with progress(log) as tell:
        results = compare(
            folder, tokenizer or [], dev=dev, shift=None if shift_ms is None else shift_ms / 1000,
            tolerance=tolerance_ms / 1000, silence_starts=silence_starts, baselines=baselines,
            limit_files=limit_files, device=device, on_event=tell,
        )  # fmt: skip
    write_json(json_file, results)
    _tell_left_out(results)
    if log is not LogMode.quiet:
        _show_syllables(str(folder), tolerance_ms, results)


def _percent(value: float | None) -> float | str:
    return "-" if value is None else round(100 * value, 1)


def _show_syllables(folder: str, tolerance_ms: float, results: list[dict[str, Any]]) -> None:
    from speechtok.evaluation.cutters import PUBLISHED, PUBLISHED_SOURCE

    ratios = ("precision", "recall", "f1", "over_segmentation", "r_value")
    purities = ("syllable_purity", "cluster_purity", "snmi")
    cuts: list[list[Any]] = []
    units: list[list[Any]] = []
    for result in results:
        for group, found in result["groups"].items():
            row = [result["tokenizer"], group]
            cuts.append([*row, round(found["segments_per_second"], 2)])
            cuts[-1] += [_percent(found["sdhubert"][name]) for name in ratios]
            cuts[-1] += [_percent(found[protocol][name]) for protocol in ("zerosyl", "inner") for name in ratios[2::2]]
            cuts[-1] += [_percent(found["intervals"][name]) for name in ratios[:3]]
            if found["units"]:
                said, cost = found["units"]["iou"], found["units"]["cost"]
                units.append([*row, round(cost["tokens_per_second"], 2), result["vocab_size"], said["pairs"]])
                told = (f"{_percent(said[x])} ({_percent(said[f'{x}_chance'])})" for x in purities)
                units[-1] += [said["types"], *told]
                units[-1] += [_percent(found["units"]["overlap"]["snmi"])]
                units[-1] += [
                    round(cost[name], 1)
                    for name in ("nominal_bitrate", "entropy_bitrate", "entropy_bitrate_with_timing")
                ]
    print_table(
        f"Segments and syllables on {folder}, in %, within {tolerance_ms:g} ms (Pr to R: protocol sdhubert)",
        [
            "cut by", "speech", "segments/s", "Pr", "Re", "F1", "OS", "R", "zerosyl F1", "R", "inner F1", "R",
            "interval Pr", "Re", "F1",
        ],
        cuts,
    )  # fmt: skip
    if units:
        print_table(
            "Units and syllables, in % (units in random order), matched by IoU (last SNMI: by longest overlap); cost",
            [
                "cut by", "speech", "tokens/s", "vocabulary", "pairs", "types", "SP", "CP", "SNMI", "SNMI",
                "nominal bit/s", "entropy bit/s", "+durations",
            ],
            units,
        )  # fmt: skip
    titles = {
        "tokens_per_second": "tokens/s", "precision": "Pr", "recall": "Re", "f1": "F1", "r_value": "R",
        "syllable_purity": "SP", "cluster_purity": "CP", "snmi": "SNMI",
    }  # fmt: skip
    print_table(
        f"Published, {PUBLISHED_SOURCE}",
        ["cut by", *titles.values()],
        [[name, *(row.get(title, "-") for title in titles)] for name, row in PUBLISHED.items()],
    )
    for result in results:
        _tell_choice(result)


def _tell_choice(result: dict[str, Any]) -> None:
    """One line on what was chosen for a row, and where."""
    facts, conventions = result["facts"], result["conventions"]
    shifts = ", ".join(f"{name} {1000 * value:g} ms" for name, value in conventions["shift"].items())
    parts = [f"shift {conventions['shift_from']}: {shifts}"]
    if "setting" in facts:
        told = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in facts["setting"].items()
        )
        chosen = facts.get("chosen_on")
        parts.insert(0, told if chosen is None else f"{told} (best of {facts['settings_tried']} on {chosen})")
    typer.echo(f"{result['tokenizer']}: {'; '.join(parts)}")


@evaluate.command()
def continua(
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            "--tokenizer", "-t", metavar="NAME",
            help="A tokenizer, or an encoder folder or published encoder (ENCODER:LAYER for another layer than the "
            "last). May be repeated.",
        ),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Aligned speech: also morphs between two words of one speaker."),
    ] = None,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Also log mel and MFCC.")] = True,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use at most this many continua of a kind, evenly spread.")
    ] = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:  # fmt: skip
    """Categorical perception: how sharply the mean frame flips between two syllables (0: at once)."""
    from speechtok.evaluation.categorical import PUBLISHED, compare

    with progress(log) as tell:
        results = compare(
            tokenizer or [], words=words, baselines=baselines, limit=limit, device=device, on_event=tell
        )  # fmt: skip
    write_json(json_file, results)
    if log is LogMode.quiet:
        return
    rows: list[list[Any]] = []
    for result in results:
        for kind in ("synthetic", "morphed"):
            found = result[kind]
            if found:
                rows.append([result["tokenizer"], result["vector"], kind, found["continua"], found["same"]])
                for name in ("cosine", "distance"):
                    error = found[name]["standard_error"]
                    rows[-1] += [round(found[name]["mean"], 4), "-" if error is None else round(error, 4)]
        if result["unvoiced"]:
            typer.echo(
                f"{result['tokenizer']}: {result['unvoiced']} sounds have no segment; all frames count", err=True
            )
    print_table(
        "Discriminability index (lower is more categorical; the middle step is left out)",
        ["of", "vector", "continua", "number", "ends alike", "by cosine", "+-", "by distance", "+-"],
        rows,
    )
    told = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
    typer.echo(f"Published, on other continua (arXiv 2410.07168), for their order alone: {told}")


evaluate.command()(invariance)
evaluate.command()(probe)
evaluate.command()(codec)
