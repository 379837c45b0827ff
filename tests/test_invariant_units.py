"""Augmentation-invariant quantizers: frames on disk, CTC, NAST, rounds and their guards, resume, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechtok.cli import app
from torch.nn import functional as F
from typer.testing import CliRunner

from speechtok.audio.augment import AugmentResources, augment
from speechtok.audio.decode import load
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import FormatError, InputError, OutputError
from speechtok.metrics.edit_distance import unit_edit_distance
from speechtok.quantizers.kmeans import KMeans
from speechtok.quantizers.mlp import MlpQuantizer
from speechtok.tokenizer import Tokenizer
from speechtok.training import invariant
from speechtok.training.augmented import CLEAN, AugmentedFrames
from speechtok.training.ctc_units import CtcConfig, CtcObjective
from speechtok.training.invariant import train_invariant
from speechtok.training.nast import NastConfig, NastObjective, resized
from speechtok.training.sampler import Crop
from speechtok.training.unit_probe import steadiness
from speechtok.units import run_lengths

CLIPS = Path(__file__).resolve().parents[1] / "assets" / "clips"
FAMILIES = ("noise", "stretch")
RECIPE = """kind = "invariant"

[objective]
method = "ctc"
families = ["noise", "stretch"]
neighbours = 1
hidden = [16]
rounds = 2

[data]
crop_seconds = [0.8]
batch_seconds = 6.4

[optimizer]
learning_rate = 1e-2

[run]
steps = 6
precision = "float32"
log_every = 1
evaluate_every = 3
checkpoint_every = 3
"""


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Two seconds of each of three clips, and a silent file, which no noise can be mixed into."""
    folder = tmp_path_factory.mktemp("sounds")
    for clip in sorted(CLIPS.glob("librispeech-*.[fo]*"))[:3]:
        soundfile.write(folder / f"{clip.stem}.flac", load(clip, 16000)[:32000], 16000)
    soundfile.write(folder / "silence.wav", np.zeros(16000), 16000)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tiny encoder in exact chunks with 12 clusters of its frames."""
    torch.manual_seed(0)
    config = W2vBertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_depthwise_kernel_size=3,
        normalization="stored", attention_chunk=8, attention_past=8, look_ahead=3, smoothing=3, projected_layer=1,
        projection_size=8,
    )  # fmt: skip
    encoder = W2vBertEncoder(config).eval()
    encoder.feature_mean += 10.0
    encoder.feature_scale *= 0.3
    with torch.no_grad():
        frames = encoder(torch.from_numpy(load(sorted(CLIPS.glob("*.flac"))[0], 16000))[None]).features[0].numpy()
    made = Tokenizer(encoder, KMeans(frames[:: len(frames) // 12][:12]), name="tiny")
    return made.save(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="module")
def frames(sounds: Path, tmp_path_factory) -> AugmentedFrames:
    return build(sounds, tmp_path_factory.mktemp("frames"))


def build(sounds: Path, folder: Path, **changes) -> AugmentedFrames:
    settings = {"families": FAMILIES, "resources": AugmentResources.default(), "resources_identity": "default"}
    return AugmentedFrames.build(sounds, MfccEncoder(), folder, copies=2, **(settings | changes))


# ---- frames


def test_frames_are_those_of_the_augmented_sounds(frames: AugmentedFrames, sounds: Path) -> None:
    assert frames.versions == (CLEAN, "noise", "stretch", "noise", "stretch")
    assert len(frames.lengths) == 3 and frames.rate == 100
    (reason,) = frames.failed
    assert "silence.wav" in reason
    resources, encoder = AugmentResources.default(), MfccEncoder()
    for item, path in enumerate(sorted(sounds.glob("*.flac"))):
        wave = load(path, 16000)
        for version, (family, seed) in enumerate([("noise", 0), ("stretch", 0), ("noise", 1), ("stretch", 1)], 1):
            changed = augment(wave, 16000, family, path.stem, seed, resources)
            wanted = encoder(torch.from_numpy(changed)[None]).features[0].numpy()
            np.testing.assert_allclose(frames.whole(item, version), wanted, rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(frames.whole(item, 0), frames.cut(item, 0, 0, 10_000))


def test_frames_are_read_again_unless_something_changed(sounds: Path, tmp_path: Path, monkeypatch) -> None:
    first = build(sounds, tmp_path)
    calls = []
    monkeypatch.setattr("speechtok.training.augmented.augment", lambda *args: calls.append(args[2]) or augment(*args))
    assert np.array_equal(build(sounds, tmp_path).frames, first.frames) and not calls
    build(sounds, tmp_path, resources_identity="others")
    assert len(calls) > 3


def test_unknown_families_are_refused_before_anything_is_decoded(sounds: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("speechtok.training.augmented.store", lambda *args, **options: pytest.fail("too late"))
    for families, message in (((), "at least one of each"), (("noise", "nois"), "one of stretch")):
        with pytest.raises(InputError, match=message):
            build(sounds, tmp_path, families=families)


def test_a_cut_of_a_stretched_version_is_the_same_share(frames: AugmentedFrames) -> None:
    for item in range(3):
        total, stretched = frames.lengths[item], frames.places[item, 2, 1]
        assert abs(stretched - total) > 2
        rows = frames.cut(item, 2, 50, 100)
        low, high = (round(place * stretched / total) for place in (50, 150))
        np.testing.assert_array_equal(rows, frames.whole(item, 2)[low:high])


def test_neighbours_stand_beside_a_frame(frames: AugmentedFrames) -> None:
    whole = frames.whole(0, 0)
    rows = frames.cut(0, 0, 20, 30, neighbours=2).reshape(30, 5, -1)
    for place in range(5):
        np.testing.assert_array_equal(rows[:, place], whole[18 + place : 48 + place])
    np.testing.assert_array_equal(frames.whole(0, 0, 1)[0].reshape(3, -1), whole[[0, 0, 1]])
    np.testing.assert_array_equal(frames.whole(0, 0, 1)[-1].reshape(3, -1), whole[[-2, -1, -1]])


# ---- CTC


def kmeans(frames: AugmentedFrames, clusters: int = 12) -> KMeans:
    rows = frames.whole(0, 0)
    return KMeans(rows[:: len(rows) // clusters][:clusters])


def crops(*items: int, length: int = 100, step: int = 0) -> list[Crop]:
    return [Crop(item, 20, length, (0, step, row)) for row, item in enumerate(items)]


def test_targets_are_the_runs_of_clean_units(frames: AugmentedFrames) -> None:
    teacher = kmeans(frames)
    objective = CtcObjective(CtcConfig(hidden=(8,), clean_share=0.0), teacher, 39, neighbours=1)
    batch = objective.collate(crops(0, 1, 2), frames, None, training=True)
    assert batch["features"].shape[2] == 3 * 39
    for row in range(3):
        clean = torch.from_numpy(frames.cut(row, 0, 20, 100))[None]
        wanted = run_lengths(teacher(clean).ids[0, 0].numpy())[0]
        count = int(batch["target_lengths"][row])
        np.testing.assert_array_equal(batch["targets"][row, :count].numpy(), wanted)
        assert not np.array_equal(batch["features"][row, :100].numpy(), frames.cut(row, 0, 20, 100, 1))


def test_the_share_of_clean_crops(frames: AugmentedFrames) -> None:
    objective = CtcObjective(CtcConfig(hidden=(8,), clean_share=0.3), kmeans(frames), 39)
    found = np.array([objective._drawn(Crop(0, 0, 50, (0, step, 0)), 5) for step in range(3000)])
    shares = np.bincount(found, minlength=5) / 3000
    np.testing.assert_allclose(shares, [0.3, 0.175, 0.175, 0.175, 0.175], atol=0.03)


def perfect(teacher: KMeans) -> CtcObjective:
    """A student whose logits are so sharp that it names the teacher's units (check 6 of the spec)."""
    objective = CtcObjective(CtcConfig(hidden=(), clean_share=0.9999), teacher, 39)
    with torch.no_grad():  # the nearest centroid has the largest 2 c.x - |c|^2
        layer = objective.mlp.layers[0]
        layer.weight.copy_(200 * teacher.centroids)
        layer.bias.copy_(-100 * teacher.centroids.square().sum(1))
    return objective


def test_the_teachers_own_labels_cost_nothing(frames: AugmentedFrames) -> None:
    objective = perfect(kmeans(frames))
    batch = objective.collate(crops(0, 1, 2), frames, None, training=False)
    loss, figures = objective(batch, objective.weight_of(batch), 0.0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-3) and int(figures["impossible"]) == 0
    summary = objective.summary({**figures, "loss": loss * objective.weight_of(batch)})
    assert summary["loss"] == pytest.approx(float(loss))


def test_the_loss_sums_over_alignments_without_blanks(frames: AugmentedFrames) -> None:
    teacher = KMeans(np.eye(3, 39))
    objective = CtcObjective(CtcConfig(hidden=()), teacher, 39)
    features = torch.randn(1, 4, 39)
    batch = {
        "features": features, "lengths": torch.tensor([4]), "targets": torch.tensor([[2, 0]]),
        "target_lengths": torch.tensor([2]),
    }  # fmt: skip
    probabilities = objective.mlp(features)[0].softmax(-1)
    paths = [[2, 0, 0, 0], [2, 2, 0, 0], [2, 2, 2, 0]]
    total = sum(torch.stack([probabilities[t, unit] for t, unit in enumerate(path)]).prod() for path in paths)
    loss, _ = objective(batch, 2, 0.0)
    assert float(loss) == pytest.approx(float(-total.log() / 2), rel=1e-5)


def test_one_batch_can_be_learned_by_heart(frames: AugmentedFrames) -> None:
    torch.manual_seed(0)
    objective = CtcObjective(CtcConfig(hidden=(64,), clean_share=0.0), kmeans(frames), 39, neighbours=2)
    rows = np.concatenate([frames.whole(item, 0, 2) for item in range(3)])
    objective.standardize(rows.mean(0), rows.std(0))
    batch = objective.collate(crops(0, 1, 2), frames, None, training=True)
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = objective(batch, objective.weight_of(batch), 0.0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]
    units = objective.mlp(batch["features"]).argmax(-1)
    found = [units[row, : batch["lengths"][row]].numpy() for row in range(3)]
    wanted = [batch["targets"][row, : batch["target_lengths"][row]].numpy() for row in range(3)]
    assert unit_edit_distance(wanted, found) < 2


def test_a_teacher_of_other_frames_is_refused(frames: AugmentedFrames) -> None:
    with pytest.raises(InputError, match="39 values, the encoder gives 26"):
        CtcObjective(CtcConfig(), KMeans(np.eye(2, 39)), 26)
    with pytest.raises(InputError, match="hidden"):
        CtcConfig(hidden=(0,))


# ---- NAST


def nast(**changes) -> NastObjective:
    torch.manual_seed(0)
    settings = {"units": 6, "hidden": (8,), "width": 8, "heads": 2, "inner": 8, "residual_dim": 4, "decoder_blocks": 1}
    return NastObjective(NastConfig(**(settings | changes)), 39, neighbours=1)


def test_losses_are_their_formulas(frames: AugmentedFrames) -> None:
    objective = nast(robust_from=0.5)
    batch = objective.collate(crops(0, 1), frames, None, training=False)
    loss, figures = objective(batch, objective.weight_of(batch), 0.6)
    soft = (objective.mlp(batch["clean"]) / 0.8).softmax(-1)
    shares = soft.mean(1)  # both crops are full
    diversity = (shares * shares.log()).sum(-1).mean() / np.log(6)
    heard = resized(objective.mlp(batch["heard"]), batch["heard_lengths"], batch["lengths"], 100)
    robustness = F.cross_entropy(heard.flatten(0, 1), soft.flatten(0, 1))
    total = int(figures["frames"])
    assert total == 200
    assert float(figures["diversity"]) / total == pytest.approx(float(diversity), rel=1e-4)
    assert float(figures["robustness"]) / total == pytest.approx(float(robustness), rel=1e-4)
    reconstruction = float(figures["reconstruction"]) / total
    assert float(loss) == pytest.approx(2 * reconstruction + float(diversity + robustness), rel=1e-4)
    early, _ = objective(batch, objective.weight_of(batch), 0.4)
    assert float(early) == pytest.approx(2 * reconstruction + float(diversity), rel=1e-4)


def test_clean_units_are_fixed_targets(frames: AugmentedFrames) -> None:
    objective = nast(reconstruction_weight=0.0, diversity_weight=0.0, robust_from=0.0)
    batch = objective.collate(crops(0, 1), frames, None, training=False)
    batch["heard"] = batch["heard"].detach()
    clean = batch["clean"].clone().requires_grad_()
    loss, _ = objective({**batch, "clean": clean}, 1.0, 1.0)
    loss.backward()
    assert not bool(clean.grad.any())


def test_padding_has_no_say_in_nast(frames: AugmentedFrames) -> None:
    objective = nast(robust_from=0.0)
    short = [Crop(0, 20, 60, (0, 0, 0))]
    alone = objective.collate(short, frames, None, training=False)
    both = objective.collate([*short, Crop(1, 20, 100, (0, 0, 1))], frames, None, training=False)
    other = objective.collate([Crop(1, 20, 100, (0, 0, 1))], frames, None, training=False)
    sums = [objective(batch, 1.0, 1.0)[0] for batch in (alone, other, both)]
    assert float(sums[2]) == pytest.approx(float(sums[0] + sums[1]), rel=1e-4)


def test_noise_is_drawn_by_the_seed_alone(frames: AugmentedFrames) -> None:
    objective = nast()
    first, second = (objective.collate(crops(0, 1, step=4), frames, None, training=True)["noise"] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 100, 6)
    assert not torch.equal(first, objective.collate(crops(0, 1, step=5), frames, None, training=True)["noise"])
    assert "noise" not in objective.collate(crops(0, 1), frames, None, training=False)


def test_resizing_is_torchs_linear_interpolation() -> None:
    rows = torch.randn(2, 50, 3)
    lengths, wanted = torch.tensor([50, 31]), torch.tensor([40, 44])
    found = resized(rows, lengths, wanted, 44)
    for row in range(2):
        expected = F.interpolate(rows[row : row + 1, : lengths[row]].mT, size=int(wanted[row]), mode="linear").mT[0]
        torch.testing.assert_close(found[row, : wanted[row]], expected, rtol=1e-4, atol=1e-4)


def test_unusable_settings_of_nast_are_refused() -> None:
    for changes, words in (({"units": 0}, "sizes"), ({"heads": 3}, "multiple"), ({"robust_from": 2.0}, "share")):
        with pytest.raises(InputError, match=words):
            nast(**changes)


# ---- the driver


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def test_figures_of_steadiness(frames: AugmentedFrames) -> None:
    assert steadiness(lambda rows: np.zeros(len(rows), np.int32), frames, 4)["ued"] == 0
    teacher = kmeans(frames)
    found = steadiness(lambda rows: teacher(torch.from_numpy(rows)[None]).ids[0, 0].numpy(), frames, 12)
    assert found["ued"] == pytest.approx((found["ued_noise"] + found["ued_stretch"]) / 2)
    assert found["ued"] > 20 and 4 < found["perplexity"] <= 12


def test_rounds_make_a_tokenizer(recipe: Path, sounds: Path, tokenizer: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(invariant, "_worse", lambda before, after: "")
    run = tmp_path / "run"
    made = Tokenizer.load(train_invariant(recipe, tokenizer, sounds, run, name="steady"))
    table = json.loads((run / "rounds.json").read_text())
    assert [row["round"] for row in table] == [0, 1, 2] and made.training["rounds"] == table
    assert made.name == "steady" and made.vocab_size == 12 and isinstance(made.quantizer, MlpQuantizer)
    assert made.encoder.config.neighbours == 1 and made.quantizer.dim == 3 * 8
    assert made.encoder.state_dict().keys() == Tokenizer.load(tokenizer).encoder.state_dict().keys()
    # It streams exactly, as the one it came from.
    wave = load(sorted(sounds.glob("*.flac"))[0], 16000)
    whole = made.encode(wave, 16000).ids
    with made.stream(sample_rate=16000) as stream:
        parts = [stream.push(wave[begin : begin + 777]).ids for begin in range(0, len(wave), 777)]
        parts.append(stream.flush().ids)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    # The second call changes nothing; another tokenizer is refused.
    before = (run / "round-2" / "metrics.jsonl").read_bytes()
    assert (
        Tokenizer.load(train_invariant(recipe, tokenizer, sounds, run, name="steady")).fingerprint == made.fingerprint
    )
    assert (run / "round-2" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(OutputError, match="another train, tokenizer"):
        train_invariant(recipe, "mfcc-k100", sounds, run, changes={"objective.neighbours": 0})


def test_frames_before_smoothing_and_projection(
    recipe: Path, sounds: Path, tokenizer: Path, tmp_path: Path, monkeypatch
) -> None:
    first = Tokenizer.load(tokenizer)
    plain = invariant._other(first.encoder, 0, True)
    wave = torch.from_numpy(load(sorted(sounds.glob("*.flac"))[0], 16000))[None]
    with torch.inference_mode():
        rows, wanted = plain(wave).features[0], first.quantizer(first.encoder(wave).features).ids[0, 0]
        joined = torch.cat([rows[place : place + len(rows) - 2] for place in range(3)], 1)
        teacher = invariant.Projected(first.encoder, first.quantizer)
        found = teacher(joined[None]).ids[0, 0]
    # The first frame has no left neighbour here, and the last chunk holds one position less.
    assert rows.shape[1] == 16 and torch.equal(found[: len(rows) - 12], wanted[1 : len(rows) - 11])
    monkeypatch.setattr(invariant, "_worse", lambda before, after: "")
    changes = {"objective.unprojected": True}
    made = Tokenizer.load(train_invariant(recipe, tokenizer, sounds, tmp_path / "run", changes=changes))
    assert made.encoder.config.smoothing == 1 and not made.encoder.projects and made.quantizer.dim == 3 * 16
    assert made.encoder.state_dict().keys() < first.encoder.state_dict().keys()
    with pytest.raises(FormatError, match="cannot be told"):
        teacher.decode(torch.zeros(1, 1, 1))
    with pytest.raises(InputError, match="w2v-BERT"):
        invariant.Projected(MfccEncoder(), first.quantizer)


def test_a_killed_run_goes_on_to_the_same_units(
    recipe: Path, sounds: Path, tokenizer: Path, tmp_path: Path, monkeypatch
) -> None:
    from speechtok.training import loop

    monkeypatch.setattr(invariant, "_worse", lambda before, after: "")

    class Killed(Exception):
        pass

    whole = train_invariant(recipe, tokenizer, sounds, tmp_path / "whole", changes={"objective.rounds": 1})

    def until(event) -> None:
        if event.stage == "train" and event.done == 5:
            raise Killed

    with pytest.raises(Killed):
        train_invariant(recipe, tokenizer, sounds, tmp_path / "cut", changes={"objective.rounds": 1}, on_event=until)
    assert (tmp_path / "cut" / "round-1" / loop.CHECKPOINT).exists()
    again = train_invariant(recipe, tokenizer, sounds, tmp_path / "cut", changes={"objective.rounds": 1})
    assert Tokenizer.load(again).fingerprint == Tokenizer.load(whole).fingerprint


def test_rounds_that_are_no_progress_are_left_out(
    recipe: Path, sounds: Path, tokenizer: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    reasons = iter(["", "the units collapse"])
    monkeypatch.setattr(invariant, "_worse", lambda before, after: next(reasons))
    made = Tokenizer.load(train_invariant(recipe, tokenizer, sounds, tmp_path / "run"))
    assert made.training["rounds"][2]["left_out"] == "the units collapse" and "round 2 is left out" in caplog.text
    monkeypatch.setattr(invariant, "_worse", lambda before, after: "")
    once = train_invariant(recipe, tokenizer, sounds, tmp_path / "one", changes={"objective.rounds": 1})
    assert made.fingerprint == Tokenizer.load(once).fingerprint
    monkeypatch.setattr(invariant, "_worse", lambda before, after: "no better")
    with pytest.raises(OutputError, match="no steadier"):
        train_invariant(recipe, tokenizer, sounds, tmp_path / "none")


def test_rooms_without_a_validation_split_are_those_of_training(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.r_[1.0, np.zeros(99)], 16000)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"path": "a.wav", "split": "train", "room": "hall"}) + "\n")
    rooms = invariant._resources(None, tmp_path, "valid").rooms
    assert rooms.draw(np.random.default_rng(0), 16000)[1] == {"clip": "a.wav"}
    with pytest.raises(InputError, match="no folder"):
        invariant._resources(None, tmp_path / "none", "valid")


def test_what_is_no_progress() -> None:
    good = {"ued": 50.0, "perplexity": 90.0}
    assert invariant._worse(good, {"ued": 45.0, "perplexity": 82.0}) == ""
    assert "perplexity fell" in invariant._worse(good, {"ued": 20.0, "perplexity": 80.0})
    assert "did not fall" in invariant._worse(good, {"ued": 50.0, "perplexity": 90.0})


def test_unusable_recipes_and_tokenizers_are_refused(
    recipe: Path, sounds: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def run(name: str | Path = tokenizer, **changes) -> None:
        train_invariant(
            recipe, name, sounds, tmp_path / "run", changes={k.replace("__", "."): v for k, v in changes.items()}
        )

    for changes, words in (
        ({"objective__method": "gan"}, "known are ctc and nast"),
        ({"objective__method": "nast"}, "rounds are for method ctc"),
        ({"objective__blank": True}, "no field 'blank'"),
        ({"objective__families": ["nois"]}, "nois"),
        ({"model__hidden": [3]}, "leave them out"),
        ({"objective__rounds": 0}, "rounds must be positive"),
    ):
        with pytest.raises(InputError, match=words):
            run(**changes)
    with pytest.raises(InputError, match="are not for frames of mfcc"):
        run("mfcc-k100")
    with pytest.raises(InputError, match="single frames"):
        run("sylber-mini", objective__neighbours=0)
    with pytest.raises(InputError, match="one codebook"):
        run("codec-mini", objective__neighbours=0)


def test_the_command_trains_nast(recipe: Path, sounds: Path, tmp_path: Path) -> None:
    command = ["train", "invariant", "--recipe", str(recipe), "--data", str(sounds), "-o", str(tmp_path / "run")]
    command += ["--tokenizer", "mfcc-k100", "--name", "mine", "--log", "plain"]
    for change in ("method='nast'", "neighbours=0", "rounds=1", "units=20", "width=16", "inner=16"):
        command += ["--set", f"objective.{change}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert (made.name, made.vocab_size, made.training["method"]) == ("mine", 20, "nast")
