"""``speechtok train``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Log, LogMode, progress

train = typer.Typer(
    name="train", help="Train encoders.", no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)

Recipe = Annotated[str, typer.Option(help="TOML file, or the name of a shipped recipe.")]
Data = Annotated[str, typer.Option(help="Training sound: folder, manifest or archive, as for tokenize.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; an interrupted run in it goes on.")]
HeldOut = Annotated[str | None, typer.Option(help="Sound on which the loss is watched.")]
Aligned = Annotated[
    Path | None, typer.Option(help="Folder with alignments.jsonl: phone information of every layer is watched.")
]
Noise = Annotated[str | None, typer.Option(help="Sound that is mixed in; needs [perturb] noise_probability.")]
Change = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Another value than the recipe's.")
]
Init = Annotated[Path | None, typer.Option(help="Begin with the weights of this encoder (folder).")]


@train.command("w2v-bert")
def w2v_bert(
    recipe: Recipe,
    data: Data,
    out: Out,
    held_out: HeldOut = None,
    aligned: Aligned = None,
    noise: Noise = None,
    init: Init = None,
    change: Change = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
) -> None:
    """Pre-train a w2v-BERT encoder; RUN/encoder is what `speechtok fit --encoder` takes.

    Under torchrun, every process takes its share of each batch.
    """
    from speechtok.training.pretrain import pretrain

    with progress(log) as tell:
        folder = pretrain(
            recipe, data, out, held_out=held_out, aligned=aligned, noise=noise, init=init, changes=changes(change),
            device=device, on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))


def changes(values: list[str] | None) -> dict[str, Any]:
    """Values of ``--set``, read as TOML."""
    import tomllib

    from speechtok.errors import InputError

    result: dict[str, Any] = {}
    for value in values or []:
        place, sign, text = value.partition("=")
        try:
            result[place.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"--set {value!r}: write SECTION.FIELD=VALUE, strings in quotes ({error})") from error
        if not sign or place.count(".") != 1:
            raise InputError(f"--set {value!r}: write SECTION.FIELD=VALUE")
    return result
