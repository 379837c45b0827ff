"""``speechtok convert``."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Output folder of `tokenize` (Parquet or JSONL).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    output_format: Annotated[
        str, typer.Option("--format", "-f", help="parquet, jsonl, km, textless, slamkit, npy, webdataset or kaldi.")
    ],
) -> None:
    """Rewrite units in another format."""
    from speechtok.corpus.convert import convert as run

    for path in run(source, out, output_format)[:20]:
        typer.echo(str(path))
