"""``speechtok evaluate codec``: sound that comes back from units."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Json, Log, LogMode, print_table, progress, write_json

__all__ = ["codec"]


def codec(
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", metavar="NAME", help="A tokenizer with a decoder: folder or name.")
    ] = "codec-mini",
    speech: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA", help="Held-out speech: a folder, glob or manifest. May be repeated."),
    ] = None,
    music: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA", help="Other held-out sound, without STOI and PESQ. May be repeated."),
    ] = None,
    codebooks: Annotated[str, typer.Option(help="Numbers of codebooks, each a row.")] = "2,4,8",
    opus: Annotated[str, typer.Option(help="Rows of Opus, in kbit/s; empty for none.")] = "6,12",
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also draw spectrograms of the first file of each DATA.")
    ] = None,
    limit_files: Annotated[
        int | None,
        typer.Option("--limit-files", min=1, help="Use at most this many files of each DATA, evenly spread."),
    ] = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
    json_file: Json = None,
) -> None:
    """Sound that comes back from units: mel distance, SI-SDR, STOI, PESQ, use of codebooks, speed; beside Opus."""
    import speechtok
    from speechtok.errors import InputError
    from speechtok.evaluation.codec import evaluate as run

    sources = [(path, True) for path in speech or []] + [(path, False) for path in music or []]
    if not sources:
        raise InputError("there is nothing to measure on; give --speech DATA or --music DATA")
    counts, rates = _numbers(codebooks, "--codebooks", int), _numbers(opus, "--opus", float)
    loaded, results = speechtok.load(tokenizer, device=device), []
    for number, (source, spoken) in enumerate(sources):
        picture = None if pictures is None else pictures / f"{number}-{source.resolve().name}.png"
        with progress(log) as tell:
            results.append(
                run(
                    source, loaded, counts, speech=spoken, opus=[1000 * rate for rate in rates],
                    limit_files=limit_files, picture=picture, on_event=tell,
                )
            )  # fmt: skip
    write_json(json_file, results)
    for result in results:
        for path, reason in result["failed"].items():
            typer.echo(f"{path} is left out: {reason}", err=True)
        for name, reasons in result["unmeasured"].items():
            for reason, times in reasons.items():
                typer.echo(f"{result['data']}: {name} is left out {times} times: {reason}", err=True)
    if log is not LogMode.quiet:
        _show_codec(results)


def _numbers(text: str, option: str, kind: type) -> list[Any]:
    from speechtok.errors import InputError

    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"{option} {text!r}: give numbers with commas between them") from error


_FIGURES = {
    "mel_distance": "mel",
    "multi_scale_mel_distance": "DAC mel",
    "si_sdr": "SI-SDR dB",
    "stoi": "STOI",
    "pesq": "PESQ",
}


def _rounded(value: float | None, places: int) -> float | str:
    return "-" if value is None else round(value, places)


def _with_error(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    error = figures["standard_error"]
    return f"{figures['mean']:.3f}" + ("" if error is None else f" +- {error:.3f}")


def _show_codec(results: list[dict[str, Any]]) -> None:
    for result in results:
        rows: list[list[Any]] = []
        for row in result["rows"]:
            rates = [None if row[name] is None else row[name] / 1000 for name in ("bitrate", "entropy_bitrate")]
            rows.append([row["system"], *(_rounded(rate, 2) for rate in rates)])
            rows[-1] += [_with_error(row["figures"].get(name)) for name in _FIGURES]
            rows[-1] += [_rounded(row[name], 1) for name in ("encode_speed", "decode_speed")]
        print_table(
            f"{result['data']}: {result['files']} files, {result['seconds']:,.0f} s; means, standard errors over files",
            ["system", "kbit/s", "entropy kbit/s", *_FIGURES.values(), "encode x", "decode x"],
            rows,
        )
        print_table(
            f"{result['data']}: use of the codebooks of {result['tokenizer']}",
            ["codebook", "perplexity", "entropy, bits", "share of log2 K, %", "codes used", "never used"],
            [
                [
                    number, round(use["perplexity"], 1), round(use["entropy"], 2), round(100 * use["entropy_share"], 1),
                    use["units_used"], use["dead_codes"],
                ]
                for number, use in enumerate(result["codebooks"])
            ],
        )  # fmt: skip
