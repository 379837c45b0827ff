"""``speechtok train``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Log, LogMode, Noises, Rooms, TokenizerName, progress

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
Noise = Annotated[str | None, typer.Option(help="Sound that is mixed in; needs \\[perturb] noise_probability.")]
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
    from speechtok.training.recipe import parse_changes

    with progress(log) as tell:
        folder = pretrain(
            recipe, data, out, held_out=held_out, aligned=aligned, noise=noise, init=init,
            changes=parse_changes(change), device=device, on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))


@train.command("sylber")
def sylber(
    recipe: Recipe,
    data: Data,
    out: Out,
    init: Init = None,
    held_out: HeldOut = None,
    aligned: Annotated[
        Path | None, typer.Option(help="Folder with alignments.jsonl: boundaries of syllables are watched.")
    ] = None,
    noise: Noise = None,
    change: Change = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
) -> None:
    """Teach an encoder syllables by self-segmentation; RUN/encoder is what `speechtok fit --encoder` takes.

    Under torchrun, every process takes its share of each batch.
    """
    from speechtok.training.recipe import parse_changes
    from speechtok.training.syllables import self_segment

    with progress(log) as tell:
        folder = self_segment(
            recipe, data, out, init=init, held_out=held_out, aligned=aligned, noise=noise,
            changes=parse_changes(change), device=device, on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))


@train.command("mert")
def mert(
    recipe: Recipe,
    data: Data,
    out: Out,
    teacher: Annotated[
        str | None, typer.Option(help="Acoustic teacher: a tokenizer of 75 frames per second, such as codec-mini.")
    ] = None,
    held_out: HeldOut = None,
    change: Change = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
) -> None:
    """Pre-train a MERT encoder on music and other sound; RUN/encoder is what `speechtok fit --encoder` takes.

    The teacher's codes are computed first and kept in the run's folder. Under torchrun, every process takes its share
    of each batch.
    """
    from speechtok.training.music import pretrain_mert
    from speechtok.training.recipe import parse_changes

    with progress(log) as tell:
        folder = pretrain_mert(
            recipe, data, out, teacher=teacher, held_out=held_out, changes=parse_changes(change), device=device,
            on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))


@train.command("codec")
def codec(
    recipe: Recipe,
    data: Data,
    out: Out,
    held_out: HeldOut = None,
    name: Annotated[str, typer.Option(help="Of the tokenizer.")] = "codec",
    change: Change = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
) -> None:
    """Train a codec; RUN/codec is a tokenizer for `speechtok tokenize --tokenizer` and `speechtok synth`.

    Under torchrun, every process takes its share of each batch.
    """
    from speechtok.training.compression import train_codec
    from speechtok.training.recipe import parse_changes

    with progress(log) as tell:
        folder = train_codec(
            recipe, data, out, held_out=held_out, name=name, changes=parse_changes(change), device=device,
            on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))


@train.command("invariant")
def invariant(
    recipe: Recipe,
    data: Data,
    out: Out,
    tokenizer: TokenizerName = "w2vbert-mini-k100",
    held_out: Annotated[
        str | None, typer.Option(help="Sound on which edit distances are watched, and by which rounds end.")
    ] = None,
    noise: Noises = None,
    rir: Rooms = None,
    name: Annotated[str, typer.Option(help="Of the new tokenizer.")] = "invariant",
    change: Change = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
) -> None:
    """Teach a tokenizer's units to stay the same under augmentation; RUN/tokenizer is the new tokenizer.

    The encoder stays as it is. Frames of all augmented sounds are computed first and kept in the run's folder.
    """
    from speechtok.training.invariant import train_invariant
    from speechtok.training.recipe import parse_changes

    with progress(log) as tell:
        folder = train_invariant(
            recipe, tokenizer, data, out, name=name, held_out=held_out, noise=noise, rooms=rir,
            changes=parse_changes(change), device=device, on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))


class Size(StrEnum):
    """What shipped models are trained on."""

    cpu = "cpu"
    gpu = "gpu"


@train.command("models")
def models(
    data: Annotated[Path, typer.Option(help="Holds the folders speech, music, noise and rir.")],
    size: Annotated[Size, typer.Option(help="Of encoders: recipes w2vbert-mini-SIZE and so on.")] = Size.cpu,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Just this step and what it needs; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and why.")] = False,
    encoder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Take this trained encoder (RUN/encoder) instead.")
    ] = None,
    sylber_encoder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Likewise, the encoder of syllables that begins with it.")
    ] = None,
    codec: Annotated[
        Path | None, typer.Option("--codec", metavar="FOLDER", help="Take this trained codec (RUN/codec) instead.")
    ] = None,
    mert_encoder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Likewise, the encoder of music that the codec teaches.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Runs in progress and trained encoders are kept here.")] = Path("runs"),
    root: Annotated[Path, typer.Option(help="Checkout whose assets and tables are refreshed.")] = Path(),
    device: Annotated[str | None, typer.Option(help="Torch device; default cpu, for --size gpu cuda.")] = None,
    log: Log = LogMode.auto,
) -> None:
    """Make all shipped models again, with their tables and cards; what has not changed is left as it is.

    An interrupted call is gone on with by the same call.
    """
    from speechtok.training.graph import plan, run
    from speechtok.training.models import Choices, Places, record, steps

    places = Places(data, root, runs)
    known = record(places)
    with progress(log) as tell:
        first, syllables, waves, music = (f"{name}-mini-{size}" for name in ("w2vbert", "sylber", "codec", "mert"))
        chosen = steps(
            places, Choices(first, syllables, waves, music), encoder=encoder, syllable_encoder=sylber_encoder,
            codec=codec, mert_encoder=mert_encoder, device=device or ("cuda" if size is Size.gpu else "cpu"),
            command=f"make models SIZE={size}", on_event=tell,
        )  # fmt: skip
        if dry_run:
            for name, reason in plan(chosen, known, only or ()).items():
                typer.echo(f"{name}: {reason or 'up to date'}")
            return
        built = run(chosen, known, only or (), on_step=lambda name, reason: typer.echo(f"{name}: {reason}"))
    typer.echo(f"{len(built)} steps done" if built else "everything is up to date")


Teacher = Annotated[
    str, typer.Option(help="Encoder that is copied: a checkpoint folder or file, or a Hugging Face name.")
]
TeacherLayer = Annotated[int | None, typer.Option(help="Index into the teacher's hidden_states; default the last.")]


@train.command()
def distill(
    recipe: Recipe,
    teacher: Teacher,
    data: Data,
    out: Out,
    teacher_layer: TeacherLayer = None,
    held_out: HeldOut = None,
    aligned: Aligned = None,
    noise: Noise = None,
    change: Change = None,
    device: Device = "cpu",
    log: Log = LogMode.auto,
) -> None:
    """Make a small exact-streaming copy of an encoder; RUN/encoder is what `speechtok fit --encoder` takes.

    The teacher's frames are computed first and kept in the run's folder.
    """
    from speechtok.training.recipe import parse_changes
    from speechtok.training.student import distill as run

    with progress(log) as tell:
        folder = run(
            recipe, teacher, data, out, layer=teacher_layer, held_out=held_out, aligned=aligned, noise=noise,
            changes=parse_changes(change), device=device, on_event=tell,
        )  # fmt: skip
    typer.echo(str(folder))
