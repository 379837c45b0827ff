"""``speechtok evaluate probe``: labels told from frozen features."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import DEFAULT_TOKENIZER, Device, Json, Log, LogMode, print_table, progress, write_json

__all__ = ["probe"]


class Pooling(StrEnum):
    """How the frames of a sound become one vector."""

    mean = "mean"
    mean_std = "mean-std"


def probe(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="A .jsonl manifest with path and labels, or a folder with metadata.jsonl."),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Made for music: pitch_class, octave, instrument_family, excitation, drum_piece, genre, artist. "
            "May be repeated."
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Column to be told, or that the task is made of.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Column whose values are never in training and test at once; default the task's own, or each file.",
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder", "-e", metavar="NAME",
            help="log-mel, cqt or mfcc, a tokenizer (its encoder counts), an encoder folder or a published encoder. "
            f"May be repeated; the first is what others are compared with; default log-mel and {DEFAULT_TOKENIZER}.",
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(min=0, help="Units of a hidden layer; 0: a linear probe.")] = 0,
    layers: Annotated[
        str, typer.Option(help="all, or of encoders with layers some: 0,3,output (what the encoder gives).")
    ] = "all",
    pooling: Annotated[Pooling, typer.Option(help="Over time: the mean, or also the deviation.")] = Pooling.mean,
    folds: Annotated[int, typer.Option(min=2, help="Test folds.")] = 5,
    seed: Annotated[int, typer.Option(help="Of folds, networks and intervals.")] = 0,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:  # fmt: skip
    """Labels told from frozen features of every layer by a small classifier, on sources it was not trained on."""
    from speechtok.evaluation.probe import compare, tasks_of

    chosen = None if layers == "all" else [layer.strip() for layer in layers.split(",")]
    with progress(log) as tell:
        results = compare(
            data, encoder or ["log-mel", DEFAULT_TOKENIZER], tasks_of(task or [], label, group), hidden=hidden,
            layers=chosen, pooling=pooling.value, folds=folds, seed=seed, device=device, on_event=tell,
        )  # fmt: skip
    write_json(json_file, results)
    failed = {path: reason for result in results for path, reason in result["failed"].items()}
    for path, reason in failed.items():
        typer.echo(f"{path} is left out: {reason}", err=True)
    if log is not LogMode.quiet:
        for name in dict.fromkeys(result["task"] for result in results):
            _show_probe([result for result in results if result["task"] == name])


def _show_probe(results: list[dict[str, Any]]) -> None:
    from speechtok.evaluation.probe import with_interval

    about, how = results[0], results[0]["conventions"]
    both = (("accuracy", "interval"), ("balanced_accuracy", "balanced_interval"))
    rows: list[list[Any]] = []
    for result in results:
        for layer, figures in result["layers"].items():
            rows.append([result["tokenizer"], layer, *(with_interval(figures, *one) for one in both), ""])
        figures = result["chosen"]
        rows.append([result["tokenizer"], "chosen: " + ",".join(figures["layer"])])
        rows[-1] += [with_interval(figures, *one) for one in both]
        rows[-1] += [with_interval(figures["difference"], "accuracy", "interval")]
    rows.append(["majority", "", *(with_interval(about["majority"], *one) for one in both), ""])
    print_table(
        f"{about['task']} on {about['data']}, in %: {about['items']} sounds, {about['groups']} groups "
        f"({how['grouped_by']}), {len(about['classes'])} classes, chance {100 * about['chance']:.1f}; {how['probe']}, "
        f"{how['folds']} folds, intervals {how['interval']}",
        ["features", "layer", "accuracy", "balanced accuracy", f"accuracy over {results[0]['tokenizer']}"],
        rows,
    )
    left_out = ", ".join(f"{name} ({found['items']})" for name, found in about["left_out"].items())
    if left_out:
        typer.echo(f"{about['task']}: left out, with their sounds, are classes of one group: {left_out}")
    typer.echo(f"{about['task']}: {about['unlabelled']} sounds have no label, {about['unseen']} a class not trained on")
