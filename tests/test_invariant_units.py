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
from speechtok.errors import InputError, OutputError
from speechtok.metrics.edit_distance import unit_edit_distance
from speechtok.nn.conformer import ConformerBlock
from speechtok.quantizers.kmeans import KMeans
from speechtok.quantizers.mlp import MlpQuantizer
from speechtok.tokenizer import Tokenizer
from speechtok.training import invariant
from speechtok.training.augmented import CLEAN, AugmentedFrames
from speechtok.training.ctc_units import CtcConfig, CtcObjective, NamedFrames
from speechtok.training.invariant import InvariantConfig, train_invariant
from speechtok.training.nast import NastConfig, NastObjective, resized
from speechtok.training.sampler import Crop
from speechtok.training.unit_probe import steadiness
from speechtok.training.unit_student import UnitStudent, padded_rows
from speechtok.units import run_lengths

CLIPS = Path(__file__).resolve().parents[1] / "assets" / "clips"
FAMILIES = ("noise", "stretch")
SINGLE = {"objective.blocks": 0, "objective.smoothing": 1}
RECIPE = """kind = "invariant"

[objective]
method = "ctc"
families = ["noise", "stretch"]
blocks = 1
smoothing = 3
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
    settings = {"families": FAMILIES, "resources": AugmentResources.default()}
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
    build(sounds, tmp_path, resources=AugmentResources.default(legacy_half_snr=True))
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


# ---- CTC


def kmeans(frames: AugmentedFrames, clusters: int = 12) -> KMeans:
    rows = frames.whole(0, 0)
    return KMeans(rows[:: len(rows) // clusters][:clusters])


def crops(*items: int, length: int = 100, step: int = 0) -> list[Crop]:
    return [Crop(item, 20, length, (0, step, row)) for row, item in enumerate(items)]


def name(teacher: KMeans, frames: AugmentedFrames) -> NamedFrames:
    return NamedFrames(frames, lambda rows: teacher(torch.from_numpy(rows)[None]).ids[0, 0].numpy())


def student(hidden: tuple[int, ...] = (8,), units: int = 12, blocks: int = 0, smoothing: int = 1) -> UnitStudent:
    return UnitStudent(39, hidden, units, [ConformerBlock(39, 3, 16, 3) for _ in range(blocks)], smoothing)


def test_targets_are_the_runs_of_clean_units(frames: AugmentedFrames) -> None:
    teacher = kmeans(frames)
    objective = CtcObjective(CtcConfig(clean_share=0.0), student())
    batch = objective.collate(crops(0, 1, 2), name(teacher, frames), None, training=True)
    for row in range(3):
        clean = torch.from_numpy(frames.cut(row, 0, 20, 100))[None]
        wanted = run_lengths(teacher(clean).ids[0, 0].numpy())[0]
        count = int(batch["target_lengths"][row])
        np.testing.assert_array_equal(batch["targets"][row, :count].numpy(), wanted)
        assert not np.array_equal(batch["features"][row, :100].numpy(), frames.cut(row, 0, 20, 100))


def test_the_share_of_clean_crops() -> None:
    objective = CtcObjective(CtcConfig(clean_share=0.3), student())
    found = np.array([objective._drawn(Crop(0, 0, 50, (0, step, 0)), 5) for step in range(3000)])
    shares = np.bincount(found, minlength=5) / 3000
    np.testing.assert_allclose(shares, [0.3, 0.175, 0.175, 0.175, 0.175], atol=0.03)


def perfect(teacher: KMeans) -> CtcObjective:
    """A student whose logits are so sharp that it names the teacher's units (check 6 of the spec)."""
    objective = CtcObjective(CtcConfig(clean_share=0.9999), student(()))
    with torch.no_grad():  # the nearest centroid has the largest 2 c.x - |c|^2
        layer = objective.student.mlp.layers[0]
        layer.weight.copy_(200 * teacher.centroids)
        layer.bias.copy_(-100 * teacher.centroids.square().sum(1))
    return objective


def test_the_teachers_own_labels_cost_nothing(frames: AugmentedFrames) -> None:
    teacher = kmeans(frames)
    objective = perfect(teacher)
    batch = objective.collate(crops(0, 1, 2), name(teacher, frames), None, training=False)
    loss, figures = objective(batch, objective.weight_of(batch), 0.0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-3) and int(figures["impossible"]) == 0
    summary = objective.summary({**figures, "loss": loss.detach() * objective.weight_of(batch)})
    assert summary["loss"] == pytest.approx(float(loss.detach()))


def test_the_loss_sums_over_alignments_without_blanks(frames: AugmentedFrames) -> None:
    objective = CtcObjective(CtcConfig(), student((), 3))
    features = torch.randn(1, 4, 39)
    batch = {
        "features": features, "lengths": torch.tensor([4]), "targets": torch.tensor([[2, 0]]),
        "target_lengths": torch.tensor([2]),
    }  # fmt: skip
    probabilities = objective.student.mlp(features)[0].softmax(-1)
    paths = [[2, 0, 0, 0], [2, 2, 0, 0], [2, 2, 2, 0]]
    total = sum(torch.stack([probabilities[t, unit] for t, unit in enumerate(path)]).prod() for path in paths)
    loss, _ = objective(batch, 2, 0.0)
    assert float(loss.detach()) == pytest.approx(float(-total.detach().log() / 2), rel=1e-5)


def test_one_batch_can_be_learned_by_heart(frames: AugmentedFrames) -> None:
    torch.manual_seed(0)
    objective = CtcObjective(CtcConfig(clean_share=0.0), student((16,), blocks=1))
    batch = objective.collate(crops(0, 1, 2), name(kmeans(frames), frames), None, training=True)
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = objective(batch, objective.weight_of(batch), 0.0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    units = objective.student(batch["features"], batch["lengths"]).argmax(-1)
    found = [units[row, : batch["lengths"][row]].numpy() for row in range(3)]
    wanted = [batch["targets"][row, : batch["target_lengths"][row]].numpy() for row in range(3)]
    assert unit_edit_distance(wanted, found) < 2


def test_unusable_settings_of_ctc_are_refused() -> None:
    with pytest.raises(InputError, match="clean_share"):
        CtcConfig(clean_share=1.0)


# ---- students


@torch.inference_mode()
def test_padding_has_no_say_in_a_student(frames: AugmentedFrames) -> None:
    torch.manual_seed(0)
    model = student(blocks=2, smoothing=5).eval()
    rows = [frames.whole(item, 0)[: 60 + 40 * item] for item in range(2)]
    both = model(*padded_rows(rows))
    for row, found in zip(rows, both, strict=True):
        alone = model(*padded_rows([row]))[0]
        torch.testing.assert_close(found[: len(row)], alone, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(model.name(row), alone.argmax(-1).numpy())


@torch.inference_mode()
def test_smoothing_is_a_mean_of_what_is_there() -> None:
    model, plain = student(blocks=0, smoothing=3), student(blocks=0)
    plain.load_state_dict(model.state_dict())
    rows = torch.randn(1, 5, 39)
    means = torch.stack([rows[0, max(0, place - 1) : place + 2].mean(0) for place in range(5)])
    lengths = torch.tensor([5])
    torch.testing.assert_close(model(rows, lengths), plain(means[None], lengths), rtol=1e-4, atol=1e-5)


def test_weights_are_rounded() -> None:
    model = student(blocks=1)
    model.round_weights()
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())


# ---- NAST


def nast(**changes) -> NastObjective:
    torch.manual_seed(0)
    settings = {"units": 6, "width": 8, "heads": 2, "inner": 8, "residual_dim": 4, "decoder_blocks": 1}
    config = NastConfig(**(settings | changes))
    return NastObjective(config, student(units=6), np.zeros(39, np.float32), np.ones(39, np.float32))


def test_losses_are_their_formulas(frames: AugmentedFrames) -> None:
    objective = nast(robust_from=0.5)
    batch = objective.collate(crops(0, 1), frames, None, training=False)
    loss, figures = objective(batch, objective.weight_of(batch), 0.6)
    soft = (objective.student.mlp(batch["clean"]) / 0.8).softmax(-1)
    shares = soft.mean(1)  # both crops are full
    diversity = (shares * shares.log()).sum(-1).mean() / np.log(6)
    heard = resized(objective.student.mlp(batch["heard"]), batch["heard_lengths"], batch["lengths"], 100)
    robustness = F.cross_entropy(heard.flatten(0, 1), soft.flatten(0, 1))
    total = int(figures["frames"])
    assert total == 200
    assert float(figures["diversity"]) / total == pytest.approx(float(diversity.detach()), rel=1e-4)
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
def recipe(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("speechtok.training.loop.draw_curves", lambda *args: None)  # it takes most of the time here
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
    assert [row["round"] for row in made.training["rounds"]] == [0, 1, 2]
    assert made.name == "steady" and made.vocab_size == 12 and isinstance(made.quantizer, MlpQuantizer)
    earlier, first = Tokenizer.load(run / "round-1" / "tokenizer"), Tokenizer.load(tokenizer)
    assert len(earlier.training["rounds"]) == 2 and earlier.fingerprint != made.fingerprint
    # The encoder's own blocks are as they were, one has learned.
    assert made.encoder.config.smoothing == 3 and not made.encoder.projects and len(made.encoder.blocks) == 2
    states, old = made.encoder.state_dict(), first.encoder.state_dict()
    kept = {key: value for key, value in old.items() if not key.startswith("projection.")}
    assert all(torch.equal(states[key], value) for key, value in kept.items()) and len(states) > len(kept)
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
        train_invariant(recipe, "mfcc-k100", sounds, run, changes=SINGLE)


@torch.inference_mode()
def test_first_units_are_those_of_the_tokenizer(sounds: Path, tokenizer: Path) -> None:
    first = Tokenizer.load(tokenizer)
    wave = torch.from_numpy(load(sorted(sounds.glob("*.flac"))[0], 16000))[None]
    rows = invariant._layer_alone(first.encoder)(wave).features[0].numpy()
    wanted = first.quantizer(first.encoder(wave).features).ids[0, 0].numpy()
    found = invariant._first_units(first, True, rows)
    # Before the first frame something is heard that these rows lack, and in the last chunk after the last one.
    assert rows.shape[1] == 16 and np.array_equal(found[1:-12], wanted[1:-12]) and len(set(wanted)) > 3
    frames = first.encoder(wave).features[0].numpy()
    np.testing.assert_array_equal(invariant._first_units(first, False, frames), wanted)


@torch.inference_mode()
def test_blocks_become_those_of_the_encoder(sounds: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    encoder = invariant._layer_alone(Tokenizer.load(tokenizer).encoder)
    model = invariant._student(encoder, InvariantConfig(blocks=2, smoothing=3, hidden=()), 12).eval()
    wave = torch.from_numpy(load(sorted(sounds.glob("*.flac"))[0], 16000))[None]
    whole = invariant._with_blocks(encoder, model)
    # From the first chunk on, the student sees what the encoder's blocks see: positions, not answers.
    *_, positions = encoder._positions(*encoder.features(wave, torch.tensor([wave.shape[1]])))
    for block in model.blocks:
        positions = block(positions)
    found, wanted = whole(wave).features[0], whole.answer(positions)[0, 3 - 1 :]
    torch.testing.assert_close(found[1:80], wanted[1:80], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("warm", [True, False])
def test_a_warm_start_goes_on_with_the_teachers_weights(
    recipe: Path, sounds: Path, tokenizer: Path, tmp_path: Path, monkeypatch, warm: bool
) -> None:
    monkeypatch.setattr(invariant, "_worse", lambda before, after: "")
    changes = {"objective.warm_start": warm, "optimizer.learning_rate": 1e-12, "run.steps": 1}  # nothing is learned
    train_invariant(recipe, tokenizer, sounds, tmp_path / "run", changes=changes)
    first, second = (Tokenizer.load(tmp_path / "run" / f"round-{n}" / "tokenizer").encoder.state_dict() for n in (1, 2))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first) == warm


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
        ({"objective__rounds": 0}, "must be positive"),
        ({"objective__blocks": 0}, "are those of blocks"),
    ):
        with pytest.raises(InputError, match=words):
            run(**changes)
    with pytest.raises(InputError, match="not on frames of mfcc"):
        run("mfcc-k100")
    with pytest.raises(InputError, match="single frames"):
        run("sylber-mini")
    with pytest.raises(InputError, match="one codebook"):
        run("codec-mini")


def test_the_command_trains_nast(recipe: Path, sounds: Path, tmp_path: Path) -> None:
    command = ["train", "invariant", "--recipe", str(recipe), "--data", str(sounds), "-o", str(tmp_path / "run")]
    command += ["--tokenizer", "mfcc-k100", "--name", "mine", "--log", "plain"]
    for change in ("method='nast'", "blocks=0", "smoothing=1", "rounds=1", "units=20", "width=16", "inner=16"):
        command += ["--set", f"objective.{change}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert (made.name, made.vocab_size, made.training["method"]) == ("mine", 20, "nast")
