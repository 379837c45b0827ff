"""Pre-training MERT: the driver, teachers on disk and in memory, resume, two processes, the command, recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok.encoders import from_pretrained
from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.errors import FormatError, InputError, OutputError
from speechtok.hub import load
from speechtok.quantizers.kmeans import KMeans
from speechtok.quantizers.residual import ResidualQuantizer
from speechtok.tokenizer import Tokenizer
from speechtok.training.mert import MertObjective
from speechtok.training.mert_config import MertConfig
from speechtok.training.music import KIND, pretrain_mert
from speechtok.training.music_teachers import TeacherCodes
from speechtok.training.recipe import Recipe, named, section
from speechtok.training.waves import Waves, identity_of

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "assets" / "clips"
RECIPE = """kind = "mert"

[model]
hidden_size = 24
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
conv_dim = [8, 8, 8, 8, 8, 8, 8]
num_conv_pos_embeddings = 8
num_conv_pos_embedding_groups = 2
do_stable_layer_norm = true
sample_rate = 24000

[objective]
final_dim = 8
cqt_bins = 24
cqt_bins_per_octave = 12
cqt_fmin = 261.6
dropout = 0.2
layerdrop = 0.2

[data]
crop_seconds = [1.2]
batch_seconds = 4.8

[run]
steps = 6
precision = "float32"
log_every = 1
evaluate_every = 3
checkpoint_every = 3
"""
STEADY = {"objective.dropout": 0.0, "objective.layerdrop": 0.0, "objective.mixture_probability": 0.0}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def make_teacher(folder: Path, seed: int = 0, **changes) -> Path:
    """A residual tokenizer of random frames, 75 per second; two books."""
    torch.manual_seed(seed)
    settings = {"sample_rate": 24000, "feat_extract_norm": "layer", "num_hidden_layers": 1} | changes
    config = HubertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, **settings,
    )  # fmt: skip
    encoder = HubertEncoder(config).eval()
    with torch.no_grad():
        frames = encoder(0.1 * torch.randn(1, 24000)).features[0].numpy()
    books = np.stack([frames[:12], 0.3 * np.random.default_rng(seed).normal(size=(12, 16))]).astype(np.float32)
    return Tokenizer(encoder, ResidualQuantizer(books), name="teacher").save(folder)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "teacher")


def lines(run: Path, split: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


class Killed(Exception):
    pass


def test_a_run_writes_all_it_promises(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    encoder = pretrain_mert(recipe, CLIPS, run, teacher=teacher, held_out=CLIPS)
    assert encoder == run / "encoder"
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "encoder", "waves", "codes"} <= {
        path.name for path in run.iterdir()
    }
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    held_out = lines(run, "held out")
    assert [line["step"] for line in held_out] == [3, 6]
    names = {"loss", "acoustic", "cqt", "penalty", "accuracy", "accuracy_book1", "accuracy_book2", "majority",
             "code_perplexity", "guess_perplexity", "cqt_r2", "attention_entropy_layer2", "alarms"}  # fmt: skip
    assert names <= set(held_out[0])
    for line in lines(run):
        assert line["hours"] == pytest.approx(line["step"] * 4.8 / 3600)
    for layer in (0, 1, 2):
        loaded = from_pretrained(encoder, layer)
        assert isinstance(loaded, HubertEncoder)
        assert loaded(torch.zeros(1, 24000)).features.shape == (1, 74, 24)
    assert loaded.config.do_stable_layer_norm


def test_a_longer_run_learns(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    changes = {**STEADY, "run.steps": 120, "run.evaluate_every": 60, "run.checkpoint_every": 120,
               "optimizer.learning_rate": 3e-3, "model.hidden_size": 48, "model.conv_dim": [24] * 7,
               "objective.feature_grad_mult": 1.0, "objective.feature_penalty": 1.0}  # fmt: skip
    pretrain_mert(recipe, CLIPS, tmp_path / "run", teacher=teacher, held_out=CLIPS, changes=changes)
    first, last = lines(tmp_path / "run", "held out")
    assert last["loss"] < first["loss"] < losses(tmp_path / "run")[0]
    assert last["cqt_r2"] > max(0.05, first["cqt_r2"])
    assert last["accuracy"] > last["majority"]
    assert last["alarms"] == []


def test_a_resumed_run_is_the_uninterrupted_one(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain_mert(recipe, CLIPS, whole, teacher=teacher)

    def kill(event) -> None:
        if event.stage == "train" and event.done == 5:
            raise Killed

    with pytest.raises(Killed):
        pretrain_mert(recipe, CLIPS, broken, teacher=teacher, on_event=kill)
    assert len(lines(broken)) == 5  # two of them after the checkpoint of step 3
    stages: list[str] = []
    pretrain_mert(recipe, CLIPS, broken, teacher=teacher, on_event=lambda event: stages.append(event.stage))
    assert set(stages) == {"train"}  # nothing is read or encoded again
    assert losses(broken) == losses(whole)
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_see_the_batch_of_one(recipe: Path, teacher: Path, tmp_path: Path, torchrun) -> None:
    """But for dropout and the mixture, which takes from the crops of its own process."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes = {**STEADY, "objective.layerdrop": 0.3}
    pretrain_mert(recipe, CLIPS, alone, teacher=teacher, changes=changes)
    torchrun(
        "from speechtok.training.music import pretrain_mert; "
        f"pretrain_mert({str(recipe)!r}, {str(CLIPS)!r}, Path({str(together)!r}), teacher={str(teacher)!r}, "
        f"changes={changes})"
    )
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (alone, together))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3


def test_accumulated_micro_batches_are_the_whole_batch(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain_mert(recipe, CLIPS, one, teacher=teacher, changes=STEADY)
    pretrain_mert(recipe, CLIPS, two, teacher=teacher, changes={**STEADY, "run.accumulate": 2})
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"objective.sigma_reparam": True}, {"objective.attention_relaxation": 32.0},
                                     {"model.feature_extractor_cqt": True, "model.feature_extractor_cqt_bins": 84},
                                     {"run.precision": "bfloat16"}, {"model.do_stable_layer_norm": False}])  # fmt: skip
def test_options_train(recipe: Path, teacher: Path, tmp_path: Path, changes: dict) -> None:
    run = tmp_path / "run"
    folder = pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={**STEADY, **changes, "run.steps": 3})
    assert np.isfinite(losses(run)).all()
    assert not [name for name in from_pretrained(folder).state_dict() if "parametrizations" in name]


def test_relaxation_changes_nothing_but_rounding(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    for name, value in (("plain", 1.0), ("relaxed", 32.0)):
        changes = {**STEADY, "objective.attention_relaxation": value}
        pretrain_mert(recipe, CLIPS, tmp_path / name, teacher=teacher, changes=changes)
    assert losses(tmp_path / "relaxed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


# ---- teachers


def test_codes_in_memory_are_those_on_disk(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    pretrain_mert(recipe, CLIPS, disk, teacher=teacher)
    pretrain_mert(recipe, CLIPS, memory, teacher=teacher, changes={"objective.cached": False})
    assert not (memory / "codes").exists()
    assert losses(memory) == losses(disk)


def test_codes_are_those_of_whole_items(teacher: Path, tmp_path: Path) -> None:
    tokenizer, waves = load(teacher), Waves.build(CLIPS, tmp_path / "waves")
    codes = TeacherCodes.on_disk(tokenizer, waves, identity_of(tmp_path / "waves"), tmp_path / "codes")
    assert (codes.codebooks, codes.vocab_size) == (2, 12)
    in_memory = TeacherCodes.in_memory(tokenizer, waves)
    for item, length in enumerate(waves.lengths.tolist()):
        units = tokenizer.encode(waves.cut(item, 0, length), 24000)
        assert np.array_equal(codes.item(item), units.ids.T)
        assert np.array_equal(codes.item(item), in_memory.item(item))
    found, known = codes.on_grid(tokenizer.encoder.grid, 1, 20, 30)
    assert known.all()
    assert np.array_equal(found, codes.item(1)[20:50])
    # Attention and norms look at the whole item: a crop on its own would get other codes.
    crop = tokenizer.encode(waves.cut(1, 20, 31), 24000).ids.T
    assert not np.array_equal(crop, found)


def test_an_interrupted_teacher_goes_on(teacher: Path, tmp_path: Path, monkeypatch) -> None:
    import speechtok.training.music_teachers as module

    monkeypatch.setattr(module, "_ITEMS_AT_ONCE", 1)
    tokenizer, waves = load(teacher), Waves.build(CLIPS, tmp_path / "waves")
    assert len(waves.lengths) >= 3
    whole = TeacherCodes.on_disk(tokenizer, waves, "x", tmp_path / "whole")
    events: list[float] = []

    def kill(event) -> None:
        events.append(event.done)
        if len(events) == 2:
            raise Killed

    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        TeacherCodes.on_disk(tokenizer, waves, "x", broken, kill)
    with (broken / "codes.u16").open("ab") as file:  # it died in the middle of the next item
        file.write(b"12345")
    with (broken / "frames.txt").open("a") as file:
        file.write("7")
    calls: list[float] = []

    def watched(*call, compute=module._codes):
        # Whoever is killed right now loses nothing of what the first call had done.
        assert (broken / "frames.txt").read_text().count("\n") == 2 + len(calls)
        return compute(*call)

    monkeypatch.setattr(module, "_codes", watched)
    again = TeacherCodes.on_disk(tokenizer, waves, "x", broken, lambda event: calls.append(event.done))
    assert len(calls) == len(waves.lengths) - 2
    assert calls[-1] == pytest.approx(waves.hours * 3600)
    for item in range(len(waves.lengths)):
        assert np.array_equal(again.item(item), whole.item(item))
    with pytest.raises(OutputError, match="other sound"):
        TeacherCodes.on_disk(tokenizer, waves, "y", broken)
    (broken / "frames.txt").write_text("12\nmany\n")
    with pytest.raises(FormatError, match="line 2"):
        TeacherCodes.on_disk(tokenizer, waves, "x", broken)
    (broken / "teacher.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        TeacherCodes.on_disk(tokenizer, waves, "x", broken)


def test_a_teacher_with_one_codebook(recipe: Path, tmp_path: Path) -> None:
    first = load(make_teacher(tmp_path / "teacher"))
    Tokenizer(first.encoder, KMeans(np.random.default_rng(0).normal(size=(9, 16))), name="one").save(tmp_path / "one")
    run = tmp_path / "run"
    pretrain_mert(recipe, CLIPS, run, teacher=tmp_path / "one", changes={"run.steps": 2})
    assert "accuracy_book1" in lines(run)[0]
    assert "accuracy_book2" not in lines(run)[0]


def test_ablations_are_switches_of_the_recipe(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    short = {"run.steps": 2}
    run = tmp_path / "no-rvq"
    pretrain_mert(recipe, CLIPS, run, changes={**short, "objective.acoustic_weight": 0.0, "objective.books": 2})
    assert "cqt_r2" in lines(run)[0]
    assert "accuracy" not in lines(run)[0]
    run = tmp_path / "no-cqt"
    pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={**short, "objective.cqt_weight": 0.0})
    assert "cqt_r2" not in lines(run)[0]
    run = tmp_path / "no-mixture"
    pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={**short, "objective.mixture_probability": 0.0})
    assert {"cqt_r2", "accuracy"} <= set(lines(run)[0])


# ---- refusals


def test_a_run_goes_on_with_its_own_sound_and_teacher_only(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    short, run = {"run.steps": 1}, tmp_path / "run"
    pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes=short)
    other = make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(OutputError, match="another teacher"):
        pretrain_mert(recipe, CLIPS, run, teacher=other, changes=short)
    with pytest.raises(OutputError, match="other sound"):
        pretrain_mert(recipe, next(CLIPS.glob("librispeech*")), run, teacher=teacher, changes=short)
    memory = {**short, "objective.cached": False}
    pretrain_mert(recipe, CLIPS, tmp_path / "memory", teacher=teacher, changes=memory)
    with pytest.raises(OutputError, match="began with another teacher"):
        pretrain_mert(recipe, CLIPS, tmp_path / "memory", teacher=other, changes=memory)
    # The place of the layer norms leaves no trace in the weights: it must be that of the run (K10).
    for name, value in (("model.do_stable_layer_norm", False), ("objective.mask_span", 3)):
        with pytest.raises(OutputError, match="another recipe"):
            pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={**short, name: value})


def test_what_does_not_fit_is_refused_before_anything_is_read(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="go together"):
        pretrain_mert(recipe, CLIPS, run)
    with pytest.raises(InputError, match="go together"):
        pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={"objective.acoustic_weight": 0.0})
    with pytest.raises(InputError, match="2 codebooks"):
        pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={"objective.books": 3})
    with pytest.raises(InputError, match="perturb"):
        pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={"data.speeds": [1.0, 0.9]})
    with pytest.raises(InputError, match="perturb"):
        pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={"perturb.vtlp": 0.1})
    with pytest.raises(InputError, match="top bin"):
        pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={"objective.cqt_bins": 300})
    with pytest.raises(InputError, match="no field 'books'"):
        pretrain_mert(recipe, CLIPS, run, teacher=teacher, changes={"model.books": 3})
    assert not run.exists()


def test_a_teacher_of_another_rate_is_refused(recipe: Path, tmp_path: Path) -> None:
    slow = make_teacher(tmp_path / "slow", sample_rate=16000)
    for name, changes in ((slow, {}), ("mfcc-k100", {"objective.cached": False})):
        with pytest.raises(InputError, match="cannot teach"):
            pretrain_mert(recipe, CLIPS, tmp_path / "run", teacher=name, changes=changes)


# ---- command, recipes


def test_the_command(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    arguments = ["train", "mert", "--recipe", str(recipe), "--data", str(CLIPS), "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(
        app, [*arguments, "--teacher", str(teacher), "--held-out", str(CLIPS), "--set", "run.steps=2", "--log", "plain"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(tmp_path / "run" / "encoder")
    done = CliRunner().invoke(app, ["train", "mert", "--recipe", "w2vbert-mini-cpu", "--data", ".", "-o", "x"])
    assert done.exit_code != 0
    assert "no recipe for mert" in str(done.exception or done.output)


@pytest.mark.parametrize("name", sorted(name for name in named() if name.startswith("mert")))
def test_shipped_recipes_fit_their_classes(name: str) -> None:
    recipe = Recipe.read(name, KIND)
    model, config = (
        section(HubertConfig, recipe.model, "model"),
        section(MertConfig, recipe.objective, "objective"),
    )
    assert model.sample_rate == 24000
    if name == "mert-mini-cpu":
        objective = MertObjective(model, config, 8, 1024)
        assert sum(p.numel() for p in objective.encoder.parameters()) < 5e6
    encoder = HubertEncoder(model)
    assert encoder.grid.rate == 75
