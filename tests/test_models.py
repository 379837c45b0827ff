"""`make models`: the graph of steps with stand-ins that count, and the shipped models at toy size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from speechtok.cli import app
from typer.testing import CliRunner

import speechtok
from speechtok.errors import FormatError, InputError, SpeechtokError
from speechtok.training import cards, models
from speechtok.training.graph import Product, Record, Step, file_hash, ordered, plan, run
from speechtok.training.recipe import Recipe, named

# -- the graph --------------------------------------------------------------------------------------------------------


class Kitchen:
    """flour -> dough -> bread -> sandwich <- salad; each step writes what it was given."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs, self.done = root / "kept", root / "runs", []
        self.root.mkdir()
        self.grain, self.heat, self.failing, self.constant = "wheat", 200, None, False
        self.expects: dict[str, str] = {}

    def _make(self, name, text, task, kept):
        if self.failing == name:
            raise InputError("the oven is cold")
        self.done.append(name)
        path = (self.root if kept else self.runs) / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("the same" if self.constant else text + "".join(
            f" {need}: {product.file(f'{need}.txt').read_text()}" for need, product in task.needs.items()
        ))  # fmt: skip
        return Product((path,), {"length": len(text)})

    def steps(self) -> list[Step]:
        def step(name, text, *needs, kept=True, **parts):
            return Step(name, "food", lambda task: self._make(name, text, task, kept), needs, kept=kept, **parts)

        return [
            step("sandwich", "s", "bread", "salad"),
            step("salad", "green"),
            step("bread", f"{self.heat}", "dough", settings={"heat": self.heat, "sizes": (1, 2)}),
            step("dough", self.grain, kept=False, data={"grain": self.grain}, expects=self.expects),
        ]

    def record(self) -> Record:
        return Record(self.root / "record.json", self.root, self.runs)

    def plan(self, *only):
        return {name: reason for name, reason in plan(self.steps(), self.record(), only).items() if reason}

    def run(self, *only):
        self.done.clear()
        built = run(self.steps(), self.record(), only)
        assert built == self.done
        return built


@pytest.fixture
def kitchen(tmp_path) -> Kitchen:
    return Kitchen(tmp_path)


ALL = ["dough", "bread", "salad", "sandwich"]


def test_everything_is_made_once_in_order(kitchen):
    assert kitchen.plan() == dict.fromkeys(ALL, "new")
    assert kitchen.run() == ALL
    assert (kitchen.root / "sandwich.txt").read_text() == "s bread: 200 dough: wheat salad: green"
    assert kitchen.plan() == {}
    assert kitchen.run() == []
    assert set(json.loads((kitchen.root / "record.json").read_text())) == set(ALL)


def test_a_change_rebuilds_exactly_what_is_downstream(kitchen):
    kitchen.run()
    kitchen.heat = 220
    assert kitchen.plan() == {"bread": "settings changed (heat)", "sandwich": "after bread"}
    assert kitchen.run() == ["bread", "sandwich"]
    kitchen.grain = "rye"
    assert kitchen.plan()["dough"] == "data changed (grain)"
    assert kitchen.run() == ["dough", "bread", "sandwich"]
    assert "rye" in (kitchen.root / "sandwich.txt").read_text()
    assert kitchen.run() == []


def test_a_step_that_comes_out_as_it_was_stops_the_change(kitchen):
    kitchen.constant = True
    kitchen.run()
    kitchen.grain = "spelt"  # as long a word as wheat
    assert set(kitchen.plan()) == {"dough", "bread", "sandwich"}
    assert kitchen.run() == ["dough"]


def test_a_spoilt_product_is_made_again(kitchen):
    kitchen.run()
    salad = kitchen.root / "salad.txt"
    for spoil, reason in ((salad.unlink, "missing"), (lambda: salad.write_text("brown"), "changed")):
        spoil()
        assert reason in kitchen.plan()["salad"]
        assert kitchen.run() == ["salad"]  # the same salad: the sandwich stays


def test_what_is_not_kept_is_made_again_only_when_it_is_needed(kitchen):
    kitchen.run()
    shutil.rmtree(kitchen.runs)
    assert kitchen.run() == []
    kitchen.heat = 180
    assert kitchen.plan()["dough"] == "bread needs its files"
    assert set(kitchen.plan()) == {"dough", "bread", "sandwich"}
    assert kitchen.run() == ["dough", "bread", "sandwich"]


def test_a_failure_names_the_step_and_keeps_the_rest(kitchen):
    kitchen.failing = "bread"
    with pytest.raises(SpeechtokError, match="step bread failed: the oven is cold"):
        kitchen.run()
    assert kitchen.done == ["dough"]
    kitchen.failing = None
    assert kitchen.run() == ["bread", "salad", "sandwich"]


def test_an_interrupted_step_is_run_again(kitchen, monkeypatch):
    kitchen.run()
    kitchen.heat = 230
    make = kitchen._make

    def half(name, text, task, kept):
        make(name, text, task, kept)
        raise KeyboardInterrupt

    monkeypatch.setattr(kitchen, "_make", half)
    with pytest.raises(KeyboardInterrupt):
        kitchen.run()
    monkeypatch.setattr(kitchen, "_make", make)
    # Even where the old settings come back: its file is no longer that of the record.
    kitchen.heat = 200
    assert kitchen.run() == ["bread"]
    kitchen.heat = 230
    assert kitchen.run() == ["bread", "sandwich"]


def test_a_bug_keeps_its_traceback_and_names_the_step(kitchen):
    steps = [Step("odd", "bug", lambda task: Product((kitchen.root / "nothing.txt",), {"x": 1 / 0}))]
    with pytest.raises(ZeroDivisionError) as error:
        run(steps, kitchen.record())
    assert "in step odd" in error.value.__notes__[0]


def test_only(kitchen):
    assert kitchen.run("bread") == ["dough", "bread"]
    assert set(kitchen.plan("salad")) == {"salad"}
    assert kitchen.run() == ["salad", "sandwich"]
    with pytest.raises(InputError, match="no step 'soup'; steps are sandwich, salad, bread, dough"):
        kitchen.run("soup")


def test_files_that_are_given_from_outside(kitchen):
    kitchen.run()
    kitchen.expects = {"dough.txt": file_hash(kitchen.runs / "dough.txt")}
    assert kitchen.plan() == {}
    kitchen.expects = {"dough.txt": "another hash"}
    assert kitchen.plan()["dough"] == "another dough.txt is given"


def test_circles_and_unknown_needs_are_refused():
    def step(name, *needs):
        return Step(name, "", lambda task: Product(), needs)

    with pytest.raises(InputError, match="circle: b -> c -> b"):
        ordered([step("a", "b"), step("b", "c"), step("c", "b")])
    with pytest.raises(InputError, match="a needs 'z'"):
        ordered([step("a", "z")])
    with pytest.raises(InputError, match="twice"):
        ordered([step("a"), step("a")])


def test_a_damaged_record_is_refused(kitchen):
    (kitchen.root / "record.json").write_text('{"salad": {"settings": 3}}')
    with pytest.raises(FormatError, match="record.json is damaged"):
        kitchen.record()


def test_steps_that_no_longer_exist_leave_the_record(kitchen):
    kitchen.run()
    record = kitchen.record()
    run(
        [step for step in kitchen.steps() if step.name == "salad"] + [Step("soup", "food", lambda task: Product())],
        record,
    )
    assert set(record.entries) == {"salad", "soup"}


# -- the shipped models at toy size -----------------------------------------------------------------------------------

RATE = 16000
TONES = {"SIL": 0.0, "AA": 300.0, "B": 700.0, "K": 1500.0, "T": 3000.0}
RECIPE = """kind = "w2v-bert"
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32
conv_depthwise_kernel_size = 5
normalization = "stored"
attention_chunk = 8
attention_past = 8
[objective]
contrastive_blocks = 1
codes = 8
code_dim = 8
final_dim = 8
distractors = 4
[data]
crop_seconds = [1.28]
batch_seconds = 2.56
[perturb]
noise_probability = 0.5
[run]
steps = 3
precision = "float32"
log_every = 1
"""


def speech(folder: Path, rng: np.random.Generator) -> None:
    """Four files of tones by two speakers, with times of every tone."""
    facts, aligned = [], []
    for speaker, pitch in (("one", 1.0), ("two", 1.05)):
        for number in range(2):
            path = f"librispeech/{speaker}-{number}.flac"
            order = [
                "SIL",
                *(tone for middle in rng.permutation(["AA", "T"] * 4) for tone in ("B", middle, "K")),
                "SIL",
            ]
            time = np.arange(RATE // 10) / RATE
            wave = np.concatenate([0.3 * np.sin(2 * np.pi * TONES[name] * pitch * time) for name in order])
            (folder / "librispeech").mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path, wave + rng.normal(0, 1e-3, len(wave)), RATE)
            phones = [[name, round(i / 10, 1), round((i + 1) / 10, 1)] for i, name in enumerate(order)]
            facts.append({
                "path": path, "speaker": speaker, "duration_s": len(wave) / RATE, "licence": "CC-BY-4.0",
                "source_repo": "someone/something",
            })  # fmt: skip
            aligned.append({"path": path, "words": [], "phones": phones})
    for name, lines in (("metadata", facts), ("alignments", aligned)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Toy:
    def __init__(self, root: Path) -> None:
        self.places = models.Places(root / "data", root / "checkout", root / "runs")
        self.recipe = root / "w2vbert-mini-toy.toml"
        self.recipe.write_text(RECIPE)
        (self.places.root / "assets").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for split in ("train", "dev", "eval"):
            speech(self.places.data / "speech" / split, rng)
        response = np.zeros(1600)
        response[[0, 400]] = 1, 0.5
        for kind, samples in (("noise", rng.normal(0, 0.1, RATE)), ("rir", response)):
            folder = self.places.data / kind
            folder.mkdir()
            lines = [
                {"path": f"{split}.flac", "split": split, "room": "r", "licence": "CC0", "author": f"{split} maker"}
                for split in ("train", "test")
            ]
            for line in lines:
                soundfile.write(folder / line["path"], samples, RATE)
            (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def steps(self, **options) -> list[Step]:
        choices = models.Choices(
            self.recipe, few=4, many=6, sample_frames=800, encoder_sample_frames=400, iterations=3, restarts=1,
            sweep_every=2,
        )  # fmt: skip
        return models.steps(self.places, choices, **options)

    def plan(self, **options) -> dict[str, str]:
        reasons = plan(self.steps(**options), models.record(self.places))
        return {name: reason for name, reason in reasons.items() if reason}

    def run(self, *only, **options) -> list[str]:
        return run(self.steps(**options), models.record(self.places), only)

    def asset(self, *parts: str) -> Path:
        return self.places.root.joinpath("assets", *parts)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Toy(tmp_path_factory.mktemp("toy"))
    assert made.run()[0] == "mfcc-k4"
    yield made
    torch.set_num_threads(threads)


SHIPPED = ["mfcc-k4", "mfcc-k6", "w2vbert-mini", "w2vbert-mini-k4"]


def test_all_shipped_models_come_out(toy):
    assert sorted(path.parent.name for path in toy.asset().glob("*/tokenizer.json")) == SHIPPED
    entries = models.record(toy.places).entries
    layer = entries["w2vbert-mini-layer"]["facts"]["layer"]
    assert [row["layer"] for row in entries["w2vbert-mini-layer"]["facts"]["sweep"]] == [1, 2]
    wave = soundfile.read(toy.places.data / "speech" / "eval" / "librispeech" / "one-0.flac", dtype="float32")[0]
    for name, clusters in zip(SHIPPED, (4, 6, 6, 4), strict=True):
        tokenizer = speechtok.load(toy.asset(name))
        assert (tokenizer.name, tokenizer.vocab_size, tokenizer.licence) == (name, clusters, "Apache-2.0")
        units = tokenizer.encode(wave, RATE)
        assert len(units.ids) > 0
        assert max(units.ids) < clusters
        if name.startswith("w2v"):
            assert tokenizer.encoder.layer == layer
            assert tokenizer.encoder.exact_stream
            assert tokenizer.training["encoder"] == {
                "recipe": "w2vbert-mini-toy", "steps": 3, "hours": pytest.approx(3 * 2.56 / 3600), "layer": layer,
            }  # fmt: skip
            # Rounded weights are stored in two bytes.
            weights = sum(tensor.numel() for tensor in tokenizer.encoder.state_dict().values())
            assert toy.asset(name, "encoder.safetensors").stat().st_size < 3 * weights + 10_000
    # Both learned ones read the same frames.
    first, second = (load_file(toy.asset(name, "encoder.safetensors")) for name in SHIPPED[2:])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_tables_and_cards_say_the_same(toy):
    results = toy.places.root / "benchmarks" / "results"
    for name in SHIPPED:
        (units,) = json.loads((results / f"units_{name}.json").read_text())
        frames, ids = json.loads((results / f"abx_{name}.json").read_text())
        assert [frames["representation"], ids["representation"]] == ["frames", "units"]
        assert units["fingerprint"] == ids["fingerprint"] == speechtok.load(toy.asset(name)).fingerprint
        card = toy.asset(name, "README.md").read_text()
        group = units["groups"]["native"]
        clusters = units["vocab_size"]
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} | native |"))
        assert f"| {group['with_silence']['pnmi_miller_madow']:.3f} |" in row
        error = ids["groups"]["native"]
        assert row.endswith(f"| {error['within']['error']:.1f} | {error['across']['error']:.1f} |")
        assert f"| {group['ued']['noise']['ued']:.1f} |" in card
        for other in (f"mfcc-k{clusters}", f"logmel-k{clusters}"):
            assert f"| {other} | native |" in card
        for text in ("CC-BY-4.0", "openslr.org/12", "someone/something", "make models", "seed 0", "Apache-2.0"):
            assert text in card
    card = toy.asset("w2vbert-mini", "README.md").read_text()
    for text in ("3 steps", "recipe `w2vbert-mini-toy`", "hidden_size 32", "](curves.png)", "exact, ", "CREDITS.md"):
        assert text in card
    assert "../w2vbert-mini/curves.png" in toy.asset("w2vbert-mini-k4", "README.md").read_text()
    # The encoder has heard noises of the train split only.
    credit = toy.asset("w2vbert-mini", "CREDITS.md").read_text()
    assert "train maker" in credit
    assert "test maker" not in credit
    assert not toy.asset("mfcc-k4", "CREDITS.md").exists()


def test_nothing_is_done_twice(toy):
    assert toy.plan() == {}
    assert toy.run() == []
    # The trained encoder is not shipped; without it nothing has to be trained again.
    moved = toy.places.runs.rename(toy.places.runs.with_name("elsewhere"))
    assert toy.plan() == {}
    moved.rename(toy.places.runs)


def test_each_change_reaches_what_depends_on_it(toy):
    learned = {name for name in (step.name for step in toy.steps()) if "w2vbert" in name}
    toy.recipe.write_text(RECIPE.replace("steps = 3", "steps = 4"))
    changed = toy.plan()
    assert set(changed) == learned
    assert changed["w2vbert-mini-encoder"] == "settings changed (recipe)"
    toy.recipe.write_text(RECIPE)
    labels = toy.places.data / "speech" / "eval" / "alignments.jsonl"
    text = labels.read_text()
    labels.write_text(text.replace('"AA"', '"AE"'))
    assert {name.split("_")[0] for name in toy.plan()} == {"units", "abx", "card", "logmel-k4", "logmel-k6"}
    labels.write_text(text)
    sound = toy.places.data / "speech" / "train" / "librispeech" / "more.flac"
    shutil.copy(sound.with_name("one-0.flac"), sound)
    assert {"mfcc-k4", "w2vbert-mini-encoder", "w2vbert-mini", "card_w2vbert-mini-k4"} <= set(toy.plan())
    sound.unlink()
    assert toy.plan() == {}


def test_another_encoder_takes_the_place_of_the_old_one(toy, tmp_path):
    run = next(path.parent for path in toy.places.runs.glob("*/encoder"))
    given = tmp_path / "better" / "encoder"
    shutil.copytree(run / "encoder", given)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(run / name, given.parent)
    weights = load_file(given / "encoder.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, given / "encoder.safetensors")
    before = speechtok.load(toy.asset("w2vbert-mini")).fingerprint
    planned = toy.plan(encoder=given)
    assert planned["w2vbert-mini-encoder"] == "another encoder.safetensors is given"
    assert not any("mfcc" in name or "logmel" in name for name in planned)
    built = toy.run("w2vbert-mini", encoder=given)
    assert built == ["w2vbert-mini-encoder", "w2vbert-mini-layer", "w2vbert-mini"]
    assert speechtok.load(toy.asset("w2vbert-mini")).fingerprint != before
    # Its run says that it followed the recipe, so it is not replaced when it is not given again.
    assert not {"w2vbert-mini-encoder", "w2vbert-mini"} & set(toy.plan())
    assert "w2vbert-mini-k4" in toy.plan()
    # Of an encoder without a run nothing is known: the recipe would replace it.
    (given.parent / "config.json").unlink()
    assert toy.run("w2vbert-mini-encoder", encoder=given) == ["w2vbert-mini-encoder"]
    assert "settings changed" in toy.plan()["w2vbert-mini-encoder"]
    with pytest.raises(InputError, match="no encoder.json"):
        toy.steps(encoder=tmp_path)


def test_cards_refuse_tables_of_another_tokenizer(toy):
    results = toy.places.root / "benchmarks" / "results"
    other = cards.Figures.read(results / "units_mfcc-k6.json", results / "abx_mfcc-k6.json")
    with pytest.raises(FormatError, match="make them anew"):
        cards.write_card(toy.asset("mfcc-k4"), other, [], [], "make models", None)
    with pytest.raises(FormatError, match="no tables"):
        cards.Figures.read(results / "abx_mfcc-k6.json", results / "units_mfcc-k6.json")
    with pytest.raises(InputError, match="metadata.jsonl"):
        cards.corpora(toy.places.root)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_would_do(toy, tmp_path):
    (tmp_path / "assets").mkdir()
    options = [
        "train",
        "models",
        "--data",
        toy.places.data,
        "--root",
        tmp_path,
        "--runs",
        tmp_path / "runs",
        "--dry-run",
    ]
    for size in ("cpu", "gpu"):
        result = CliRunner().invoke(app, [str(x) for x in (*options, "--size", size)], catch_exceptions=False)
        assert result.exit_code == 0
        told = result.stdout.splitlines()
        assert "w2vbert-mini-encoder: new" in told
        assert (
            told.index("mfcc-k500: new") < told.index("card_mfcc-k500: new") < told.index("card_w2vbert-mini-k100: new")
        )
    assert list(tmp_path.iterdir()) == [tmp_path / "assets"]
    only = CliRunner().invoke(app, [str(x) for x in (*options, "--only", "units_mfcc-k500")], catch_exceptions=False)
    assert only.stdout.splitlines() == ["mfcc-k500: new", "units_mfcc-k500: new"]
    with pytest.raises(InputError, match="no folder assets"):
        CliRunner().invoke(app, [str(x) for x in (*options[:4], "--root", toy.places.data)], catch_exceptions=False)


def test_shipped_recipes_are_whole():
    for size in ("cpu", "gpu"):
        recipe = Recipe.read(f"w2vbert-mini-{size}", "w2v-bert")
        assert recipe.model["normalization"] == "stored"
    assert {"w2vbert-mini-cpu", "w2vbert-mini-gpu"} <= set(named())
