"""Steps of the shipped tokenizer whose units stay the same under augmentation: training and card."""

from functools import partial
from pathlib import Path

from speechtok.tokenizer import Tokenizer
from speechtok.training.cards import Figures, corpora, write_makers
from speechtok.training.fingerprints import changes, sounds, text
from speechtok.training.graph import Product, Step, Task
from speechtok.training.invariant import train_invariant
from speechtok.training.invariant_card import write_card
from speechtok.training.jobs import Job, save_bundle

__all__ = ["MODEL", "card_step", "tokenizer_step"]

MODEL = "w2vbert-mini-robust"


def tokenizer_step(job: Job, *, teacher: str, base: str) -> Step:
    """The step of the tokenizer.

    Parameters
    ----------
    job : Job
    teacher : str
        Tokenizer that the first round begins with, a step too.
    base : str
        Tokenizer whose encoder weights the bundle shares, a step too.
    """
    data = {split: sounds(job.speech(split)) for split in ("train", "dev")} | changes(job.places.data)
    build = partial(_tokenizer, job, teacher, base)
    return Step(MODEL, "tokenizer", build, (teacher, base), {"recipe": job.invariant_recipe.as_dict()}, data)


def _tokenizer(job: Job, teacher: str, base: str, task: Task) -> Product:
    recipe, data = job.choices.invariant_recipe, job.places.data
    # Named by all that decides the weights: an interrupted run is found again, and another one is never continued.
    run = job.places.runs / f"{Path(recipe).stem}-{task.fingerprint[:8]}"
    made = Tokenizer.load(
        train_invariant(
            recipe, job.bundle(teacher), job.speech("train"), run, name=MODEL, held_out=job.speech("dev"),
            noise=data / "noise", rooms=data / "rir", device=job.device, on_event=job.on_event,
        )
    )  # fmt: skip
    return save_bundle(made, job.bundle(MODEL), None, {}, base)


def card_step(job: Job, others: tuple[str, ...], tables: tuple[str, ...]) -> Step:
    """The step of the card.

    Parameters
    ----------
    job : Job
    others : tuple of str
        Tokenizers that it is compared with, its teacher first.
    tables : tuple of str
        Steps of all tables.
    """
    data = {
        "credits of train": text(job.speech("train"), "metadata.jsonl"),
        "credits of noise": text(job.places.data / "noise", "metadata.jsonl"),
        "credits of rir": text(job.places.data / "rir", "metadata.jsonl"),
    }
    build = partial(_card, job, others)
    return Step(f"card_{MODEL}", "card", build, (MODEL, *tables), {"command": job.command}, data)


def _card(job: Job, others: tuple[str, ...], task: Task) -> Product:
    folder, data = job.bundle(MODEL), job.places.data
    figures = [Figures.read(job.table("units", name), job.table("abx", name)) for name in (MODEL, *others)]
    makers = write_makers(
        folder, "Sounds that changed training sound", {"Noises": data / "noise", "Room responses": data / "rir"}
    )
    spoken = corpora(job.speech("train"))
    card = write_card(folder, figures[0], figures[1:], spoken, job.invariant_recipe, job.command)
    return Product((card, makers))
