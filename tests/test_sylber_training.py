"""Training of Sylber encoders: what a run leaves, resume across stages, two processes, the command."""

import json
from pathlib import Path

import pytest
import torch
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok.encoders import from_pretrained
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError, OutputError
from speechtok.training.recipe import Recipe, named, section
from speechtok.training.sylber import SylberObjective
from speechtok.training.sylber_config import SylberConfig
from speechtok.training.syllables import KIND, self_segment

CLIPS = Path(__file__).resolve().parents[1] / "assets" / "clips"
SIZES = """hidden_size = 24
num_attention_heads = 2
intermediate_size = 48
conv_depthwise_kernel_size = 5
normalization = "stored"
attention_chunk = 8
attention_past = 8
"""
RECIPE = f"""kind = "sylber"

[model]
num_hidden_layers = 1
{SIZES}
projected_layer = 1
projection_size = 8
gated = true

[objective]
teacher_layer = 2
generations = 2
mixture_probability = 0.5
dropout = 0.1

[data]
crop_seconds = [1.28]
batch_seconds = 5.12

[perturb]
noise_probability = 0.0

[run]
steps = 8
precision = "float32"
log_every = 1
evaluate_every = 4
checkpoint_every = 2

[restart]
step = 4
"""


SHORT = {"run.steps": 2, "restart.step": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> Path:
    """An encoder to begin with, one block deeper than the student."""
    torch.manual_seed(1)
    sizes = dict(line.split(" = ") for line in SIZES.splitlines())
    config = W2vBertConfig(num_hidden_layers=2, **{name: json.loads(value) for name, value in sizes.items()})
    encoder = W2vBertEncoder(config)
    encoder.feature_mean.fill_(10.0)
    encoder.feature_scale.fill_(0.3)
    return save_encoder(encoder, tmp_path_factory.mktemp("init") / "encoder")


def lines(run: Path, split: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def test_a_run_goes_through_its_stages_and_leaves_an_encoder(recipe: Path, init: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    encoder = self_segment(recipe, CLIPS, run, init=init, held_out=CLIPS)
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "encoder"} <= {
        path.name for path in run.iterdir()
    }
    assert [line["stage"] for line in lines(run)] == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [line["step"] for line in lines(run, "held out")] == [4, 8]
    loaded = from_pretrained(encoder)
    frames = loaded(torch.randn(1, 16000)).features
    assert frames.shape == (1, 49, 8)
    assert float(frames.norm(dim=-1).max()) <= 1.0
    assert loaded.exact_stream
    given = from_pretrained(init)
    assert torch.equal(loaded.feature_mean, given.feature_mean)


def test_the_student_begins_with_the_blocks_of_the_given_encoder(init: Path) -> None:
    sizes = {name: json.loads(value) for name, value in (line.split(" = ") for line in SIZES.splitlines())}
    model = W2vBertConfig(num_hidden_layers=1, projected_layer=1, projection_size=8, gated=True, **sizes)
    given = from_pretrained(init)
    objective = SylberObjective(model, SylberConfig(teacher_layer=2), given)
    before = objective.encoder.projection.weight.clone()
    objective.begin_with(given)
    ours, theirs = objective.encoder.state_dict(), given.state_dict()
    shared = [name for name in ours if not name.startswith("projection.")]
    assert len(shared) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert torch.equal(objective.encoder.projection.weight, before)


def test_a_resumed_run_is_the_uninterrupted_one(recipe: Path, init: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    self_segment(recipe, CLIPS, whole, init=init)

    class Killed(Exception):
        pass

    for at in (3, 7):  # in the first stage and in the last generation

        def kill(event, at=at) -> None:
            if event.stage == "train" and event.done == at:
                raise Killed

        with pytest.raises(Killed):
            self_segment(recipe, CLIPS, broken, init=init, on_event=kill)
    self_segment(recipe, CLIPS, broken, init=init)
    assert losses(broken) == losses(whole)
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_see_the_batch_of_one(recipe: Path, init: Path, tmp_path: Path, torchrun) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    self_segment(recipe, CLIPS, alone, init=init, changes={"objective.dropout": 0.0})
    torchrun(
        "from speechtok.training.syllables import self_segment; "
        f"self_segment({str(recipe)!r}, {str(CLIPS)!r}, Path({str(together)!r}), init=Path({str(init)!r}), "
        "changes={'objective.dropout': 0.0})"
    )
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    thresholds = [[line["threshold"] for line in lines(run)] for run in (together, alone)]
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-4)


def test_from_scratch_the_input_frames_are_the_teacher(recipe: Path, tmp_path: Path) -> None:
    changes = {"objective.teacher_layer": 0, "objective.identity_init": True, "model.projection_size": 12,
               "data.speeds": [1.0, 0.9, 1.1]}  # fmt: skip
    with pytest.raises(InputError, match="too few"):  # 24 s hold fewer syllables than the frames have dimensions
        self_segment(recipe, CLIPS, tmp_path / "few", changes={**changes, "data.speeds": [1.0]})
    encoder = self_segment(recipe, CLIPS, tmp_path / "run", changes=changes)
    assert from_pretrained(encoder).dim == 12


def test_what_does_not_fit_is_refused_before_anything_is_read(recipe: Path, init: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher_layer"):
        self_segment(recipe, CLIPS, tmp_path / "a")
    with pytest.raises(InputError, match="noise"):
        self_segment(recipe, CLIPS, tmp_path / "b", init=init, noise=CLIPS)
    with pytest.raises(InputError, match="another size"):
        self_segment(recipe, CLIPS, tmp_path / "c", init=init, changes={"model.hidden_size": 32})
    with pytest.raises(InputError, match="second stage"):
        self_segment(recipe, CLIPS, tmp_path / "d", init=init, changes={"run.steps": 4})
    with pytest.raises(InputError, match="projection_size"):
        self_segment(recipe, CLIPS, tmp_path / "d", init=init, changes={"model.projection_size": 400})
    assert not any((tmp_path / name).exists() for name in "abcd")
    self_segment(recipe, CLIPS, tmp_path / "run", init=init, changes=SHORT)
    with pytest.raises(OutputError, match="another"):
        self_segment(recipe, CLIPS, tmp_path / "run", init=init)


def test_shipped_recipes_fit_their_classes() -> None:
    found = [path for name, path in named().items() if name.startswith("sylber")]
    assert found
    for path in found:
        recipe = Recipe.read(path, KIND)
        model, config = (
            section(W2vBertConfig, recipe.model, "model"),
            section(SylberConfig, recipe.objective, "objective"),
        )
        assert W2vBertEncoder(model).exact_stream
        assert model.gated
        assert config.teacher_layer > 0
        assert recipe.restart is not None
        assert recipe.restart.step < recipe.run.steps


def test_boundaries_are_watched_on_aligned_speech(recipe: Path, init: Path, tmp_path: Path, shared) -> None:
    dev = shared / "speech" / "dev"
    from speechtok.training.syllable_probe import SyllableProbe

    encoder = from_pretrained(self_segment(recipe, CLIPS, tmp_path / "run", init=init, changes=SHORT, aligned=dev))
    (line,) = lines(tmp_path / "run", "held out")
    names = {f"{name}_{x}" for name in ("f1", "r_value", "rate") for x in (0.5, 0.6, 0.7, 0.8)}
    assert names <= set(line)
    probe = SyllableProbe.read(dev, encoder, utterances=4)
    figures = probe(encoder)
    assert set(figures) == names
    assert all(0 <= value <= 1 for name, value in figures.items() if name.startswith("f1"))
    with torch.no_grad():  # a gate that is always shut meets no boundary, which is no reason to fail
        encoder.projection.weight[-1].zero_()
        encoder.projection.bias[-1] = -20.0
    assert set(probe(encoder).values()) == {0.0}


def test_the_command(recipe: Path, init: Path, tmp_path: Path) -> None:
    arguments = ["train", "sylber", "--recipe", str(recipe), "--data", str(CLIPS), "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*arguments, "--init", str(init), "--set", "run.steps=2", "--set", "restart.step=1"])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "run" / "encoder") in done.output
    done = CliRunner().invoke(app, ["train", "sylber", "--recipe", "w2vbert-mini-cpu", "--data", ".", "-o", "x"])
    assert done.exit_code != 0
    assert "no recipe for sylber" in str(done.exception or done.output)
