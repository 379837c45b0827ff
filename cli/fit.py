"""``speechtok fit``."""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Json, Log, LogMode, print_table, progress, write_json

if TYPE_CHECKING:
    from speechtok.segmenters import Segmenter


class Cut(StrEnum):
    """How frames are cut into segments."""

    greedy = "greedy"
    min_cut = "min-cut"
    norm_peaks = "norm-peaks"


def fit(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Training sound: folder, manifest or archive, as for tokenize.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new tokenizer; its name is the tokenizer's.")],
    encoder: Annotated[
        str, typer.Option(help="mfcc, lipcot, cqt, a checkpoint folder or file, or a Hugging Face name.")
    ] = "mfcc",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Setting of an encoder without weights: --set feature=lar."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Index into hidden_states; default the last.")] = None,
    clusters: Annotated[int, typer.Option("--clusters", "-k", min=1, help="Vocabulary.")] = 100,
    segmenter: Annotated[
        Cut | None, typer.Option(help="Units are syllable-like segments, cut this way, instead of frames.")
    ] = None,
    norm_threshold: Annotated[
        float | None,
        typer.Option(
            help="Frames below this norm are silent (greedy, min-cut); needed for encoders other than Sylber's."
        ),
    ] = None,
    merge_threshold: Annotated[
        float | None, typer.Option(help="Cosine from which frames belong together (greedy) or pieces (min-cut).")
    ] = None,
    silence_gap: Annotated[
        int | None, typer.Option(min=0, help="A gap of more frames in front of a segment is a unit of its own.")
    ] = None,
    standardize: Annotated[bool, typer.Option(help="Scale each dimension to unit variance first.")] = False,
    spherical: Annotated[bool, typer.Option(help="Compare directions: scale frames or means to length 1.")] = False,
    sample_frames: Annotated[
        int, typer.Option(min=1, help="Frames or segments kept in memory for the fit (a uniform random sample).")
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
    network = from_pretrained(encoder, layer, settings=_settings(settings))
    cut = _segmenter(segmenter, norm_threshold, merge_threshold, silence_gap, network.grid.rate)
    try:
        out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of fitting
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}); choose another folder") from error
    with progress(log) as tell:
        tokenizer, report = run(
            source, network, clusters, name=out.resolve().name, segmenter=cut,
            silence_gap=silence_gap, standardize=standardize, spherical=spherical, sample_frames=sample_frames,
            iterations=iterations, restarts=restarts, seed=seed, window=WindowRule(max_seconds, context_seconds),
            licence=licence, device=device, on_event=tell,
        )  # fmt: skip
    tokenizer.save(out)
    write_json(json_file, report)
    print_table(f"{tokenizer.name}  {tokenizer.fingerprint}", ["", ""], [[key, value] for key, value in report.items()])
    typer.echo(str(out))
    if report["files failed"]:
        raise typer.Exit(3)


def _settings(texts: list[str] | None) -> dict[str, Any]:
    """Settings out of texts like ``order=12``: what is no number (or other value of TOML) is a text."""
    from speechtok.errors import InputError

    found: dict[str, Any] = {}
    for text in texts or []:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not sign:
            raise InputError(f"{text!r}: write --set FIELD=VALUE")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def _segmenter(
    cut: Cut | None,
    norm_threshold: float | None,
    merge_threshold: float | None,
    silence_gap: int | None,
    frame_rate: float,
) -> "Segmenter | None":
    """The segmenter of these options; InputError if they do not fit together."""
    from speechtok.errors import InputError
    from speechtok.segmenters import Greedy, MinCut, NormPeaks

    thresholds = {"norm_threshold": norm_threshold, "merge_threshold": merge_threshold}
    given: dict[str, Any] = {name: value for name, value in thresholds.items() if value is not None}
    names = ["--" + name.replace("_", "-") for name in given]
    match cut:
        case Cut.greedy:
            return Greedy(**given)
        case Cut.min_cut:
            return MinCut(**given, frame_rate=frame_rate)
        case Cut.norm_peaks if not given:
            return NormPeaks()
        case Cut.norm_peaks:
            raise InputError(f"--segmenter norm-peaks has no thresholds; leave out {' and '.join(names)}")
    names += [] if silence_gap is None else ["--silence-gap"]
    if names:
        raise InputError(f"{', '.join(names)}: only with --segmenter (greedy, min-cut or norm-peaks)")
    return None
