"""Steps of the shipped codec: training, table, card."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from speechtok.evaluation import codec as evaluation
from speechtok.tokenizer import Tokenizer
from speechtok.training import splits
from speechtok.training.cards import Origin, corpora, share_alike, write_makers
from speechtok.training.codec_card import write_card
from speechtok.training.compression import train_codec
from speechtok.training.encoder_steps import Training, curves_of, encoder_step
from speechtok.training.fingerprints import sounds, text
from speechtok.training.graph import Product, Step, Task
from speechtok.training.jobs import BUNDLE, LICENCE, Job, copy, save_bundle, write_table

__all__ = ["MODEL", "steps"]

MODEL = "codec-mini"
TABLE = f"codec_{MODEL}"
OTHER = (*splits.MUSIC, splits.NOISE)  # what is heard besides speech
WATCHED = 4  # every n-th file of the dev speech is among the held-out sound
BOOKS, OPUS = (2, 4, 8), (6000.0, 12000.0)
_SHOWN = "librispeech/"  # of which corpus a file is drawn: clean, of full bandwidth


def steps(job: Job, given: Path | None) -> list[Step]:
    """All steps of the codec.

    Parameters
    ----------
    job : Job
    given : Path, optional
        Take this trained codec, see `speechtok.training.models.steps`.
    """
    return [encoder_step(job, _training(job), given), _table_step(job), _card_step(job)]


# -- training ---------------------------------------------------------------------------------------------------------


def _training(job: Job) -> Training:
    data = job.places.data

    def manifest(split: str, every: int) -> Path:
        paths = splits.spoken(data, split, every)
        paths += [path for name in OTHER for path in splits.listed(data, name, split)]
        return splits.write_manifest(data, paths, job.places.runs / f"{MODEL}-{split}.jsonl")

    def train(run: Path, first: Product | None) -> None:
        train_codec(
            job.choices.codec_recipe, manifest("train", 1), run, held_out=manifest("valid", WATCHED), name=MODEL,
            device=job.device, on_event=job.on_event,
        )  # fmt: skip

    heard = {"train": sounds(job.speech("train"))}
    heard |= {name: splits.fingerprint(data, splits.listed(data, name, "train")) for name in OTHER}
    return Training(
        MODEL, job.choices.codec_recipe, job.codec_recipe, train, heard, folder="codec", description=BUNDLE[0],
        weights=BUNDLE[1:], ship=partial(_ship, job),
    )  # fmt: skip


def _ship(job: Job, trained: Product) -> Product:
    tokenizer, folder = Tokenizer.load(trained.file(BUNDLE[0]).parent), job.bundle(MODEL)
    tokenizer.name, tokenizer.licence = MODEL, LICENCE
    tokenizer.training = {key: trained.facts[key] for key in ("recipe", "steps", "hours") if key in trained.facts}
    shipped = save_bundle(tokenizer, folder, curves_of(trained), trained.facts)
    for file in BUNDLE[1:]:  # the record compares them with what is given: they are those files to the bit
        copy(trained.file(file), folder / file)
    return shipped


# -- table ------------------------------------------------------------------------------------------------------------


def _table_step(job: Job) -> Step:
    settings = {"codebooks": BOOKS, "opus": OPUS, "every": job.choices.codec_every}
    data = {"eval": sounds(job.speech("eval"))}
    data |= {name: _heard(job, name) for name in splits.MUSIC}
    return Step(TABLE, "table", partial(_table, job), (MODEL,), settings, data)


def _heard(job: Job, name: str) -> str:
    return splits.fingerprint(job.places.data, splits.listed(job.places.data, name, "test"))


def _table(job: Job, task: Task) -> Product:
    tokenizer = Tokenizer.load(job.bundle(MODEL)).to(job.device)
    every, tables, pictures = job.choices.codec_every, [], []
    for name in (splits.SPEECH["test"], *splits.MUSIC):
        speech = name == splits.SPEECH["test"]
        data = job.places.data
        paths = splits.spoken(data, "test", every) if speech else splits.listed(data, name, "test")
        picture, shown = None, None
        if name != splits.MUSIC[-1]:  # single notes are short
            picture = job.bundle(MODEL) / f"{name.replace('/', '-')}.png"
            shown = next((path for path in paths if speech and str(path).startswith(f"{name}/{_SHOWN}")), paths[0])
            pictures.append(picture)
        manifest = splits.write_manifest(data, paths, job.places.runs / f"{TABLE}-{name.replace('/', '-')}.jsonl")
        table = evaluation.evaluate(
            manifest, tokenizer, BOOKS, speech=speech, opus=OPUS, picture=picture,
            picture_of=None if shown is None else str(shown.with_suffix("")), on_event=job.on_event,
        )  # fmt: skip
        tables.append(_told(table, manifest, name, every if speech else 1))
        tables[-1]["decoder_fingerprint"] = tokenizer.decoder_fingerprint
    return Product((write_table(job.table("codec", MODEL), tables), *pictures))


def _told(table: dict[str, Any], manifest: Path, name: str, every: int) -> dict[str, Any]:
    """A table that names its files as the data do, wherever they lie."""
    lines = map(json.loads, manifest.read_text().splitlines())
    names = {line["path"]: line["key"] + Path(line["path"]).suffix for line in lines}
    failed = {names.get(path, path): why.replace(path, names.get(path, path)) for path, why in table["failed"].items()}
    limit = "all files" if every == 1 else f"one of every {every} files"
    return table | {"data": name, "failed": failed, "conventions": table["conventions"] | {"limit": limit}}


# -- card -------------------------------------------------------------------------------------------------------------


def _card_step(job: Job) -> Step:
    data = {"credits of train": text(job.speech("train"), "metadata.jsonl")}
    data |= {f"credits of {name}": text(job.places.data / name, "metadata.jsonl") for name in OTHER}
    return Step(f"card_{MODEL}", "card", partial(_card, job), (MODEL, TABLE), {"command": job.command}, data)


def _card(job: Job, task: Task) -> Product:
    folder, facts = job.bundle(MODEL), task.needs[MODEL].facts
    places = {name: job.places.data / name for name in OTHER}
    heard = corpora(job.speech("train")) + [one for name in OTHER for one in corpora(places[name], "train", name)]
    credited = write_makers(folder, "Music and other sounds of the training sound", places)
    curves = curves_of(task.needs[MODEL])
    origin = Origin(facts["recipe"], facts["config"], facts, curves="" if curves is None else curves.name)
    card = write_card(
        folder, job.table("codec", MODEL), heard, sum(share_alike(place) for place in places.values()), job.command,
        origin, [path.name for path in task.needs[TABLE].files if path.suffix == ".png"],
    )  # fmt: skip
    return Product((card, credited))
