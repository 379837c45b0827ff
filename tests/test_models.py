"""`make models`: the graph of steps with stand-ins that count, and the shipped models of speech at toy size."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from speechtok.cli import app
from typer.testing import CliRunner

import speechtok
from speechtok.encoders.lipcot import LipcotConfig
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import FormatError, InputError, SpeechtokError
from speechtok.training import cards, models, syllable_card, syllable_models
from speechtok.training.graph import Product, Record, Step, file_hash, ordered, plan, run
from speechtok.training.recipe import Recipe, named, section
from speechtok.training.sylber import SylberObjective
from speechtok.training.sylber_config import SylberConfig
from tests import toy_sound

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
SYLLABLE_RECIPE = """kind = "sylber"
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
conv_depthwise_kernel_size = 5
normalization = "stored"
attention_chunk = 8
attention_past = 8
projected_layer = 1
projection_size = 6
gated = true
[objective]
teacher_layer = 1
merge_thresholds = [0.0, 0.2]
[data]
crop_seconds = [1.28]
batch_seconds = 5.12
[perturb]
noise_probability = 0.2
[optimizer]
learning_rate = 1e-2
[run]
steps = 20
precision = "float32"
log_every = 10
[restart]
step = 15
learning_rate = 1e-3
"""
ROBUST_RECIPE = """kind = "invariant"
[objective]
method = "ctc"
blocks = 1
hidden = []
rounds = 2
[data]
crop_seconds = [1.28]
batch_seconds = 2.56
[run]
steps = 3
log_every = 1
"""
TONE = 0.08  # s


def speech(folder: Path, rng: np.random.Generator) -> None:
    """Four files by two speakers: words of three tones, louder in the middle, with times of every tone."""
    facts, aligned = [], []
    for speaker, pitch in (("one", 1.0), ("two", 1.05)):
        for number in range(2):
            path = f"librispeech/{speaker}-{number}.flac"
            spoken = [("B", middle, "K") for middle in rng.permutation(["AA", "T"] * 5)] + [("B", "AA", "T")]
            order = ["SIL", *(tone for word in spoken for tone in word), "SIL"]
            time = np.arange(round(TONE * RATE)) / RATE
            wave = np.concatenate([0.3 * np.sin(2 * np.pi * TONES[name] * pitch * time) for name in order])
            wave *= np.sin(np.pi * (np.arange(len(wave)) / RATE / TONE - 1) / 3) ** 2
            (folder / "librispeech").mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path, wave + rng.normal(0, 1e-3, len(wave)), RATE)
            edges = [round(TONE * i, 3) for i in range(len(order) + 1)]
            phones = [[name, *edges[i : i + 2]] for i, name in enumerate(order)]
            words = [["".join(word), *edges[1 + 3 * i : 5 + 3 * i : 3]] for i, word in enumerate(spoken)]
            facts.append({
                "path": path, "speaker": speaker, "duration_s": len(wave) / RATE, "licence": "CC-BY-4.0",
                "source_repo": "someone/something",
            })  # fmt: skip
            aligned.append({"path": path, "words": words, "phones": phones})
    for name, lines in (("metadata", facts), ("alignments", aligned)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Toy:
    def __init__(self, root: Path) -> None:
        self.places = models.Places(root / "data", root / "checkout", root / "runs")
        self.recipe = root / "w2vbert-mini-toy.toml"
        self.recipe.write_text(RECIPE)
        self.syllable_recipe = root / "sylber-mini-toy.toml"
        self.syllable_recipe.write_text(SYLLABLE_RECIPE)
        self.robust_recipe = root / "robust-toy.toml"
        self.robust_recipe.write_text(ROBUST_RECIPE)
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
        toy_sound.music(self.places.data, rng)

    def steps(self, **options) -> list[Step]:
        choices = models.Choices(
            self.recipe, self.syllable_recipe, "codec-mini-cpu", "mert-mini-cpu", self.robust_recipe, few=4, many=6,
            filters=5, syllables=5, sample_frames=800, encoder_sample_frames=400, iterations=3, restarts=1,
            sweep_every=2, continua=2,
        )  # fmt: skip
        return models.steps(self.places, choices, **options)

    def spoken(self, steps: list[Step]) -> list[str]:
        """Names of the steps of speech; test_codec_models and test_music_models have the others."""
        names = [step.name for step in steps]
        return names[: names.index("codec-mini")]

    def plan(self, **options) -> dict[str, str]:
        steps = self.steps(**options)
        reasons = plan(steps, models.record(self.places), self.spoken(steps))
        return {name: reason for name, reason in reasons.items() if reason}

    def run(self, *only, **options) -> list[str]:
        steps = self.steps(**options)
        return run(steps, models.record(self.places), only or self.spoken(steps))

    def asset(self, *parts: str) -> Path:
        return self.places.root.joinpath("assets", *parts)


class Copy(Toy):
    """The same data and choices at other places."""

    def __init__(self, toy: Toy, places: models.Places) -> None:
        self.places, self.recipe, self.syllable_recipe = places, toy.recipe, toy.syllable_recipe
        self.robust_recipe = toy.robust_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Toy(tmp_path_factory.mktemp("toy"))
    with pytest.MonkeyPatch.context() as patch:
        # Frames of an encoder of three steps fall apart whatever the thresholds.
        patch.setattr("speechtok.evaluation.boundaries.RATES", (1.0, 50.0))
        patch.setattr("speechtok.training.invariant._worse", lambda before, after: "")  # three steps teach nothing
        assert made.run()[0] == "mfcc-k4"
        yield made
    torch.set_num_threads(threads)


ROBUST = "w2vbert-mini-robust"
SHIPPED = ["mfcc-k4", "mfcc-k6", "w2vbert-mini", "w2vbert-mini-k4", "lipcot-k5"]  # of frames


def test_all_shipped_models_come_out(toy):
    assert sorted(path.parent.name for path in toy.asset().glob("*/tokenizer.json")) == sorted(
        [*SHIPPED, ROBUST, "sylber-mini"]
    )
    entries = models.record(toy.places).entries
    layer = entries["w2vbert-mini-layer"]["facts"]["layer"]
    assert [row["layer"] for row in entries["w2vbert-mini-layer"]["facts"]["sweep"]] == [1, 2]
    wave = soundfile.read(toy.places.data / "speech" / "eval" / "librispeech" / "one-0.flac", dtype="float32")[0]
    for name, clusters in zip(SHIPPED, (4, 6, 6, 4, 5), strict=True):
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
    first, second = (load_file(toy.asset(name, "encoder.safetensors")) for name in SHIPPED[2:4])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_robust_tokenizer_shares_its_encoder(toy):
    made, teacher = (speechtok.load(toy.asset(name)) for name in (ROBUST, "w2vbert-mini-k4"))
    states, shared = made.encoder.state_dict(), load_file(toy.asset("w2vbert-mini", "encoder.safetensors"))
    own = load_file(toy.asset(ROBUST, "encoder.safetensors"))
    layer = teacher.encoder.layer
    assert len(made.encoder.blocks) == layer + 1 and made.vocab_size == 4
    assert {name.split(".")[2] for name in own} == {str(layer)} and states.keys() == own.keys() | (
        states.keys() & shared.keys()
    )
    rows = made.training["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2] and made.training["tokenizer"] == teacher.name
    card, makers = (toy.asset(ROBUST, name).read_text() for name in ("README.md", "CREDITS.md"))
    assert f"| 2 | {rows[2]['ued_stretch']:.1f} |" in card and "train maker" in makers
    results = toy.places.root / "benchmarks" / "results"
    was, found = (
        json.loads((results / f"units_{name}.json").read_text())[0]["groups"]["native"]["ued"]["noise"]["ued"]
        for name in (teacher.name, ROBUST)
    )
    assert f"| noise | {was:.1f} | {found:.1f} | {100 * (found / was - 1):+.1f} % |" in card


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
        for other in (f"mfcc-k{clusters}", f"logmel-k{clusters}")[: 1 if clusters == 5 else 2]:
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


def test_filters_come_with_a_decoder(toy):
    tokenizer = speechtok.load(toy.asset("lipcot-k5"))
    assert tokenizer.encoder.config == LipcotConfig()
    wave = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    assert len(tokenizer.decode(tokenizer.encode(wave, RATE))) == 49 * 320
    facts = models.record(toy.places).entries["lipcot-k5"]["facts"]
    card = toy.asset("lipcot-k5", "README.md").read_text()
    for text in ("2408.07292", "12 poles", "25 ms", "50 per second", f"took {facts['minutes']} min", "whisper"):
        assert text in card
    # The row that it is held against is measured and not shipped.
    assert not toy.asset("mfcc-k5").exists()


def eval_table(toy, kind: str) -> list[dict]:
    return json.loads((toy.places.root / "benchmarks" / "results" / f"{kind}_sylber-mini.json").read_text())


def test_syllables_come_out(toy):
    entries = models.record(toy.places).entries
    tokenizer = speechtok.load(toy.asset("sylber-mini"))
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.silence_unit) == ("sylber-mini", 6, 5)
    assert (tokenizer.silence_gap, tokenizer.licence) == (7, "Apache-2.0")
    assert tokenizer.quantizer.spherical
    assert tokenizer.encoder.exact_stream
    assert tokenizer.training["encoder"] == {
        "recipe": "sylber-mini-toy", "steps": 20, "hours": pytest.approx(20 * 5.12 / 3600),
    }  # fmt: skip
    chosen = entries["sylber-mini-thresholds"]["facts"]
    assert tokenizer.segmenter.config_dict() == {**chosen["setting"], "close_gap": 4}
    scores = [one["r_value"] for one in chosen["tried"] if one["r_value"] is not None]
    assert len(chosen["tried"]) == 10 * 7
    assert max(scores) == next(one["r_value"] for one in chosen["tried"] if one["setting"] == chosen["setting"])
    # It heard the log-mel frames of the first encoder's run, and began with its weights.
    runs = [next(toy.places.runs.glob(f"{name}-toy-*")) for name in ("w2vbert-mini", "sylber-mini")]
    frames = [run / "mels" / "train" / "frames.f16" for run in runs]
    assert frames[0].samefile(frames[1])
    assert not (runs[0] / "mels" / ".lock").samefile(runs[1] / "mels" / ".lock")
    begun = json.loads((runs[1] / "beginning.json").read_text())["init"]
    assert file_hash(runs[0] / "encoder" / "encoder.safetensors").startswith(begun)


def test_tables_and_card_of_syllables_say_the_same(toy):
    rows = eval_table(toy, "syllables")
    names = [row["tokenizer"] for row in rows]
    assert names[:4] == ["sylber-mini", "sylber-mini+min-cut", "w2vbert-mini+greedy", "w2vbert-mini+min-cut"]
    assert names[4].startswith("uniform-")
    assert names[5:] == ["energy", "energy-onsets"]
    assert {row["data"] for row in rows} == {"eval"}
    assert {row["conventions"]["shift_from"] for row in rows} == {"best R on dev"}
    own = rows[0]["groups"]["native"]
    tokenizer = speechtok.load(toy.asset("sylber-mini"))
    assert rows[0]["facts"]["fingerprint"] == tokenizer.fingerprint
    files = sorted((toy.places.data / "speech" / "eval" / "librispeech").glob("*.flac"))
    counted = sum(len(units.ids) for units in tokenizer.encode_batch(files))
    seconds = sum(soundfile.info(file).duration for file in files)
    cost = own["units"]["cost"]
    assert cost["tokens_per_second"] == pytest.approx(counted / seconds)
    card = toy.asset("sylber-mini", "README.md").read_text()
    for row in rows:
        found = row["groups"]["native"]
        line = next(line for line in card.splitlines() if line.startswith(f"| {row['tokenizer']} | native |"))
        cells = [cell.strip() for cell in line.split("|")[3:-1]]
        figures = [found["sdhubert"][name] for name in ("precision", "recall", "f1", "over_segmentation", "r_value")]
        figures += [found["zerosyl"]["f1"], found["zerosyl"]["r_value"], found["intervals"]["f1"]]
        told = ["-" if value is None else f"{100 * value:.1f}" for value in figures]
        said = found["units"]["iou"] if found["units"] else None
        for name in ("syllable_purity", "cluster_purity", "snmi"):
            told.append(f"{100 * said[name]:.1f} ({100 * said[name + '_chance']:.1f})" if said else "-")
        assert cells == [f"{found['segments_per_second']:.2f}", *told]
    chosen = models.record(toy.places).entries["sylber-mini-thresholds"]["facts"]["setting"]
    for text in (
        f"{cost['tokens_per_second']:.2f} (", "| 6, the last of them silence |",
        f"{cost['nominal_bitrate']:.0f} nominal, {cost['entropy_bitrate']:.0f} by",
        f"{cost['entropy_bitrate_with_timing']:.0f} by the entropy of units, durations", tokenizer.fingerprint,
        f"length {chosen['norm_threshold']:g}, cosine {chosen['merge_threshold']:g}", "2410.07168", "](curves.png)",
        "*Sylber, as published* | *other data* | *3.76*", "20 steps", "recipe `sylber-mini-toy`", "make models",
        "CC-BY-4.0", "CREDITS.md", "more than 140 ms",
    ):  # fmt: skip
        assert text in card
    assert "train maker" in toy.asset("sylber-mini", "CREDITS.md").read_text()
    # Where the toy lies is nobody's business.
    assert str(toy.places.root) not in card + json.dumps(rows)
    continua = eval_table(toy, "continua")
    assert [row["tokenizer"] for row in continua] == ["sylber-mini", "w2vbert-mini", "log mel", "MFCC"]
    for row in continua:
        for kind in ("synthetic", "morphed"):
            assert f"| {kind} | {row[kind]['continua']} | {row[kind]['cosine']['mean']:.3f} ±" in card


def test_nothing_is_done_twice(toy):
    assert toy.plan() == {}
    assert toy.run() == []
    # The trained encoder is not shipped; without it nothing has to be trained again.
    moved = toy.places.runs.rename(toy.places.runs.with_name("elsewhere"))
    assert toy.plan() == {}
    moved.rename(toy.places.runs)


def test_each_change_reaches_what_depends_on_it(toy):
    learned = {name for name in toy.spoken(toy.steps()) if "w2vbert" in name or "sylber" in name}
    toy.recipe.write_text(RECIPE.replace("steps = 3", "steps = 4"))
    changed = toy.plan()
    assert set(changed) == learned
    assert changed["w2vbert-mini-encoder"] == "settings changed (recipe)"
    toy.recipe.write_text(RECIPE)
    toy.syllable_recipe.write_text(SYLLABLE_RECIPE.replace("steps = 20", "steps = 21"))
    changed = toy.plan()
    assert changed["sylber-mini-encoder"] == "settings changed (recipe)"
    assert set(changed) == {name for name in learned if "sylber" in name}
    toy.syllable_recipe.write_text(SYLLABLE_RECIPE)
    listing = toy.places.data / "speech" / "dev" / "alignments.jsonl"
    text = listing.read_text()
    listing.write_text(text.replace('"AA"', '"AE"'))
    assert {"sylber-mini-thresholds", "sylber-mini", "card_sylber-mini"} <= set(toy.plan())
    assert "sylber-mini-encoder" not in toy.plan()  # learns nothing from alignments
    listing.write_text(text)
    labels = toy.places.data / "speech" / "eval" / "alignments.jsonl"
    text = labels.read_text()
    labels.write_text(text.replace('"AA"', '"AE"'))
    measured = {"units", "abx", "card", "logmel-k4", "logmel-k6", "mfcc-k5", "syllables", "continua"}
    assert {name.split("_")[0] for name in toy.plan()} == measured
    labels.write_text(text)
    sound = toy.places.data / "speech" / "train" / "librispeech" / "more.flac"
    shutil.copy(sound.with_name("one-0.flac"), sound)
    assert {"mfcc-k4", "lipcot-k5", "w2vbert-mini-encoder", "w2vbert-mini", "card_w2vbert-mini-k4"} <= set(toy.plan())
    sound.unlink()
    assert toy.plan() == {}


def test_an_encoder_of_syllables_is_given(toy, tmp_path):
    """A copy of the checkout, so that other tests find what they left."""
    places = models.Places(toy.places.data, tmp_path / "checkout", tmp_path / "runs")
    shutil.copytree(toy.places.root, places.root)
    shutil.copytree(toy.places.runs, places.runs)
    entries = models.record(toy.places).entries

    def folder(step: str) -> Path:
        return (places.runs / next(name for name in entries[step]["files"] if name.endswith(".json"))).parent

    trained, given = folder("sylber-mini-encoder"), tmp_path / "better" / "encoder"
    shutil.copytree(trained.parent, given.parent)
    weights = load_file(given / "encoder.safetensors")
    save_file({name: tensor * 1.25 for name, tensor in weights.items()}, given / "encoder.safetensors")
    toy = Copy(toy, places)
    planned = toy.plan(syllable_encoder=given)
    assert planned["sylber-mini-encoder"] == "another encoder.safetensors is given"
    assert "w2vbert-mini-layer" not in planned
    # The record says with what the first encoder came out; the run began with that, or is refused.
    beginning = given.parent / "beginning.json"
    begun = json.loads(beginning.read_text())
    first = file_hash(folder("w2vbert-mini-encoder") / "encoder.safetensors")
    for init in ("0" * 16, None):
        beginning.write_text(json.dumps(begun | {"init": init}))
        with pytest.raises(SpeechtokError, match="another encoder than that of step w2vbert-mini-encoder"):
            toy.run("sylber-mini-encoder", syllable_encoder=given)
    beginning.write_text("[]")
    with pytest.raises(SpeechtokError, match="beginning.json is damaged"):
        toy.run("sylber-mini-encoder", syllable_encoder=given)
    beginning.write_text(json.dumps(begun | {"init": first[:16]}))
    assert toy.run("sylber-mini-encoder", syllable_encoder=given) == ["sylber-mini-encoder"]
    assert "sylber-mini-encoder" not in toy.plan()
    assert file_hash(folder("sylber-mini-encoder") / "encoder.safetensors") == file_hash(given / "encoder.safetensors")
    # Without its configuration nothing is claimed of it, and the recipe would replace it.
    (given.parent / "config.json").unlink()
    beginning.write_text(json.dumps(begun | {"init": "0" * 16}))
    assert toy.run("sylber-mini-encoder", syllable_encoder=given) == ["sylber-mini-encoder"]
    assert "settings changed" in toy.plan()["sylber-mini-encoder"]


def test_another_encoder_takes_the_place_of_the_old_one(toy, tmp_path):
    run = next(path.parent for path in toy.places.runs.glob("w2vbert-mini-toy-*/encoder"))
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
    for option, file in (
        ("encoder", "encoder"), ("syllable_encoder", "encoder"), ("codec", "tokenizer"), ("mert_encoder", "encoder"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"no {file}.json"):
            toy.steps(**{option: tmp_path})


def test_cards_refuse_tables_of_another_tokenizer(toy):
    results = toy.places.root / "benchmarks" / "results"
    other = cards.Figures.read(results / "units_mfcc-k6.json", results / "abx_mfcc-k6.json")
    with pytest.raises(FormatError, match="make them anew"):
        cards.write_card(toy.asset("mfcc-k4"), other, [], [], "make models", None)
    with pytest.raises(FormatError, match="no tables"):
        cards.Figures.read(results / "abx_mfcc-k6.json", results / "units_mfcc-k6.json")
    with pytest.raises(InputError, match="metadata.jsonl"):
        cards.corpora(toy.places.root)


def test_the_card_of_syllables_refuses_tables_of_another_tokenizer(toy, tmp_path):
    results = toy.places.root / "benchmarks" / "results"
    tables = [results / f"{kind}_sylber-mini.json" for kind in ("syllables", "continua")]
    origin = cards.Origin("toy", {}, {})

    def write(syllables: Path, continua: Path) -> None:
        syllable_card.write_card(toy.asset("sylber-mini"), syllables, continua, [], "make models", origin, [])

    with pytest.raises(FormatError, match="no tables of .*sylber-mini.*make them anew"):
        write(*tables[::-1])
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(tables[1].read_text())[1:]))
    with pytest.raises(FormatError, match="first row is that of w2vbert-mini"):
        write(tables[0], other)
    rows = json.loads(tables[0].read_text())
    rows[0]["facts"]["fingerprint"] = "123"
    other.write_text(json.dumps(rows))
    with pytest.raises(FormatError, match="made with 123; make it anew"):
        write(other, tables[1])


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
        heard = [told.index(f"{name}: new") for name in ("sylber-mini", "codec-mini", "mert-mini-encoder", "mert-mini")]
        assert heard == sorted(heard)
        assert (
            told.index("mfcc-k500: new") < told.index("card_mfcc-k500: new") < told.index("card_w2vbert-mini-k100: new")
        )
    assert list(tmp_path.iterdir()) == [tmp_path / "assets"]
    only = CliRunner().invoke(app, [str(x) for x in (*options, "--only", "units_mfcc-k500")], catch_exceptions=False)
    assert only.stdout.splitlines() == ["mfcc-k500: new", "units_mfcc-k500: new"]
    for option, file in (("--codec", "tokenizer"), ("--mert-encoder", "encoder")):
        with pytest.raises(InputError, match=f"no {file}.json"):
            CliRunner().invoke(app, [str(x) for x in (*options, option, tmp_path)], catch_exceptions=False)
    with pytest.raises(InputError, match="no folder assets"):
        CliRunner().invoke(app, [str(x) for x in (*options[:4], "--root", toy.places.data)], catch_exceptions=False)


def test_shipped_recipes_are_whole():
    for size in ("cpu", "gpu"):
        recipe = Recipe.read(f"w2vbert-mini-{size}", "w2v-bert")
        assert recipe.model["normalization"] == "stored"
        # The encoder of syllables of that size can begin with it, and takes its projected layer as the first teacher.
        config = section(W2vBertConfig, recipe.model, "model")
        projected = {"projected_layer": recipe.objective["contrastive_blocks"]}
        first = W2vBertEncoder(replace(config, **projected, projection_size=recipe.objective["final_dim"]))
        other = Recipe.read(f"sylber-mini-{size}", "sylber")
        model, settings = (section(W2vBertConfig, other.model, "model"), section(SylberConfig, other.objective, "o"))
        assert settings.teacher_layer == first.config.projected_layer
        assert other.data.speeds == recipe.data.speeds  # so that frames are decoded once
        teacher = W2vBertEncoder(first.config, settings.teacher_layer)
        SylberObjective(model, settings, teacher, perturb_config=other.perturb).begin_with(first)
    shipped = ("w2vbert", "sylber", "codec", "mert")
    assert {f"{name}-mini-{size}" for name in shipped for size in ("cpu", "gpu")} <= set(named())


def test_other_constants_of_the_seeds_train_the_encoder_of_syllables_anew(toy, monkeypatch):
    monkeypatch.setattr(syllable_models, "EnergySeeds", partial(syllable_models.EnergySeeds, pause=0.3))
    changed = {name: reason for name, reason in toy.plan().items() if "seeds" in reason}
    assert changed == dict.fromkeys(("sylber-mini-encoder", "syllables_sylber-mini"), "settings changed (seeds)")
