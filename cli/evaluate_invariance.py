"""``speechtok evaluate invariance``: units under augmentation."""

from pathlib import Path
from typing import Annotated, Any

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
    Noises,
    Norm,
    NormChoice,
    Rooms,
    Tokenizers,
    print_table,
    progress,
    write_json,
)

__all__ = ["invariance"]


def invariance(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Sound: a folder, manifest or archive; no labels.")],
    tokenizer: Tokenizers = None,
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="stretch, pitch, reverb, noise (the default), gain, resample, codec, band_limit, clip, or several "
            "joined by '+'. May be repeated."
        ),
    ] = None,
    noise: Noises = None,
    rir: Rooms = None,
    split: Annotated[str, typer.Option(help="Of noises and rooms that have a listing: train, valid or test.")] = "test",
    legacy_half_snr: Annotated[
        bool, typer.Option("--legacy-half-snr", help="Halve every signal-to-noise ratio, as published mixers do.")
    ] = False,
    norm: NormChoice = Norm.dedup_ref,
    agg: AggChoice = Agg.mean,
    codebook: Annotated[int, typer.Option(min=0, help="The one that is compared.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    limit_files: Limit = None,
    groups: Annotated[bool, typer.Option("--groups", help="Also each corpus (the first folder) apart.")] = False,
    curve_files: Annotated[int, typer.Option(min=0, help="Files for distances against strength; 0: no curves.")] = 40,
    complexity_files: Annotated[
        int, typer.Option(min=0, help="Files for augmentation complexity, frames and units; 0: none.")
    ] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.html and the plot ued.png into this folder.")
    ] = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """Unit edit distance under stretch, pitch shift, reverberation and noise, with what guards it."""
    import speechtok
    from speechtok.audio.augment import FAMILIES, AugmentResources
    from speechtok.evaluation.invariance import evaluate as run
    from speechtok.evaluation.invariance_report import lines, write_report

    resources = AugmentResources.from_folders(noise, rir, split, legacy_half_snr)
    chosen = [speechtok.load(name, device=device) for name in tokenizer or [DEFAULT_TOKENIZER]]
    with progress(log) as tell:
        result = run(
            folder, chosen, families=family or FAMILIES, resources=resources, seed=seed, norm=norm.value, agg=agg.value,
            codebook=codebook, limit_files=limit_files, groups=groups, curve_files=curve_files,
            complexity_files=complexity_files, on_event=tell,
        )  # fmt: skip
    write_json(json_file, result)
    for path, reason in result["failed"].items():
        typer.echo(f"{path}: {reason}", err=True)
    if log is not LogMode.quiet:
        _show(folder, result, lines(result))
    if report is not None:
        typer.echo(str(write_report(result, report)))
    if result["failed"]:
        raise typer.Exit(3)


def _show(folder: str, result: dict[str, Any], lines: list[tuple[str, dict[str, Any]]]) -> None:
    said = result["conventions"]
    rows = []
    for name, one in lines:
        cells = [
            f"{one['ued'][f]:.1f} [{one['ued_ci'][f][0]:.1f}, {one['ued_ci'][f][1]:.1f}]" for f in said["families"]
        ]
        floor = [round(one["floor"][part], 1) for part in ("pad", "delay")]
        used = f"{one['vocab_used']}/{one['vocab_size']}" + (" collapsed" if one["collapsed"] else "")
        chance = "" if one["chance"] is None else round(one["chance"], 1)
        rows.append([name, *cells, *floor, chance, round(one["units_per_second"], 1), used])
    print_table(
        f"Unit edit distance in % on {folder} (norm {said['norm']}, agg {said['agg']}, seed {said['seed']}, 95 %)",
        ["tokenizer", *said["families"], "pad", "delay", "chance", "units/s", "used"],
        rows,
    )
    if "complexity" in next(iter(result["tokenizers"].values())):
        print_table(
            f"Augmentation complexity in bits ({said['complexity']}); more is better, ! says no more than at least",
            ["tokenizer", "units", "frames", "most"],
            [
                [name, *(_bits(one["complexity"][part]) for part in ("units", "frames")),
                 round(one["complexity"]["units"]["most_bits"], 1)]
                for name, one in result["tokenizers"].items()
            ],
        )  # fmt: skip


def _bits(found: dict[str, Any]) -> str:
    low, high = found["ci"]
    return f"{found['bits']:.2f} [{low:.2f}, {high:.2f}]" + (" !" if found["saturated"] else "")
