"""Steps of the shipped tokenizer of music: encoder, layer, units, probes, card."""

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from speechtok.encoders.pretrained import from_pretrained
from speechtok.evaluation import probe
from speechtok.tokenizer import Tokenizer
from speechtok.training import splits
from speechtok.training.cards import Origin, corpora, share_alike, write_makers
from speechtok.training.encoder_steps import Beginning, Training, curves_of, encoder_step
from speechtok.training.fingerprints import sounds, text
from speechtok.training.graph import Product, Step, Task
from speechtok.training.jobs import LICENCE, Job, save_bundle, write_table
from speechtok.training.kmeans import fit
from speechtok.training.music import pretrain_mert
from speechtok.training.music_card import write_card

__all__ = ["steps"]

MODEL, ENCODER, LAYER = "mert-mini", "mert-mini-encoder", "mert-mini-layer"
TEACHER = "mert-mini-teacher"
PROBES = "probe_notes"
NOTES = splits.MUSIC[1]
CHOOSING = ("pitch_class", "instrument_family")  # tasks that choose the layer
CHOSEN_ON = ("train", "valid")
PROBED = (*CHOOSING, "octave", "drum_piece")
FEATURES = ("log-mel", "cqt", "mfcc")  # that probes compare it with; the others are held against the first


def steps(job: Job, given: Path | None, *, teacher: str, base: str) -> list[Step]:
    """All steps of the tokenizer of music.

    Parameters
    ----------
    job : Job
    given : Path, optional
        Take this trained encoder, see `speechtok.training.models.steps`.
    teacher : str
        Codec that teaches it, a step too.
    base : str
        Tokenizer that it is compared with, a step too.
    """
    return [
        _teacher_step(job, teacher),
        encoder_step(job, _training(job, teacher), given),
        _layer_step(job),
        _units_step(job),
        _probes_step(job, base),
        _card_step(job, teacher),
    ]


def _music(job: Job, split: str) -> list[PurePosixPath]:
    return [path for name in splits.MUSIC for path in splits.listed(job.places.data, name, split)]


def _manifest(job: Job, split: str) -> Path:
    return splits.write_manifest(job.places.data, _music(job, split), job.places.runs / f"{MODEL}-{split}.jsonl")


def _heard(job: Job) -> dict[str, str]:
    return {"music": splits.fingerprint(job.places.data, _music(job, "train"))}


def _teacher_step(job: Job, teacher: str) -> Step:
    """What of the codec teaches: its units. Another decoder or picture of it concerns no encoder."""

    def identity(task: Task) -> Product:
        folder = task.needs[teacher].file("tokenizer.json").parent
        return Product((), {"fingerprint": Tokenizer.load(folder).fingerprint})

    return Step(TEACHER, "identity", identity, (teacher,))


def _training(job: Job, teacher: str) -> Training:
    def train(run: Path, first: Product | None) -> None:
        pretrain_mert(
            job.choices.mert_recipe, _manifest(job, "train"), run, teacher=job.bundle(teacher),
            held_out=_manifest(job, "valid"), device=job.device, on_event=job.on_event,
        )  # fmt: skip

    beginning = Beginning(TEACHER, "teacher", "codec", lambda product: str(product.facts["fingerprint"]))
    return Training(ENCODER, job.choices.mert_recipe, job.mert_recipe, train, _heard(job), beginning)


# -- layer and units --------------------------------------------------------------------------------------------------


def _layer_step(job: Job) -> Step:
    data, notes = job.places.data, []
    for split in CHOSEN_ON:
        notes += splits.listed(data, NOTES, split)
    about = {"notes": splits.fingerprint(data, notes), "labels of notes": text(data / NOTES, "metadata.jsonl")}
    settings = {"tasks": CHOOSING, "splits": CHOSEN_ON, "folds": probe.FOLDS, "seed": job.choices.seed}
    return Step(LAYER, "layer", partial(_layer, job), (ENCODER,), settings, about)


def _layer(job: Job, task: Task) -> Product:
    folder = task.needs[ENCODER].file("encoder.json").parent
    manifest = splits.labelled(job.places.data, NOTES, CHOSEN_ON, job.places.runs / f"{LAYER}.jsonl")
    found = probe.compare(
        manifest, [str(folder)], probe.tasks_of(CHOOSING), seed=job.choices.seed, device=job.device,
        on_event=job.on_event,
    )  # fmt: skip
    told: list[dict[str, Any]] = []
    for layer in found[0]["layers"]:
        row = {one["task"]: one["layers"][layer]["accuracy"] for one in found}
        told.append({"layer": int(layer), **row, "mean": sum(row.values()) / len(row)})
    # Layer 0, the input of the first block, is told for comparison only.
    best = max(told[1:], key=lambda row: row["mean"])["layer"]
    items = {one["task"]: {"items": one["items"], "groups": one["groups"]} for one in found}
    return Product((), {"layer": best, "sweep": told, "tasks": items})


def _units_step(job: Job) -> Step:
    choices = job.choices
    settings = {
        "clusters": choices.many,
        "sample_frames": choices.encoder_sample_frames,
        "iterations": choices.iterations,
        "restarts": choices.restarts,
        "seed": choices.seed,
    }
    return Step(MODEL, "tokenizer", partial(_units, job, settings), (ENCODER, LAYER), settings, _heard(job))


def _units(job: Job, settings: dict[str, Any], task: Task) -> Product:
    trained, layer = task.needs[ENCODER], task.needs[LAYER].facts["layer"]
    options = {name: value for name, value in settings.items() if name != "clusters"}
    tokenizer, report = fit(
        str(_manifest(job, "train")), from_pretrained(trained.file("encoder.json").parent, layer),
        settings["clusters"], name=MODEL, licence=LICENCE, device=job.device, on_event=job.on_event, **options,
    )  # fmt: skip
    kept = {key: trained.facts[key] for key in ("recipe", "steps", "hours") if key in trained.facts}
    tokenizer.training = report | {"encoder": kept | {"layer": layer}}
    return save_bundle(tokenizer, job.bundle(MODEL), curves_of(trained), report)


# -- probes and card --------------------------------------------------------------------------------------------------


def _probes_step(job: Job, base: str) -> Step:
    notes = job.places.data / NOTES
    data = {"notes": sounds(notes), "labels of notes": text(notes, "metadata.jsonl")}
    settings = {"tasks": PROBED, "features": FEATURES, "folds": probe.FOLDS, "seed": job.choices.seed}
    return Step(PROBES, "table", partial(_probes, job, base), (MODEL, base), settings, data)


def _probes(job: Job, base: str, task: Task) -> Product:
    names = [*FEATURES, *(str(job.bundle(name)) for name in (base, MODEL))]
    tables = probe.compare(
        job.places.data / NOTES, names, probe.tasks_of(PROBED), seed=job.choices.seed, device=job.device,
        on_event=job.on_event,
    )  # fmt: skip
    fingerprint = Tokenizer.load(job.bundle(MODEL)).fingerprint
    tables = [table | {"fingerprint": fingerprint} if table["tokenizer"] == MODEL else table for table in tables]
    return Product((write_table(job.table("probe", "notes"), tables),))


def _card_step(job: Job, teacher: str) -> Step:
    data = {f"credits of {name}": text(job.places.data / name, "metadata.jsonl") for name in splits.MUSIC}
    needs = (MODEL, PROBES, ENCODER, LAYER)
    return Step(f"card_{MODEL}", "card", partial(_card, job, teacher), needs, {"command": job.command}, data)


def _card(job: Job, teacher: str, task: Task) -> Product:
    folder, facts, layers = job.bundle(MODEL), task.needs[ENCODER].facts, task.needs[LAYER].facts
    places = {name: job.places.data / name for name in splits.MUSIC}
    heard = [one for name, place in places.items() for one in corpora(place, "train", name)]
    credited = write_makers(folder, "Music and notes of the training sound", places)
    curves = curves_of(task.needs[MODEL])
    origin = Origin(
        facts["recipe"], facts["config"], facts, layers["layer"], layers["sweep"],
        "" if curves is None else curves.name,
    )  # fmt: skip
    card = write_card(
        folder, job.table("probe", "notes"), heard, sum(share_alike(place) for place in places.values()), teacher,
        job.command, origin, layers["tasks"],
    )  # fmt: skip
    return Product((card, credited))
