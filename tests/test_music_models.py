"""`make models`, the tokenizer of music at toy size: encoder, layer, units, probes, card, and what makes them anew."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import speechtok
from speechtok.corpus.sources import scan
from speechtok.encoders import from_pretrained
from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.errors import FormatError, InputError, SpeechtokError
from speechtok.nn.seanet import SeanetConfig
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer
from speechtok.training import music_card, music_models
from speechtok.training.cards import Origin
from speechtok.training.fingerprints import sounds
from speechtok.training.graph import Product, Record, Step, Task, file_hash, plan, run
from speechtok.training.jobs import Choices, Job, Places
from speechtok.training.mert_config import MertConfig
from speechtok.training.recipe import Recipe, section
from tests import toy_sound
from tests.codecs import codec
from tests.conftest import tiny_encoder

RECIPE = """kind = "mert"
[model]
sample_rate = 24000
hidden_size = 24
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
conv_dim = [8, 8, 8, 8, 8, 8, 8]
num_conv_pos_embeddings = 8
num_conv_pos_embedding_groups = 2
do_stable_layer_norm = true
[objective]
books = 2
final_dim = 8
cqt_bins = 24
cqt_bins_per_octave = 12
cqt_fmin = 261.6
[data]
crop_seconds = [0.5]
batch_seconds = 3.0
[run]
steps = 4
precision = "float32"
log_every = 1
evaluate_every = 2
"""
STEPS = ["mert-mini-teacher", "mert-mini-encoder", "mert-mini-layer", "mert-mini", "probe_notes", "card_mert-mini"]


class Toy:
    """Stand-ins for the codec and the tokenizer that it is compared with are steps of their own."""

    def __init__(self, root: Path) -> None:
        self.places, self.teacher, self.pictures = Places(root / "data", root / "checkout", root / "runs"), 0, 0
        self.recipe = root / "mert-mini-toy.toml"
        self.recipe.write_text(RECIPE)
        (self.places.root / "assets").mkdir(parents=True)
        toy_sound.music(self.places.data, np.random.default_rng(0))

    def _stand_in(self, name: str, task: Task) -> Product:
        folder = self.places.root / "assets" / name
        shutil.rmtree(folder, ignore_errors=True)
        if name == "codec-mini":
            made = codec(name=name, seed=self.teacher)
        else:
            encoder = tiny_encoder("w2v_bert")
            made = Tokenizer(encoder, KMeans(np.zeros((2, encoder.dim), np.float32)), name=name)
        made.save(folder)
        (folder / "curves.png").write_text(str(self.pictures))
        return Product((folder / "tokenizer.json", folder / "encoder.safetensors", folder / "curves.png"))

    def steps(self, given: Path | None = None) -> list[Step]:
        sounds.cache_clear()
        recipe = Recipe.read(self.recipe, "mert")
        choices = Choices(
            "", "", "", self.recipe, many=6, sample_frames=800, encoder_sample_frames=400, iterations=3, restarts=1
        )
        job = Job(
            self.places, choices, recipe, recipe, recipe, recipe, recipe, "cpu", "make models", lambda event: None
        )
        others = [
            Step(name, "tokenizer", partial(self._stand_in, name), settings=settings)
            for name, settings in (
                ("codec-mini", {"seed": self.teacher, "pictures": self.pictures}),
                ("w2vbert-mini", {}),
            )
        ]
        return others + music_models.steps(job, given, teacher="codec-mini", base="w2vbert-mini")

    def record(self) -> Record:
        return Record(self.places.root / "assets" / "models.json", self.places.root, self.places.runs)

    def plan(self, given: Path | None = None) -> dict[str, str]:
        return {name: reason for name, reason in plan(self.steps(given), self.record()).items() if reason}

    def run(self, *only: str, given: Path | None = None) -> list[str]:
        return run(self.steps(given), self.record(), only)

    def asset(self, *parts: str) -> Path:
        return self.places.root.joinpath("assets", "mert-mini", *parts)

    def table(self) -> Path:
        return self.places.root / "benchmarks" / "results" / "probe_notes.json"

    def facts(self, step: str) -> dict:
        return self.record().entries[step]["facts"]

    def trained(self) -> Path:
        (found,) = self.places.runs.glob("mert-mini-toy-*/encoder")
        return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Toy(tmp_path_factory.mktemp("toy"))
    assert made.run() == ["codec-mini", "w2vbert-mini", *STEPS]
    yield made
    torch.set_num_threads(threads)


@pytest.fixture
def copied(toy, tmp_path):
    """The same at another place, so that other tests find what they left."""
    other = object.__new__(Toy)
    other.places = Places(toy.places.data, tmp_path / "checkout", tmp_path / "runs")
    other.recipe, other.teacher, other.pictures = toy.recipe, toy.teacher, toy.pictures
    shutil.copytree(toy.places.root, other.places.root)
    shutil.copytree(toy.places.runs, other.places.runs)
    return other


def test_encoder_layer_and_units_come_out(toy):
    chosen = toy.facts("mert-mini-layer")
    assert [row["layer"] for row in chosen["sweep"]] == [0, 1, 2]
    for row in chosen["sweep"]:
        assert row["mean"] == pytest.approx((row["pitch_class"] + row["instrument_family"]) / 2)
    scores = {row["layer"]: row["mean"] for row in chosen["sweep"][1:]}
    assert scores[chosen["layer"]] == max(scores.values())
    tokenizer = speechtok.load(toy.asset())
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.rate) == ("mert-mini", 6, 75)
    assert tokenizer.licence == "Apache-2.0"
    assert tokenizer.encoder.layer == chosen["layer"]
    told = tokenizer.training["encoder"]
    assert (told["recipe"], told["steps"], told["layer"]) == ("mert-mini-toy", 4, chosen["layer"])
    whole = from_pretrained(toy.trained(), chosen["layer"]).state_dict()
    stored = load_file(toy.asset("encoder.safetensors"))
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name].float(), whole[name]) for name in stored)
    begun = json.loads((toy.trained().parent / "beginning.json").read_text())
    assert begun["teacher"] == speechtok.load(toy.places.root / "assets" / "codec-mini").fingerprint
    assert tokenizer.training["files"] == len(heard(toy, "train"))


def heard(toy: Toy, split: str) -> set[str]:
    return {utterance.key for utterance in scan(toy.places.runs / f"mert-mini-{split}.jsonl").utterances}


def test_each_split_is_used_for_what_it_is_for(toy):
    lines = {
        place: [json.loads(line) for line in (toy.places.data / place / "metadata.jsonl").read_text().splitlines()]
        for place in ("music/tracks", "music/notes")
    }
    for split in ("train", "valid"):
        assert heard(toy, split) == {
            f"{place}/{line['path']}"[: -len(".flac")]
            for place, some in lines.items() for line in some if line["split"] == split
        }  # fmt: skip
    # The layer is chosen on notes that no figure of the test split knows of.
    choosing = [json.loads(line) for line in (toy.places.runs / "mert-mini-layer.jsonl").read_text().splitlines()]
    notes = [line for line in lines["music/notes"] if line["split"] in ("train", "valid")]
    assert [line | {"path": None} for line in choosing] == [line | {"path": None} for line in notes]
    assert toy.facts("mert-mini-layer")["tasks"]["pitch_class"] == {"items": 21, "groups": 7}
    # The card's probes know all.
    tables = json.loads(toy.table().read_text())
    assert {table["items"] for table in tables if table["task"] == "pitch_class"} == {28}


def test_probes_and_card_say_the_same(toy):
    card, tables = toy.asset("README.md").read_text(), json.loads(toy.table().read_text())
    features = ["log-mel", "cqt", "mfcc", "w2vbert-mini", "mert-mini"]
    tasks = ["pitch_class", "instrument_family", "octave", "drum_piece"]
    assert [(table["task"], table["tokenizer"]) for table in tables] == [(t, f) for t in tasks for f in features]
    tokenizer = speechtok.load(toy.asset())
    assert {table["fingerprint"] for table in tables if table["tokenizer"] == "mert-mini"} == {tokenizer.fingerprint}
    for task in tasks:
        section = card.split(f"### {task.replace('_', ' ').capitalize()}\n")[1].split("###")[0]
        for table in (table for table in tables if table["task"] == task):
            found = table["chosen"]
            line = next(line for line in section.splitlines() if line.startswith(f"| {table['tokenizer']} |"))
            low, high = found["interval"]
            assert f"| {100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] |" in line
            over = f"{100 * found['difference']['accuracy']:.1f} ["
            assert line.endswith("| - |") if table["tokenizer"] == "log-mel" else over in line.split("|")[-2]
            assert table["chosen"]["difference"]["to"] == "log-mel"
        majority = next(table for table in tables if table["task"] == task)["majority"]
        assert f"| always the most frequent | {100 * majority['accuracy']:.1f} [" in section
    assert "left out, since only one instrument has them: reed (4)" in card
    own = [table for table in tables if table["tokenizer"] == "mert-mini"]
    last = next(line for line in card.splitlines() if line.startswith("| drum piece |"))
    shown = [cell.strip().split(" [")[0] for cell in last.split("|")[2:-1]]
    assert shown == [f"{100 * figures['accuracy']:.1f}" for figures in own[-1]["layers"].values()]
    sweep = toy.facts("mert-mini-layer")
    for row in sweep["sweep"]:
        mark = "**" if row["layer"] == sweep["layer"] else ""
        cells = " | ".join(f"{100 * row[name]:.1f}" for name in ("pitch_class", "instrument_family", "mean"))
        assert f"| {mark}{row['layer']}{mark} | {cells} |" in card


def test_the_card_says_where_it_comes_from(toy):
    card, credit = toy.asset("README.md").read_text(), toy.asset("CREDITS.md").read_text()
    held_out = toy.facts("mert-mini-encoder")["held_out"][0]
    for said in (
        "recipe `mert-mini-toy`", "seed 0", "4 steps", "](curves.png)", "make models", "hidden_size 24", "books 2",
        speechtok.load(toy.asset()).fingerprint, "(../codec-mini/README.md)", "2306.00107", "| music/tracks | 2 |",
        "are under CC BY-SA", f"at step 4: loss {held_out['loss']:.3f}",
        f"the output of block {toy.facts('mert-mini-layer')['layer']} of 2;",
        "pitch class (21 notes, 7 instruments) and instrument family (22 notes, 10 instruments)", "| 75 |",
    ):  # fmt: skip
        assert said in card, said
    assert toy.asset("curves.png").read_bytes().startswith(b"\x89PNG")
    assert "train band (train piece 0)" in credit
    assert "## music/notes" in credit
    assert "Anna" in credit
    assert "test" not in credit
    told = card + credit + toy.table().read_text() + json.dumps(toy.record().entries)
    assert str(toy.places.root.parent) not in told


def test_nothing_is_done_twice(toy):
    assert toy.plan() == {}
    assert toy.run() == []
    # The trained encoder is not shipped; without it nothing has to be trained again.
    moved = toy.places.runs.rename(toy.places.runs.with_name("elsewhere"))
    assert toy.plan() == {}
    moved.rename(toy.places.runs)


def test_each_change_reaches_what_depends_on_it(toy):
    toy.recipe.write_text(RECIPE.replace("steps = 4", "steps = 5"))
    assert list(toy.plan()) == STEPS[1:]
    toy.recipe.write_text(RECIPE)
    toy.teacher = 1
    assert toy.plan()["codec-mini"] == "settings changed (seed)"
    assert toy.plan()["mert-mini-encoder"] == "after mert-mini-teacher"
    toy.teacher = 0
    listing = toy.places.data / "music" / "notes" / "metadata.jsonl"
    text = listing.read_text()
    listing.write_text(text.replace('"pitch_midi": 60', '"pitch_midi": 61'))
    # Labels teach nothing: they choose the layer, and are told by probes.
    assert list(toy.plan()) == STEPS[2:]
    assert "labels" in toy.plan()["mert-mini-layer"]
    listing.write_text(text)
    for place, changed in (
        ("music/notes/pitched/bass-60.flac", STEPS[1:]), ("music/notes/pitched/bass-72.flac", STEPS[2:]),
        ("music/notes/pitched/bass-48.flac", STEPS[4:]), ("music/tracks/train/piece-0.flac", STEPS[1:]),
        ("music/tracks/dev/piece-0.flac", []), ("music/tracks/eval/piece-0.flac", []),
    ):  # fmt: skip
        file = toy.places.data / place
        content = file.read_bytes()
        file.write_bytes(content + b"\0")
        assert list(toy.plan()) == changed, place
        file.write_bytes(content)
    assert toy.plan() == {}


def test_what_does_not_teach_trains_nothing(copied):
    copied.pictures = 1
    assert copied.plan()["mert-mini-encoder"] == "after mert-mini-teacher"  # who knows before it is made
    assert copied.run() == ["codec-mini", "mert-mini-teacher"]
    assert copied.plan() == {}


def test_an_encoder_of_music_is_given(copied, tmp_path):
    given = tmp_path / "better" / "encoder"
    shutil.copytree(copied.trained().parent, given.parent)
    weights = load_file(given / "encoder.safetensors")
    save_file({name: tensor * 1.25 for name, tensor in weights.items()}, given / "encoder.safetensors")
    assert copied.plan(given)["mert-mini-encoder"] == "another encoder.safetensors is given"
    # Its run began with this codec, or it is refused.
    beginning = given.parent / "beginning.json"
    begun = json.loads(beginning.read_text())
    for teacher in ("0" * 32, None):
        beginning.write_text(json.dumps(begun | {"teacher": teacher}))
        with pytest.raises(SpeechtokError, match="trained from another codec than that of step mert-mini-teacher"):
            copied.run("mert-mini-encoder", given=given)
    beginning.write_text("5")
    with pytest.raises(SpeechtokError, match="beginning.json is damaged"):
        copied.run("mert-mini-encoder", given=given)
    beginning.write_text(json.dumps(begun))
    assert copied.run("mert-mini", given=given) == ["mert-mini-encoder", "mert-mini-layer", "mert-mini"]
    stored = load_file(copied.asset("encoder.safetensors"))
    assert all(torch.equal(stored[name].float(), 1.25 * weights[name].float()) for name in stored)
    assert set(copied.plan()) == {"probe_notes", "card_mert-mini"}
    assert file_hash(given / "encoder.safetensors") in copied.record().entries["mert-mini-encoder"]["files"].values()
    with pytest.raises(InputError, match="no encoder.json; give the folder 'encoder' of a finished run"):
        copied.plan(tmp_path)


def test_the_card_refuses_tables_of_another_tokenizer(copied):
    def write() -> None:
        sweep = copied.facts("mert-mini-layer")["sweep"]
        music_card.write_card(
            copied.asset(), copied.table(), [], 0.0, "codec-mini", "make models", Origin("toy", {}, {}, 1, sweep), {}
        )

    write()  # an encoder of which nothing is known
    tables = json.loads(copied.table().read_text())
    copied.table().write_text(json.dumps([table | {"fingerprint": "123"} for table in tables]))
    with pytest.raises(FormatError, match="made with another tokenizer; make them anew"):
        write()
    for content in ("{", json.dumps(tables[:1]), '[{"tokenizer": "mert-mini"}]'):
        copied.table().write_text(content)
        with pytest.raises(FormatError, match="no tables of"):
            write()


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_shipped_recipes_fit_the_codec_and_the_size(size):
    recipe, taught = Recipe.read(f"mert-mini-{size}", "mert"), Recipe.read(f"codec-mini-{size}", "codec")
    model, waves = section(HubertConfig, recipe.model, "model"), section(SeanetConfig, taught.model, "model")
    assert (model.sample_rate, math.prod(model.conv_stride)) == (waves.sample_rate, waves.hop)
    assert section(MertConfig, recipe.objective, "objective").books <= taught.objective["codebooks"]
    numbers = sum(parameter.numel() for parameter in HubertEncoder(model).parameters())
    assert 2 * numbers + 4 * 500 * model.hidden_size < 10e6  # bfloat16, and centroids in float32
