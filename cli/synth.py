"""``speechtok synth``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Json, Log, LogMode, peak_megabytes, print_table, progress, write_json


def synth(
    source: Annotated[Path, typer.Argument(metavar="UNITS", help="Output folder of `speechtok tokenize`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the wav files.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", metavar="NAME", help="The codec, if its name in UNITS does not lead to it."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes (one per GPU, or a few on CPU).")] = 1,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another job's output.")] = False,
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """Turn units of a codec back into sound: a wav file for each row. Run again to go on after an interruption."""
    from speechtok.corpus.synthesis import synthesize

    with progress(log) as tell:
        summary = synthesize(
            source, out, tokenizer=tokenizer, workers=workers, device=device, overwrite=overwrite, on_event=tell
        )
    speed = summary.audio_seconds / summary.wall_seconds if summary.wall_seconds else 0.0
    result = asdict(summary) | {
        "audio_seconds_per_second": round(speed, 1),
        "peak_megabytes": round(peak_megabytes(), 1),
    }
    write_json(json_file, result)
    if log is not LogMode.quiet:
        failed = f"  (see {out / 'errors.jsonl'})" if summary.failed else ""
        rows: list[list[object]] = [
            ["tokenizer", summary.tokenizer],
            ["wav files", f"{summary.files:,}" + (f" ({summary.resumed:,} done before)" if summary.resumed else "")],
            ["rows that failed", f"{summary.failed:,}{failed}"],
            [
                "audio decoded now",
                f"{summary.audio_seconds:,.1f} s in {summary.wall_seconds:,.1f} s = {speed:,.0f} audio-s/s",
            ],
            ["peak memory", f"{result['peak_megabytes']:,.0f} MB"],
            ["output", str(out)],
        ]
        print_table("speechtok synth", ["", ""], rows)
    if summary.failed:
        raise typer.Exit(3)
