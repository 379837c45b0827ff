"""``speechtok fit``."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Json, Log, LogMode, print_table, progress, write_json


def fit(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Training sound: folder, manifest or archive, as for tokenize.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new tokenizer; its name is the tokenizer's.")],
    encoder: Annotated[str, typer.Option(help="mfcc, a checkpoint folder or file, or a Hugging Face name.")] = "mfcc",
    layer: Annotated[int | None, typer.Option(help="Index into hidden_states; default the last.")] = None,
    clusters: Annotated[int, typer.Option("--clusters", "-k", min=1, help="Vocabulary.")] = 100,
    standardize: Annotated[bool, typer.Option(help="Scale each dimension to unit variance first.")] = False,
    sample_frames: Annotated[
        int, typer.Option(min=1, help="Frames kept in memory for the fit (a uniform random sample).")
    ] = 1_000_000,
    iterations: Annotated[int, typer.Option(min=1)] = 50,
    restarts: Annotated[int, typer.Option(min=1, help="Best of this many starts.")] = 3,
    seed: Annotated[int, typer.Option()] = 0,
    max_seconds: Annotated[float, typer.Option(help="Longer files are encoded in windows of this length.")] = 30.0,
    context_seconds: Annotated[float, typer.Option(help="Context on both sides of a window.")] = 3.0,
    licence: Annotated[str, typer.Option(help="Of the new tokenizer; goes into its description.")] = "unknown",
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """Fit a k-means tokenizer on a folder and save it as a bundle."""
    from speechtok.encoders.pretrained import from_pretrained
    from speechtok.errors import OutputError
    from speechtok.frames import WindowRule
    from speechtok.training.kmeans import fit as run

    if (out / "tokenizer.json").exists():
        raise OutputError(f"{out} holds a tokenizer already; choose another folder or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of fitting
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}); choose another folder") from error
    with progress(log) as tell:
        tokenizer, report = run(
            source, from_pretrained(encoder, layer), clusters, name=out.resolve().name, standardize=standardize,
            sample_frames=sample_frames, iterations=iterations, restarts=restarts, seed=seed,
            window=WindowRule(max_seconds, context_seconds), licence=licence, device=device,
            on_event=tell,
        )  # fmt: skip
    tokenizer.save(out)
    write_json(json_file, report)
    print_table(f"{tokenizer.name}  {tokenizer.fingerprint}", ["", ""], [[key, value] for key, value in report.items()])
    typer.echo(str(out))
    if report["files failed"]:
        raise typer.Exit(3)
