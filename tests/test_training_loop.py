"""The training loop: resume, two processes, recipes, metrics, the command."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok.encoders import from_pretrained
from speechtok.errors import CheckpointError, InputError, OutputError
from speechtok.training.mels import Mels
from speechtok.training.pretrain import pretrain
from speechtok.training.recipe import OptimizerConfig, Recipe, named

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "assets" / "clips"
RECIPE = """kind = "w2v-bert"

[model]
hidden_size = 24
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
conv_depthwise_kernel_size = 5
normalization = "stored"
attention_chunk = 8
attention_past = 8

[objective]
contrastive_blocks = 1
groups = 2
codes = 8
code_dim = 8
target_groups = 2
final_dim = 8
distractors = 5

[data]
crop_seconds = [1.28]
batch_seconds = 5.12

[perturb]
noise_probability = 0.0

[run]
steps = 6
precision = "float32"
log_every = 1
evaluate_every = 3
checkpoint_every = 3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def lines(run: Path, split: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def test_a_run_writes_all_it_promises(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    encoder = pretrain(recipe, CLIPS, run, held_out=CLIPS)
    assert encoder == run / "encoder"
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "encoder", "mels"} <= {
        path.name for path in run.iterdir()
    }
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(run, "held out")] == [3, 6]
    for line in lines(run):
        assert line["hours"] == pytest.approx(line["step"] * 5.12 / 3600)
    loaded = from_pretrained(encoder, 1)
    assert loaded.context is not None
    assert loaded.layer == 1
    assert loaded(torch.zeros(1, 16000)).features.shape == (1, 49, 8)  # projected, as the loss compares them
    # The stored statistics are those of the training sound.
    mels = Mels.build(CLIPS, run / "mels" / "train")
    assert torch.allclose(loaded.feature_mean, torch.from_numpy(mels.mean).bfloat16().float())


def test_a_resumed_run_is_the_uninterrupted_one(recipe: Path, tmp_path: Path) -> None:
    whole, broken, dropout = tmp_path / "whole", tmp_path / "broken", {"objective.dropout": 0.2}
    pretrain(recipe, CLIPS, whole, changes=dropout)

    class Killed(Exception):
        pass

    def kill(event) -> None:
        if event.stage == "train" and event.done == 5:
            raise Killed

    with pytest.raises(Killed):
        pretrain(recipe, CLIPS, broken, changes=dropout, on_event=kill)
    assert len(lines(broken)) == 5  # two of them after the checkpoint of step 3
    pretrain(recipe, CLIPS, broken, changes=dropout)
    assert losses(broken) == losses(whole)
    assert [line["step"] for line in lines(broken)] == [1, 2, 3, 4, 5, 6]
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_see_the_batch_of_one(recipe: Path, tmp_path: Path, torchrun) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    pretrain(recipe, CLIPS, alone)
    torchrun(
        "from speechtok.training.pretrain import pretrain; "
        f"pretrain({str(recipe)!r}, {str(CLIPS)!r}, Path({str(together)!r}))"
    )
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (alone, together))
    worst = max(float((one[name].float() - two[name].float()).abs().max()) for name in one)
    assert worst < 1e-3


def test_accumulated_micro_batches_are_the_whole_batch(recipe: Path, tmp_path: Path) -> None:
    # Without the diversity loss, whose mean over a batch is not a sum over its parts.
    off = {"objective.diversity_weight": 0.0}
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(recipe, CLIPS, one, changes=off)
    pretrain(recipe, CLIPS, two, changes={**off, "run.accumulate": 2})
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_folder_of_another_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    pretrain(recipe, CLIPS, tmp_path / "run", changes={"run.steps": 1})
    with pytest.raises(OutputError, match="another recipe"):
        pretrain(recipe, CLIPS, tmp_path / "run", changes={"run.steps": 2})


def test_a_run_goes_on_with_its_own_sound_only(recipe: Path, tmp_path: Path) -> None:
    pretrain(recipe, CLIPS, tmp_path / "run", changes={"run.steps": 1})
    clip = next(CLIPS.glob("librispeech*"))
    with pytest.raises(OutputError, match="began with another train"):
        pretrain(recipe, clip, tmp_path / "run", changes={"run.steps": 1})


def test_training_can_begin_with_given_weights(recipe: Path, tmp_path: Path) -> None:
    first = pretrain(recipe, CLIPS, tmp_path / "first")
    frozen = {"optimizer.learning_rate": 1e-12, "run.steps": 1}
    second = pretrain(recipe, CLIPS, tmp_path / "second", init=first, changes=frozen)
    one, two = from_pretrained(first).state_dict(), from_pretrained(second).state_dict()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    with pytest.raises(InputError, match="another size"):
        pretrain(recipe, CLIPS, tmp_path / "third", init=first, changes={"model.intermediate_size": 32})


def test_noise_and_its_probability_go_together(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="noise"):
        pretrain(recipe, CLIPS, tmp_path / "run", noise=CLIPS)
    run = tmp_path / "noisy"
    pretrain(recipe, CLIPS, run, noise=CLIPS, changes={"perturb.noise_probability": 1.0, "run.steps": 1})
    assert len(losses(run)) == 1


def test_a_second_part_has_its_own_rate_and_perturbation(recipe: Path, tmp_path: Path) -> None:
    parts = "\n[restart]\nstep = 4\nlearning_rate = 5e-4\n\n[restart_perturb]\nnoise_probability = 1.0\ngain_db = 9.0\n"
    steady = "final_dim = 8\ntemperature = [1.0, 1.0]"  # so that it does not matter how many steps are to come
    recipe.write_text(RECIPE.replace("final_dim = 8", steady) + parts)
    chosen = Recipe.read(recipe, "w2v-bert", {"run.steps": 8})
    assert [chosen.perturb_at(step).gain_db for step in (0, 3, 4, 7)] == [6.0, 6.0, 9.0, 9.0]
    rates = [chosen.learning_rate(step) for step in range(8)]
    assert rates[:4] == [Recipe.read(recipe, "w2v-bert", {"run.steps": 8}).optimizer.rate(1e-3, n, 4) for n in range(4)]
    assert max(rates[4:]) == pytest.approx(5e-4) and rates[3] < rates[4]
    assert "restart" not in Recipe.read(recipe_without(recipe), "w2v-bert").as_dict()
    short, plain = Recipe.read(recipe, "w2v-bert", {"run.steps": 4}), Recipe.read(recipe_without(recipe), "w2v-bert")
    assert not short.noisy and chosen.noisy
    assert short.learning_rate(3) == plain.optimizer.rate(1e-3, 3, 4)
    with pytest.raises(InputError, match="noise"):
        pretrain(recipe, CLIPS, tmp_path / "run", changes={"run.steps": 8})
    pretrain(recipe, CLIPS, tmp_path / "whole", noise=CLIPS, changes={"run.steps": 8, "run.checkpoint_every": 2})
    # Steps before the restart are those of a run that has none.
    constant = {"run.steps": 4, "objective.temperature": [1.0, 1.0]}
    plain = pretrain(recipe_without(recipe), CLIPS, tmp_path / "plain", changes=constant).parent
    assert losses(plain) == losses(tmp_path / "whole")[:4]


def recipe_without(path: Path) -> Path:
    """The same recipe without a second part."""
    plain = path.with_name("plain.toml")
    plain.write_text(RECIPE)
    return plain


def test_a_loss_that_is_not_finite_ends_the_run(recipe: Path, tmp_path: Path) -> None:
    wild = {"optimizer.learning_rate": 1e30, "optimizer.clip": 1e30, "run.checkpoint_every": 1}
    with pytest.raises(InputError, match="lower the learning rate"):
        pretrain(recipe, CLIPS, tmp_path / "run", changes=wild)


def test_runs_of_one_process_may_differ_in_precision(recipe: Path, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16", "float32"):
        run = tmp_path / precision
        pretrain(recipe, CLIPS, run, changes={"run.steps": 2, "run.precision": precision})
    assert losses(tmp_path / "float32") != losses(tmp_path / "bfloat16")


def test_a_device_that_is_not_there_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'foo'"):
        pretrain(recipe, CLIPS, tmp_path / "run", device="foo")
    assert not (tmp_path / "run").exists()  # before any sound is read


# ---- schedule, recipes, mels


def test_learning_rate_rises_and_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup=0.1, final=0.1)
    rates = [config.rate(1.0, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=2e-3)
    linear = OptimizerConfig(learning_rate=1.0, warmup=0.1, final=0.0, schedule="linear")
    assert linear.rate(1.0, 55, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("name", sorted(named()))
def test_shipped_recipes_are_valid(name: str) -> None:
    kind = next(line for line in named()[name].read_text().splitlines() if line.startswith("kind")).split('"')[1]
    recipe = Recipe.read(name, kind)
    assert recipe.run.steps > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run.speed": 3}, "no field 'speed'"),
        ({"run.steps": "many"}, "steps is 'many'; give int"),
        ({"run.precision": "int8"}, "precision"),
        ({"run.log_every": 2}, "multiple of log_every"),
        ({"data.crop_seconds": 3.0}, "give a list"),
        ({"nonsense.field": 1}, "unknown section 'nonsense'"),
        ({"optimizer.schedule": "zigzag"}, "zigzag"),
        ({"model.hidden_size": 25}, "multiple of num_attention_heads"),
        ({"model.width": 25}, "no field 'width'"),
        ({"objective.contrastive_blocks": 9}, "contrastive_blocks"),
        ({"data.speeds": [0.0]}, "speeds"),
        ({"data.batch_seconds": -5.0}, "batch_seconds"),
        ({"optimizer.learning_rate": -1.0}, "learning_rate"),
        ({"optimizer.betas": [0.9]}, "give 2 values"),
        ({"kind.x": 1}, "no section"),
        ({"perturb.vtlp": -1.0}, r"tiny\.toml.*vtlp"),
    ],
)
def test_wrong_recipes_are_refused_by_name(recipe: Path, tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises((InputError, CheckpointError), match=words):
        pretrain(recipe, CLIPS, tmp_path / "run", changes=change)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe"):
        Recipe.read("nonsense", "w2v-bert")
    bad = tmp_path / "bad.toml"
    bad.write_text("kind = ")
    with pytest.raises(InputError, match=r"bad\.toml"):
        Recipe.read(bad, "w2v-bert")
    bad.write_text('kind = "other"')
    with pytest.raises(InputError, match="no recipe for w2v-bert"):
        Recipe.read(bad, "w2v-bert")


def test_mels_are_kept_and_speeds_shorten(tmp_path: Path) -> None:
    first = Mels.build(CLIPS, tmp_path / "mels", (1.0, 1.25))
    written = (tmp_path / "mels" / "frames.f16").stat().st_mtime_ns
    second = Mels.build(CLIPS, tmp_path / "mels", (1.0, 1.25))
    assert (tmp_path / "mels" / "frames.f16").stat().st_mtime_ns == written
    assert (first.lengths == second.lengths).all()
    assert first.lengths[1] == pytest.approx(first.lengths[0] / 1.25, abs=4)
    assert abs(first.frames.astype(float).mean() - first.mean.mean()) < 1e-3
    third = Mels.build(CLIPS, tmp_path / "mels", (1.0,))  # another set of speeds is made anew
    assert len(third.lengths) == len(first.lengths) // 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.wav").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no usable sound"):
        Mels.build(tmp_path / "empty", tmp_path / "other")


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    run = CliRunner()
    arguments = ["train", "w2v-bert", "--recipe", str(recipe), "--data", str(CLIPS), "-o", str(tmp_path / "run")]
    done = run.invoke(app, [*arguments, "--set", "run.steps=2", "--log", "plain"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "encoder" / "encoder.json").exists()
    assert "training: 2 of 2" in done.output
    assert run.invoke(app, [*arguments, "--set", "steps"]).exit_code == 1
