"""``speechtok show``."""

from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT_TOKENIZER, Device, Json, TokenizerName, print_table, write_json


def show(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A sound file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The picture; default FILE's name with .png, here.")
    ] = None,
    tokenizer: TokenizerName = DEFAULT_TOKENIZER,
    start: Annotated[float, typer.Option(min=0, help="First second to draw.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=0.05, help="How much to draw.")] = 5.0,
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Draw one file: waveform, spectrogram and units as a PNG, and list the units."""
    import speechtok
    from speechtok.evaluation.show import draw

    out = out or Path(source.stem + ".png")
    loaded = speechtok.load(tokenizer, device=device)
    facts, runs = draw(source, loaded, out, start=start, seconds=seconds)
    kind = "runs" if loaded.segmenter is None else "segments"
    write_json(json_file, facts | {kind: runs})
    print_table(str(source), ["", ""], [[key, value] for key, value in facts.items()])
    print_table(
        f"units from {start:g} s", ["start (s)", "end (s)", "unit", "frames"], [list(run.values()) for run in runs[:20]]
    )
    if len(runs) > 20:
        more = "runs of equal units" if kind == "runs" else "segments"
        typer.echo(f"... and {len(runs) - 20} more {more}; --json FILE writes them all")
    typer.echo(str(out))
