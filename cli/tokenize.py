"""``speechtok tokenize``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEFAULT_TOKENIZER,
    Device,
    Json,
    Log,
    LogMode,
    TokenizerName,
    peak_megabytes,
    print_table,
    progress,
    write_json,
)


def tokenize(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Folder, sound file, glob, .tsv, .scp, .jsonl, .parquet or .tar.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")],
    tokenizer: TokenizerName = DEFAULT_TOKENIZER,
    codebooks: Annotated[
        int | None, typer.Option(min=1, help="Of a codec, use the first so many codebooks (default: all).")
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", "-f", help="parquet, jsonl, km, textless, slamkit, npy, webdataset or kaldi.")
    ] = "parquet",
    workers: Annotated[int, typer.Option(min=1, help="Processes (one per GPU, or a few on CPU).")] = 1,
    device: Device = "cpu",
    rank: Annotated[
        int | None, typer.Option(help="This machine's share of the job; default from Slurm or torchrun.")
    ] = None,
    world: Annotated[int | None, typer.Option(help="Number of shares.")] = None,
    batch_seconds: Annotated[float, typer.Option(help="Padded audio per batch; never changes the units.")] = 60.0,
    shard_seconds: Annotated[
        float | None, typer.Option(help="Audio per shard and output part; default from the job's size.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another job's output.")] = False,
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """Turn a folder of sound into units on disk. Run the same command again to go on after an interruption."""
    from speechtok.corpus import engine

    with progress(log) as tell:
        summary = engine.tokenize(
            source, out, tokenizer=tokenizer, codebooks=codebooks, output_format=output_format, workers=workers,
            device=device, rank=rank, world=world,
            batch_seconds=batch_seconds, shard_seconds=shard_seconds, overwrite=overwrite, on_event=tell,
        )  # fmt: skip
    speed = summary.audio_seconds / summary.wall_seconds if summary.wall_seconds else 0.0
    result = asdict(summary) | {
        "audio_seconds_per_second": round(speed, 1),
        "peak_megabytes": round(peak_megabytes(), 1),
    }
    write_json(json_file, result)
    if log is not LogMode.quiet:
        share = f"rank {summary.rank} of {summary.world}: " if summary.world > 1 else ""
        state = str(out) if summary.complete else f"{out} (waiting for the shards of other ranks)"
        rows: list[list[object]] = [
            ["tokenizer", tokenizer],
            ["files with units", f"{share if not summary.complete else ''}{summary.files:,}"],
            [
                "files that failed",
                f"{summary.failed:,}" + (f"  (see {out / 'errors.jsonl'})" if summary.failed else ""),
            ],
            ["files ignored (no audio)", f"{summary.ignored:,}"],
            [
                "audio encoded now",
                f"{summary.audio_seconds:,.1f} s in {summary.wall_seconds:,.1f} s = {speed:,.0f} audio-s/s",
            ],
            [
                "shards",
                f"{summary.shards} ({summary.resumed} done before)"
                if summary.shards
                else "complete before, nothing to do",
            ],
            ["peak memory", f"{result['peak_megabytes']:,.0f} MB"],
            ["output", state],
        ]
        print_table("speechtok tokenize", ["", ""], rows)
    if summary.failed:
        raise typer.Exit(3)
