"""Distillation: time alignment with the teacher, both terms of the loss, the teacher's cache, the command."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok.audio.decode import load
from speechtok.audio.perturb import PerturbConfig
from speechtok.encoders import from_pretrained
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import CheckpointError, FormatError, InputError, OutputError
from speechtok.frames import FrameGrid
from speechtok.nn.cross_attention import HiddenFrameDecoder, sinusoids
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer
from speechtok.training.distill import DistillConfig, DistillObjective
from speechtok.training.mels import Mels
from speechtok.training.recipe import Recipe, named, section
from speechtok.training.sampler import Crop
from speechtok.training.student import distill
from speechtok.training.teacher import TaughtMels, TeacherFrames, frames_holding
from speechtok.units import Units

MODEL = W2vBertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_depthwise_kernel_size=5,
    normalization="stored", attention_chunk=8, attention_past=16, look_ahead=2,
)  # fmt: skip
SMALL = {"clusters": 6, "decoder_dim": 16, "decoder_heads": 2, "mask_span": 5, "mask_probability": 0.1}
DIM = 12
STUDENT = FrameGrid(16000, 320, 560)
# 50 Hz as w2v-BERT 2.0, 50 Hz as HuBERT, 25 Hz as w2v-BERT of 2021, 100 Hz as MFCC, 75 Hz at another sample rate.
GRIDS = {
    "w2v-bert": STUDENT,
    "hubert": FrameGrid(16000, 320, 400),
    "conv": FrameGrid(16000, 640, 1360),
    "mfcc": FrameGrid(16000, 160, 400),
    "24 kHz": FrameGrid(24000, 320, 600),
}


def teacher_of(grid: FrameGrid, lengths: list[int], values: np.ndarray | None = None) -> TeacherFrames:
    """A teacher of items with so many frames; frame n of all says n in every dimension unless values are given."""
    total = sum(lengths)
    if values is None:
        values = np.repeat(np.arange(total)[:, None], DIM, 1)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    mean, deviation = values.mean(0).astype(np.float32), values.std(0).astype(np.float32)
    return TeacherFrames(values.astype(np.float16), starts, np.array(lengths), grid, mean, deviation, Path())


def taught(items: int = 6, frames: int = 160, grid: FrameGrid = STUDENT, seed: int = 0) -> TaughtMels:
    """Smooth random filter bank frames, and a teacher whose frames are a bounded map of the sound at their centres."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(items * frames, 80)).cumsum(0)
    walk = (noise - noise.mean(0)) / noise.std(0)
    starts, lengths = np.arange(items) * frames, np.full(items, frames)
    mels = Mels(walk.astype(np.float16), starts, lengths, np.zeros(80, np.float32), np.ones(80, np.float32), ())
    count = grid.num_frames((frames - 1) * 160 + 400)
    weights = generator.normal(size=(80, DIM)) / 4
    at = np.array([min(frames - 1, round(grid.centre_seconds(frame) * 100)) for frame in range(count)])
    values = np.concatenate([np.tanh(walk[start + at] @ weights) for start in starts])
    # Dimensions of very different size: without standardisation one of them is all that counts.
    return TaughtMels.join(mels, teacher_of(grid, [count] * items, values * np.logspace(-2, 2, DIM) + 3))


def crops(count: int = 3, frames: int = 160) -> list[Crop]:
    return [Crop(item, 0, frames, (7, 0, item)) for item in range(count)]


def objective(corpus: TaughtMels, model: W2vBertConfig = MODEL, **changes) -> DistillObjective:
    perturb = changes.pop("perturb", None)
    torch.manual_seed(0)
    config = DistillConfig(**{**SMALL, **changes})
    centroids = np.random.default_rng(1).normal(size=(config.clusters, DIM)).astype(np.float32)
    return DistillObjective(model, config, corpus.teacher.mean, corpus.teacher.deviation, centroids, perturb)


def loss_of(model: DistillObjective, batch: dict) -> tuple[torch.Tensor, dict]:
    return model(batch, model.weight_of(batch), 0.5)


# ---- time


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_centres_lie_in_the_spans_of_the_frames_that_hold_them(name: str) -> None:
    grid = GRIDS[name]
    for ours, theirs in ((grid, STUDENT), (STUDENT, grid)):
        frames = np.arange(200)
        for frame, holder in zip(frames.tolist(), frames_holding(frames, ours, theirs).tolist(), strict=True):
            begin, end = theirs.span(holder)
            assert begin <= ours.centre_seconds(frame) * theirs.sample_rate + 1e-6
            assert ours.centre_seconds(frame) * theirs.sample_rate - 1e-6 < end


def slow_targets(teacher: TeacherFrames, item: int, first: int, count: int) -> list[list[int]]:
    """Teacher frames (numbers of the item) that belong to each student frame, by their centres in seconds."""
    grid, found = teacher.grid, []
    for frame in range(first, first + count):
        begin, end = (edge / STUDENT.sample_rate for edge in STUDENT.span(frame))
        centre = STUDENT.centre_seconds(frame)
        rows = []
        for t in range(int(teacher.lengths[item])):
            low, high = (edge / grid.sample_rate for edge in grid.span(t))
            inside = low <= centre < high if grid.rate < STUDENT.rate else begin <= grid.centre_seconds(t) < end
            rows += [t] if inside else []
        found.append(rows)
    return found


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("first", [0, 3])
def test_targets_are_those_of_a_slow_search(name: str, first: int) -> None:
    teacher = teacher_of(GRIDS[name], [40, 33])
    frames, groups, known = teacher.on_grid(STUDENT, 1, first, 70)  # reaches behind the item's end
    slow = slow_targets(teacher, 1, first, 70)
    assert known.tolist() == [bool(rows) for rows in slow]
    assert 5 < known.sum() < 70
    for frame, rows in zip(frames, slow, strict=True):
        assert frame[0] == pytest.approx(40 + np.mean(rows) if rows else 0.0)
    # Student frames of one teacher frame are one group, others are not.
    for i in range(69):
        if slow[i] and slow[i + 1]:
            assert (groups[i] == groups[i + 1]) == (slow[i] == slow[i + 1])
    sizes = {len(rows) for rows in slow if rows}
    assert sizes <= {"mfcc": {1, 2}, "24 kHz": {1, 2}}.get(name, {1})


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_no_teacher_frame_is_half_hidden(name: str) -> None:
    corpus = taught(grid=GRIDS[name])
    model = objective(corpus, mask_span=3, mask_probability=0.15)
    batch = model.collate([Crop(i % 6, 2 * i, 100, (i,)) for i in range(40)], corpus, None, training=True)
    for row, (mask, known) in enumerate(zip(batch["mask"], batch["known"], strict=True)):
        slow = slow_targets(corpus.teacher, row % 6, row, 50)
        hidden = {t for rows, m, k in zip(slow, mask, known, strict=True) if m and k for t in rows}
        visible = {t for rows, m, k in zip(slow, mask, known, strict=True) if not m and k for t in rows}
        assert hidden
        assert not hidden & visible
    # About 1 - 0.85^3 are hidden, a little more where groups of two are made whole.
    assert 0.3 < batch["mask"].float().mean() < 0.62


def test_crops_follow_the_grid_of_the_whole_item() -> None:
    corpus = taught()
    model = objective(corpus)
    even, odd = (model.collate([Crop(1, s, 60, (0,))], corpus, None, training=True) for s in (20, 21))
    assert all(torch.equal(even[name], odd[name]) for name in even)
    whole = model.collate([Crop(1, 0, 160, (0,))], corpus, None, training=True)
    assert torch.equal(even["target"][0], whole["target"][0, 10:40])
    assert torch.equal(even["heard"][0], whole["heard"][0, 20:80])
    # Right at the end of an item, where a crop is cut short.
    short = model.collate([Crop(1, 151, 60, (0,)), Crop(1, 0, 60, (1,))], corpus, None, training=True)
    assert short["lengths"].tolist() == [10, 60]
    assert not short["known"][0, 5:].any()
    assert not short["mask"][0, 5:].any()


def test_draws_of_a_crop_do_not_depend_on_its_batch() -> None:
    corpus = taught()
    model = objective(corpus, perturb=PerturbConfig(noise_probability=0.0))
    together = model.collate(crops(3), corpus, None, training=True)
    for row, crop in enumerate(crops(3)):
        alone = model.collate([crop], corpus, None, training=True)
        count = int(alone["hidden"].sum())
        for name in ("heard", "target", "mask", "known"):
            assert torch.equal(alone[name][0], together[name][row])
        assert torch.equal(alone["where"][0, :count], together["where"][row, :count])
        assert together["hidden"][row].sum() == count == alone["mask"].sum()
        assert alone["where"][0, :count].tolist() == torch.nonzero(alone["mask"][0]).flatten().tolist()


def test_only_the_student_hears_the_perturbed_sound() -> None:
    corpus = taught()
    plain, model = objective(corpus), objective(corpus, perturb=PerturbConfig(noise_probability=0.0))
    quiet, loud = (m.collate(crops(), corpus, None, training=True) for m in (plain, model))
    assert not torch.allclose(quiet["heard"], loud["heard"])
    assert torch.equal(quiet["target"], loud["target"])
    held_out = model.collate(crops(), corpus, None, training=False)
    assert torch.equal(held_out["heard"], quiet["heard"])


# ---- terms of the loss


def slow_loss(model: DistillObjective, batch: dict) -> tuple[float, float]:
    """Both terms by loops over crops and frames; crop by crop, so without padding."""
    alignment, reconstruction = 0.0, 0.0
    for row, length in enumerate(batch["lengths"].tolist()):
        count = length // 2
        mask, known = batch["mask"][row, :count], batch["known"][row, :count]
        mel = (batch["heard"][row, : 2 * count] - model.encoder.feature_mean) * model.encoder.feature_scale

        def hide(x: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
            x = x.clone()
            x[0, mask] = model.mask_vector
            return x

        states = list(model.encoder.walk(mel.reshape(1, count, 160), torch.tensor([count]), hide))[-1][0]
        target = (batch["target"][row, :count] - model.mean) / model.deviation
        errors = [
            float((model.align(states[t]) - target[t]).square().mean())
            for t in range(count) if known[t] and not mask[t]
        ]  # fmt: skip
        places = torch.tensor([t for t in range(count) if known[t] and mask[t]])
        scores = model.decoder(states[None], ~mask[None], places[None])[0]
        entropies = []
        for t, score in zip(places.tolist(), scores, strict=True):
            unit = min(range(len(model.centroids)), key=lambda k: float((target[t] - model.centroids[k]).norm()))
            entropies.append(float(score.logsumexp(0) - score[unit]))
        alignment += sum(errors) / len(errors)
        reconstruction += sum(entropies) / len(entropies)
    return alignment / len(batch["mask"]), reconstruction / len(batch["mask"])


@pytest.mark.parametrize("name", ["w2v-bert", "conv", "mfcc"])
@torch.no_grad()
def test_both_terms_are_those_of_slow_loops(name: str) -> None:
    corpus = taught(grid=GRIDS[name])
    model = objective(corpus, reconstruction_weight=0.7)
    batch = model.collate([Crop(0, 0, 100, (1,)), Crop(1, 100, 100, (2,))], corpus, None, training=True)
    assert batch["lengths"].tolist() == [100, 60]
    loss, figures = loss_of(model, batch)
    alignment, reconstruction = slow_loss(model, batch)
    assert float(figures["alignment"]) / 2 == pytest.approx(alignment, rel=1e-4)
    assert float(figures["reconstruction"]) / 2 == pytest.approx(reconstruction, rel=1e-4)
    assert float(loss) == pytest.approx(alignment + 0.7 * reconstruction, rel=1e-4)


@torch.no_grad()
def test_alignment_does_not_look_at_hidden_frames() -> None:
    corpus = taught()
    model = objective(corpus)
    batch = model.collate(crops(), corpus, None, training=True)
    before = loss_of(model, batch)[1]
    noise = torch.randn(batch["target"].shape, generator=torch.Generator().manual_seed(0)) * 100
    hidden = {**batch, "target": torch.where(batch["mask"][..., None], batch["target"] + noise, batch["target"])}
    after = loss_of(model, hidden)[1]
    assert torch.equal(after["alignment"], before["alignment"])
    assert not torch.equal(after["reconstruction"], before["reconstruction"])
    visible = {**batch, "target": torch.where(batch["mask"][..., None], batch["target"], batch["target"] + noise)}
    after = loss_of(model, visible)[1]
    assert not torch.equal(after["alignment"], before["alignment"])
    assert torch.equal(after["reconstruction"], before["reconstruction"])


def test_gradients_come_through_visible_outputs_only() -> None:
    corpus = taught()
    model = objective(corpus)
    batch = model.collate(crops(1), corpus, None, training=True)
    seen = {}

    def watch(states: torch.Tensor) -> None:
        states.retain_grad()
        seen["states"] = states

    student = model._student

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        seen["states"] = student(*arguments)
        seen["states"].retain_grad()
        return seen["states"]

    model._student = watched
    batch["heard"].requires_grad_()
    loss_of(model, batch)[0].backward()
    # The decoder reads visible frames only, so this holds for the whole loss.
    norms = seen["states"].grad.norm(dim=-1)
    visible = batch["known"] & ~batch["mask"]
    assert visible.any()
    assert (norms[batch["mask"]] == 0).all()
    assert (norms[visible] > 0).all()
    # What stood at hidden frames was replaced: their own sound does not reach anything.
    heard = batch["heard"].grad.reshape(1, 80, 160).norm(dim=-1)
    assert (heard[batch["mask"]] == 0).all()
    assert (heard[visible] > 0).all()


@torch.no_grad()
def test_without_reconstruction_it_is_plain_distillation() -> None:
    corpus = taught()
    model = objective(corpus, reconstruction_weight=0.0)
    assert not any(name.startswith(("decoder.", "mask_vector", "centroids")) for name in model.state_dict())
    batch = model.collate(crops(), corpus, None, training=True)
    assert not batch["mask"].any()
    loss, _ = loss_of(model, batch)
    features, counts = model.encoder.inputs(batch["heard"], batch["lengths"])
    predicted = model.align(model.encoder.hidden_states_from_features(features, counts)[-1])
    teacher = corpus.teacher
    wanted = np.stack([teacher.frames[s : s + 80] for s in teacher.starts[:3]]).astype(np.float32)
    wanted = (wanted - teacher.mean) / teacher.deviation
    assert batch["known"].sum() == 3 * teacher.lengths[0]
    plain = np.square(predicted[:, : wanted.shape[1]].numpy() - wanted[:, : int(teacher.lengths[0])]).mean()
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


@torch.no_grad()
def test_shares_of_micro_batches_add_up() -> None:
    corpus = taught()
    model = objective(corpus)
    batch = model.collate(crops(4), corpus, None, training=True)
    whole, _ = model(batch, 4, 0.0)
    halves = [model.collate(crops(4)[i::2], corpus, None, training=True) for i in range(2)]
    assert sum(float(model(half, 4, 0.0)[0]) for half in halves) == pytest.approx(float(whole), rel=1e-5)


def test_every_parameter_is_trained() -> None:
    corpus = taught()
    model = objective(corpus, identity_init=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = model.collate(crops(), corpus, None, training=True)
    for _ in range(2):  # after the first step no branch is zero any more
        optimizer.zero_grad()
        loss_of(model, batch)[0].backward()
        optimizer.step()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A bias that is the same for all keys does not change a softmax.
    assert {name for name in idle if not name.endswith("linear_k.bias")} == set()
    assert not {"mean", "deviation", "centroids"} & {name for name, _ in model.named_parameters()}


@torch.no_grad()
def test_crops_that_are_too_short_or_hidden_whole_give_finite_losses() -> None:
    corpus = taught()
    model = objective(corpus, mask_span=200, mask_probability=1.0)
    batch = model.collate([Crop(0, 158, 100, (0,)), Crop(1, 0, 100, (0,))], corpus, None, training=True)
    assert batch["mask"][1].all()
    loss, figures = loss_of(model, batch)
    assert math.isfinite(loss)
    assert figures["alignment"] == 0
    lonely = model.collate([Crop(0, 159, 100, (0,))], corpus, None, training=True)
    loss, figures = loss_of(model, {**lonely, "lengths": torch.tensor([1])})
    assert math.isfinite(loss)
    assert math.isfinite(model.summary({**figures, "loss": loss})["alignment_r2"])


# ---- decoder


@torch.no_grad()
def test_the_decoder_reads_visible_frames_only_and_knows_where_they_are() -> None:
    torch.manual_seed(0)
    decoder = HiddenFrameDecoder(8, 16, 2, 2, 5)
    frames, where = torch.randn(1, 10, 8), torch.tensor([[3, 4]])
    visible = torch.ones(1, 10, dtype=torch.bool)
    visible[0, 3:5] = False
    scores = decoder(frames, visible, where)
    other = frames.clone()
    other[0, 3:5] += 100
    assert torch.equal(decoder(other, visible, where), scores)
    other[0, 7] += 1
    assert not torch.allclose(decoder(other, visible, where), scores)
    assert not torch.allclose(scores[0, 0], scores[0, 1])
    swapped = frames[:, [0, 1, 2, 3, 4, 9, 6, 7, 8, 5]]
    assert not torch.allclose(decoder(swapped, visible, where), scores)
    # Queries do not see each other.
    assert torch.allclose(decoder(frames, visible, where[:, 1:])[0, 0], scores[0, 1], atol=1e-6)
    assert torch.isfinite(decoder(frames, torch.zeros_like(visible), where)).all()


def test_positions_are_sines_and_cosines() -> None:
    table = sinusoids(50, 6)
    for place in (0, 1, 37):
        for index in range(3):
            angle = place / 10000 ** (2 * index / 6)
            assert table[place, index].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert table[place, 3 + index].item() == pytest.approx(math.cos(angle), abs=1e-4)


# ---- figures


@torch.no_grad()
def test_r2_is_that_of_all_visible_frames() -> None:
    corpus = taught()
    model = objective(corpus).eval()
    sums: dict[str, torch.Tensor] = {}
    rows = []
    for part in (crops(2), [Crop(3, 0, 160, (9,))]):
        batch = model.collate(part, corpus, None, training=False)
        loss, figures = loss_of(model, batch)
        for name, value in {**figures, "loss": loss * model.weight_of(batch)}.items():
            sums[name] = sums.get(name, 0) + value
        rows.append([batch, model.encoder.inputs(batch["heard"], batch["lengths"])])
    summary = model.summary(sums)
    for name, hidden in (("alignment_r2", True), ("clean_r2", False)):
        wanted, given = [], []
        for batch, (features, counts) in rows:
            predicted = model.align(model._student(features, counts, batch["mask"] if hidden else None))
            counted = batch["known"] & (~batch["mask"] | (not hidden))
            wanted.append(((batch["target"] - model.mean) / model.deviation)[counted])
            given.append(predicted[counted])
        target, output = torch.cat(wanted).double(), torch.cat(given).double()
        r2 = 1 - (output - target).square().sum() / (target - target.mean(0)).square().sum()
        assert summary[name] == pytest.approx(float(r2), rel=1e-4)
    assert summary["loss"] == pytest.approx(summary["alignment"] + summary["reconstruction"], rel=1e-5)
    assert 0 <= summary["masked_accuracy"] <= 1 <= summary["unit_perplexity"] <= 6
    assert len(model.alarms({"alignment_r2": -0.1, "masked_accuracy": 0.1, "unit_share": 0.2})) == 2
    assert model.alarms({"alignment_r2": 0.1}) == []


def test_a_few_items_can_be_learned_by_heart() -> None:
    corpus = taught(4)
    model = objective(corpus, identity_init=True)
    teacher = corpus.teacher
    rows = (teacher.frames.astype(np.float32) - teacher.mean) / teacher.deviation
    model.centroids.copy_(torch.from_numpy(rows[:: len(rows) // 6][:6]))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def figures() -> dict[str, float]:
        model.eval()
        batch = model.collate(crops(4), corpus, None, training=False)
        with torch.no_grad():
            loss, found = loss_of(model, batch)
        return model.summary({**found, "loss": loss * 4})

    start = figures()
    assert len(model.alarms(start)) >= 1
    for step in range(150):
        model.train()
        fresh = [Crop(crop.item, 0, 160, (step, crop.item)) for crop in crops(4)]
        loss, _ = loss_of(model, model.collate(fresh, corpus, None, training=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = figures()
    assert end["alignment_r2"] > 0.8
    assert end["clean_r2"] > 0.8
    assert end["masked_accuracy"] > max(end["unit_share"], start["masked_accuracy"]) + 0.1
    assert model.alarms(end) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"attention_chunk": None, "attention_past": 0, "look_ahead": 0}, "attention_chunk"),
        ({"normalization": "utterance"}, "stored"),
        ({"subsampling": "conv", "feature_projection_input_dim": 76}, "50 frames"),
        ({"num_hidden_layers": 0}, "blocks"),
    ],
)
def test_students_that_do_not_stream_exactly_are_refused(model: dict, words: str) -> None:
    values = {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
    with pytest.raises(InputError, match=words):
        objective(taught(1), W2vBertConfig(**{**values, **model}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reconstruction_weight": -1.0}, "reconstruction_weight"),
        ({"clusters": 1}, "clusters"),
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"decoder_dim": 18, "decoder_heads": 4}, "decoder_heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DistillConfig(**changes)


def test_parts_that_do_not_fit_are_refused() -> None:
    corpus = taught(2)
    with pytest.raises(InputError, match="6 clusters of 12 dimensions"):
        DistillObjective(MODEL, DistillConfig(**SMALL), np.zeros(DIM), np.ones(DIM), np.zeros((5, DIM), np.float32))
    bare = Mels(corpus.frames, corpus.starts, corpus.lengths, corpus.mean, corpus.deviation, ())
    with pytest.raises(InputError, match="teacher's frames"):
        objective(corpus).collate(crops(1), bare, None, training=True)
    with pytest.raises(InputError, match="speed 1"):
        TaughtMels.join(bare, teacher_of(STUDENT, [79]))


@pytest.mark.parametrize("name", sorted(name for name in named() if name.startswith("distill")))
def test_shipped_recipes_make_students(name: str) -> None:
    recipe = Recipe.read(name, "distill")
    model, config = section(W2vBertConfig, recipe.model, "model"), section(DistillConfig, recipe.objective, "objective")
    mean = np.zeros(4, np.float32)
    student = DistillObjective(model, config, mean, mean + 1, np.zeros((config.clusters, 4), np.float32))
    assert student.encoder.exact_stream
    assert recipe.data.speeds == (1.0,)


# ---- the teacher's cache


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short clips."""
    folder = tmp_path_factory.mktemp("sound")
    for name in (
        "librispeech-1688-142285-0004.flac",
        "librispeech-7367-86737-0000.opus",
        "speechocean762-000240031.opus",
    ):
        shutil.copy(Path(__file__).resolve().parents[1] / "assets" / "clips" / name, folder)
    return folder


class Killed(Exception):
    pass


def kill_after(seconds: float):
    def tell(event) -> None:
        if event.stage == "run" and event.done > seconds:
            raise Killed

    return tell


def test_teacher_frames_are_those_of_the_whole_items(sound: Path, tmp_path: Path) -> None:
    teacher = MfccEncoder()
    mels = Mels.build(sound, tmp_path / "mels")
    frames = TeacherFrames.build(sound, teacher, mels, tmp_path / "teacher")
    assert frames.lengths.tolist() == mels.lengths.tolist()  # both have 100 frames per second
    for item, path in enumerate(sorted(sound.iterdir())):
        wave = torch.from_numpy(load(path, sample_rate=16000))[None]
        wanted = teacher(wave).features[0].numpy()
        begin, end = frames.starts[item], frames.starts[item] + frames.lengths[item]
        assert np.allclose(frames.frames[begin:end], wanted, rtol=1e-3, atol=1e-2)
    whole = np.array(frames.frames, np.float64)
    assert np.allclose(frames.mean, whole.mean(0), rtol=1e-4, atol=1e-4)
    assert np.allclose(frames.deviation, whole.std(0), rtol=1e-4, atol=1e-4)
    # The centroids are kept, and are those of the standardised frames.
    centroids = frames.centroids(4, seed=3)
    assert np.array_equal(frames.centroids(4, seed=3), centroids)
    assert (tmp_path / "teacher" / "centroids-4-3.npy").exists()
    rows = (whole - frames.mean) / frames.deviation
    nearest = np.square(rows[:, None] - centroids).sum(-1).argmin(1)
    means = np.stack([rows[nearest == k].mean(0) for k in range(4)])
    assert np.abs(means - centroids).max() < 0.2
    with pytest.raises(InputError, match="clusters"):
        frames.centroids(len(whole) + 1)


@pytest.mark.parametrize("torn", [False, True])
def test_the_cache_goes_on_where_it_was_killed(sound: Path, tmp_path: Path, torn: bool) -> None:
    mels = Mels.build(sound, tmp_path / "mels")
    whole = TeacherFrames.build(sound, MfccEncoder(), mels, tmp_path / "whole")
    broken, seconds = tmp_path / "broken", mels.lengths / 100
    with pytest.raises(Killed):
        TeacherFrames.build(sound, MfccEncoder(), mels, broken, on_event=kill_after(seconds[0] + 0.01))
    assert not (broken / "index.json").exists()
    if torn:  # the process died in the middle of a line, with frames that no line tells of
        with (broken / "pieces.jsonl").open("a") as journal:
            journal.write("[2, 0, 3")
        with (broken / "frames.f16").open("ab") as file:
            file.write(b"\1\2\3")
    done: list[float] = []
    resumed = TeacherFrames.build(sound, MfccEncoder(), mels, broken, on_event=lambda event: done.append(event.done))
    assert done[0] == pytest.approx(seconds[:2].sum(), abs=0.02)  # the first file was not computed again
    assert np.array_equal(resumed.frames, whole.frames)
    assert resumed.starts.tolist() == whole.starts.tolist()
    assert np.array_equal(resumed.mean, whole.mean)
    # A finished cache is only read.
    events: list = []
    TeacherFrames.build(sound, MfccEncoder(), mels, broken, on_event=events.append)
    assert events == []


TEACHER = W2vBertConfig(
    hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, conv_depthwise_kernel_size=7
)


def save_teacher(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return save_encoder(W2vBertEncoder(TEACHER), folder)


def test_the_cache_of_another_teacher_or_corpus_is_refused(sound: Path, tmp_path: Path) -> None:
    mels, folder = Mels.build(sound, tmp_path / "mels"), tmp_path / "cache"
    mine, other = (save_teacher(tmp_path / name, seed) for seed, name in enumerate(("mine", "other")))
    TeacherFrames.build(sound, from_pretrained(mine, 2), mels, folder)
    TeacherFrames.build(sound, from_pretrained(mine, 2), mels, folder)
    for teacher in (from_pretrained(mine, 3), from_pretrained(other, 2), MfccEncoder()):
        with pytest.raises(OutputError, match="another teacher"):
            TeacherFrames.build(sound, teacher, mels, folder)
    (tmp_path / "more").mkdir()
    shutil.copy(next(sound.iterdir()), tmp_path / "more" / "a.flac")
    with pytest.raises(OutputError, match="another corpus"):
        TeacherFrames.build(tmp_path / "more", from_pretrained(mine, 2), mels, folder)
    # Half-finished ones are held to account too.
    (folder / "index.json").unlink()
    with pytest.raises(OutputError, match="another teacher"):
        TeacherFrames.build(sound, from_pretrained(other, 2), mels, folder)


def test_a_damaged_cache_and_sound_that_does_not_fit_are_refused(sound: Path, tmp_path: Path) -> None:
    mels, folder = Mels.build(sound, tmp_path / "mels"), tmp_path / "cache"
    frames = TeacherFrames.build(sound, MfccEncoder(), mels, folder)
    content = (folder / "frames.f16").read_bytes()
    (folder / "frames.f16").write_bytes(content[:-2])
    with pytest.raises(FormatError, match="delete"):
        TeacherFrames.build(sound, MfccEncoder(), mels, folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(FormatError, match="index.json"):
        TeacherFrames.build(sound, MfccEncoder(), mels, folder)
    frames.centroids(3)
    (folder / "centroids-3-0.npy").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="centroids-3-0"):
        frames.centroids(3)
    twice = Mels.build(sound, tmp_path / "twice", (1.0, 1.1))
    with pytest.raises(InputError, match="speed 1"):
        TeacherFrames.build(sound, MfccEncoder(), twice, tmp_path / "other")


def test_a_teacher_that_is_not_finite_is_refused(sound: Path, tmp_path: Path) -> None:
    class Broken(MfccEncoder):
        def encode(self, wave, lengths):
            frames = super().encode(wave, lengths)
            frames.features[0, 0, 0] = torch.nan
            return frames

    with pytest.raises(CheckpointError, match="not finite"):
        TeacherFrames.build(sound, Broken(), Mels.build(sound, tmp_path / "mels"), tmp_path / "cache")


# ---- end to end

RECIPE = """kind = "distill"

[model]
hidden_size = 48
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 96
conv_depthwise_kernel_size = 5
normalization = "stored"
attention_chunk = 8
attention_past = 8
look_ahead = 4

[objective]
clusters = 8
decoder_dim = 32
decoder_heads = 2
identity_init = true

[data]
crop_seconds = [1.28]
batch_seconds = 5.12

[optimizer]
learning_rate = 3e-3

[run]
steps = 12
precision = "float32"
log_every = 3
evaluate_every = 6
checkpoint_every = 6
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def lines(run: Path, split: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def test_the_command_makes_an_exact_streaming_student(shared: Path, recipe: Path, tmp_path: Path) -> None:
    """Files of the development set with their alignments, and a larger encoder with random weights."""
    source, data = shared / "speech" / "dev", tmp_path / "data"
    data.mkdir()
    known = [json.loads(line) for line in (source / "alignments.jsonl").read_text().splitlines()]
    known = sorted(known, key=lambda line: line["path"])[:3]
    speakers = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    names = {line["path"] for line in known}
    for file, rows in (("alignments", known), ("metadata", [row for row in speakers if row["path"] in names])):
        (data / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, data / name)
    run = tmp_path / "run"
    done = CliRunner().invoke(
        app,
        [
            "train", "distill", "--teacher", str(save_teacher(tmp_path / "teacher")), "--teacher-layer", "3",
            "--recipe", str(recipe), "--data", str(data), "--held-out", str(data), "--aligned", str(data),
            "-o", str(run), "--log", "plain",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(run / "encoder")
    held_out = lines(run, "held out")
    assert [line["step"] for line in held_out] == [6, 12]
    assert held_out[1]["alignment"] < held_out[0]["alignment"]
    assert {"alignment_r2", "clean_r2", "masked_accuracy", "pnmi_k100_layer2"} <= set(held_out[1])
    description = json.loads((run / "teacher" / "train" / "teacher.json").read_text())["teacher"]
    assert (description["type"], description["layer"], description["dim"]) == ("w2v_bert", 3, 96)

    student = from_pretrained(run / "encoder")
    assert student.context is not None
    assert student.exact_stream
    assert student.dim == 48
    assert student.look_ahead == (4 + 7) * 320
    wave = load(data / known[0]["path"], sample_rate=16000)[:48000]
    with torch.no_grad():
        rows = student(torch.from_numpy(wave)[None]).features[0].numpy()
    tokenizer = Tokenizer(student, KMeans(rows[::10]), name="student")
    whole = tokenizer.encode(wave, sample_rate=16000)
    with tokenizer.stream(sample_rate=16000) as stream:
        parts = [stream.push(wave[i : i + 3000]) for i in range(0, len(wave), 3000)] + [stream.flush()]
    assert Units.concatenate(parts) == whole
    assert len(set(whole.ids.tolist())) > 1


def test_a_run_goes_on_and_keeps_its_teacher(sound: Path, recipe: Path, tmp_path: Path) -> None:
    teacher, other = (save_teacher(tmp_path / name, seed) for seed, name in enumerate(("teacher", "other")))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    distill(recipe, teacher, sound, whole)

    def kill(event) -> None:
        if event.stage == "train" and event.done == 9:
            raise Killed

    with pytest.raises(Killed):
        distill(recipe, teacher, sound, broken, on_event=kill)
    with pytest.raises(OutputError, match="another teacher"):
        distill(recipe, other, sound, broken)
    stages: list[str] = []
    distill(recipe, teacher, sound, broken, on_event=lambda event: stages.append(event.stage))
    assert set(stages) == {"train"}
    assert [line["loss"] for line in lines(broken, "train")] == [line["loss"] for line in lines(whole, "train")]
    one, two = (from_pretrained(run / "encoder").state_dict() for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_in_half_precision_has_the_targets_of_a_plain_one(sound: Path, recipe: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    for precision in ("float32", "bfloat16"):
        changes = {"run.precision": precision, "run.steps": 3, "run.log_every": 1}
        distill(recipe, teacher, sound, tmp_path / precision, changes=changes)
    one, two = ([line["loss"] for line in lines(tmp_path / name, "train")] for name in ("float32", "bfloat16"))
    assert two == pytest.approx(one, rel=0.02)
    assert two != one


def test_two_processes_see_the_batch_of_one(sound: Path, recipe: Path, tmp_path: Path, torchrun) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes = {"run.steps": 6}
    distill(recipe, teacher, sound, alone, changes=changes)
    torchrun(
        "from speechtok.training.student import distill; "
        f"distill({str(recipe)!r}, {str(teacher)!r}, {str(sound)!r}, Path({str(together)!r}), changes={changes})"
    )
    one, two = ([line["loss"] for line in lines(run, "train")] for run in (alone, together))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.speeds": [0.9, 1.0]}, "speed 1"),
        ({"model.normalization": "utterance"}, "stored"),
        ({"perturb.noise_probability": 0.5}, "noise"),
        ({"objective.lambda": 1.0}, "no field 'lambda'"),
        ({"objective.clusters": 100000}, "clusters"),
    ],
)
def test_wrong_recipes_are_refused_by_name(sound: Path, recipe: Path, tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        distill(recipe, "mfcc", sound, tmp_path / "run", changes=change)
