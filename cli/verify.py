"""``speechtok verify``."""

from typing import Annotated

import typer

from .common import DEFAULT_TOKENIZER, Device, Json, TokenizerName, print_table, write_json


def verify(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Folder, manifest or archive, as for tokenize.")],
    tokenizer: TokenizerName = DEFAULT_TOKENIZER,
    files: Annotated[int, typer.Option(min=1, help="Check at most this many files, evenly spread.")] = 100,
    window_seconds: Annotated[
        float | None, typer.Option(help="Also measure streams with windows of this length.")
    ] = None,
    context_seconds: Annotated[float, typer.Option(help="Context of such windows.")] = 1.0,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the sizes of pushed pieces and of the kill times.")] = 0,
    json_file: Json = None,
) -> None:
    """Measure on your files: batched = single, streamed = offline, killed and resumed = one pass.

    Streams are pushed in pieces of 1 sample to 2 seconds, at several sample rates.
    """
    import speechtok
    from speechtok.evaluation.verify import verify as run
    from speechtok.frames import WindowRule

    window = None if window_seconds is None else WindowRule(window_seconds, context_seconds)
    result = run(source, speechtok.load(tokenizer, device=device), files=files, window=window, seed=seed)
    write_json(json_file, result)
    rows = [
        [
            check["name"],
            check["files"],
            f"{100 * check['files_identical_rate']:.2f} %",
            f"{100 * check['frames_identical_rate']:.4f} %",
            check["ties"],
        ]
        for check in result["checks"]
    ]
    print_table(
        f"{result['tokenizer']} on {source}",
        ["equivalence", "files", "identical files", "identical units", "near-ties decided"],
        rows,
    )
    difference = result["max_feature_difference"]
    typer.echo(f"largest feature difference between batched and single: {difference:.3g} (relative, per frame)")
    typer.echo(f"{result['skipped']} files could not be used" if result["skipped"] else "all files could be used")
    if not result["holds"]:
        raise typer.Exit(1)
    if result["skipped"]:
        raise typer.Exit(3)
