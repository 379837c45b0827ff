"""Self-segmentation distillation against slow references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from speechtok.audio.perturb import PerturbConfig
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import CheckpointError, InputError
from speechtok.segmenters import greedy_segment
from speechtok.segmenters.energy import EnergySeeds
from speechtok.training.mels import Mels
from speechtok.training.norm_threshold import NormThreshold, crossing
from speechtok.training.sampler import Crop
from speechtok.training.sylber import SeededMels, SylberObjective, gate_targets, segment_means
from speechtok.training.sylber_config import SylberConfig

MODEL = W2vBertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_depthwise_kernel_size=5,
    normalization="stored", attention_chunk=8, attention_past=16, look_ahead=2, projected_layer=2, projection_size=12,
    gated=True,
)  # fmt: skip
TEACHER = W2vBertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_depthwise_kernel_size=5,
    normalization="stored", attention_chunk=8, attention_past=16, look_ahead=2,
)  # fmt: skip


def mels(items: int = 24, frames: int = 240, seed: int = 0) -> SeededMels:
    """Made-up speech: loud stretches of 120 to 300 ms, each one of 8 sounds, between faint ones."""
    generator = np.random.default_rng(seed)
    sounds = generator.normal(0, 1.5, (8, 80))
    rows = []
    while len(rows) < items * frames:
        loud, quiet = (int(n) for n in generator.integers((12, 4), (30, 9)))
        arch = np.sin(np.pi * (np.arange(loud) + 0.5) / loud)[:, None]
        rows += list(12 + 4 * arch + sounds[generator.integers(8)])
        rows += list(np.full((quiet, 80), 8.0))
    values = np.array(rows[: items * frames]) + 0.1 * generator.normal(size=(items * frames, 80))
    starts, lengths = np.arange(items) * frames, np.full(items, frames)
    plain = Mels(values.astype(np.float16), starts, lengths, values.mean(0).astype(np.float32),
                 values.std(0).astype(np.float32), ())  # fmt: skip
    return SeededMels.of(plain, EnergySeeds())


def crops(count: int = 3, frames: int = 240) -> list[Crop]:
    return [Crop(item, 0, frames, (7, 0, item)) for item in range(count)]


def teacher(seed: int = 3) -> W2vBertEncoder:
    torch.manual_seed(seed)
    encoder = W2vBertEncoder(TEACHER)
    sound = mels()
    encoder.feature_mean.copy_(torch.from_numpy(sound.mean))
    encoder.feature_scale.copy_(1 / torch.from_numpy(sound.deviation))
    return encoder.eval()


def objective(first: W2vBertEncoder | None = None, second: float = 1.0, **changes) -> SylberObjective:
    torch.manual_seed(0)
    layer = 0 if first is None else 2
    perturb = changes.pop("perturb", None)
    made = SylberObjective(
        MODEL, SylberConfig(**{"teacher_layer": layer, **changes}), first, second_stage=second, perturb_config=perturb
    )
    sound = mels()
    made.encoder.feature_mean.copy_(torch.from_numpy(sound.mean))
    made.encoder.feature_scale.copy_(1 / torch.from_numpy(sound.deviation))
    made.measure_targets(sound)
    return made


# ---- the norm threshold


def test_two_gaussians_of_the_paper_cross_at_its_threshold() -> None:
    assert NormThreshold().value == pytest.approx(2.59989, abs=5e-6)


def test_the_crossing_is_where_both_densities_are_equal() -> None:
    generator = np.random.default_rng(0)

    def density(x: float, mean: float, variance: float) -> float:
        return float(np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(variance))

    for _ in range(200):
        signal = (float(generator.uniform(2, 4)), float(generator.uniform(0.01, 0.5)))
        noise = (float(generator.uniform(0, 1)), float(generator.uniform(0.01, 0.5)))
        prior = float(generator.uniform(0.5, 2))
        x = crossing(signal, noise, prior)
        assert noise[0] < x < signal[0]
        assert density(x, *signal) == pytest.approx(prior * density(x, *noise), rel=1e-6)
    assert crossing((1.0, 0.1), (0.0, 0.1)) == pytest.approx(0.5)
    assert crossing((1.0, 0.1), (0.0, 0.1), 2.0) > 0.5
    assert crossing((1.0, 1.0), (0.0, 1.0), 100.0) == pytest.approx(0.5)  # equal widths, crossing outside
    assert crossing((0.01, 4.0), (0.0, 0.1)) == pytest.approx(0.005)  # no crossing between the means


def test_running_statistics_move_by_their_decay() -> None:
    threshold = NormThreshold((1.0, 0.5), (0.0, 0.5), decay=0.75)
    signal, noise = torch.tensor([2.0, 4.0]), torch.tensor([0.5, 0.5, 0.5])
    threshold.update(signal, noise)
    assert threshold.signal.tolist() == pytest.approx([0.75 * 1 + 0.25 * 3, 0.75 * 0.5 + 0.25 * 1])
    assert threshold.noise.tolist() == pytest.approx([0.25 * 0.5, 0.75 * 0.5 + 0.25 * 1e-6])
    threshold.update(torch.zeros(0), torch.zeros(0))  # nothing to learn from
    assert threshold.signal[0] == pytest.approx(1.5)
    with pytest.raises(InputError, match="decay"):
        NormThreshold(decay=1.5)


# ---- targets


def test_segment_means_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(3, 20, 4, generator=generator)
    segment = torch.full((3, 20), -1)
    for row, spans in enumerate([[(0, 5), (5, 9), (12, 20)], [(3, 4)], []]):
        for number, (begin, end) in enumerate(spans):
            segment[row, begin:end] = number
    found = segment_means(frames, segment)
    for row in range(3):
        for t in range(20):
            same = segment[row] == segment[row, t]
            wanted = frames[row, same].mean(0) if segment[row, t] >= 0 else torch.zeros(4)
            assert torch.allclose(found[row, t], wanted, atol=1e-6)
    # Means weighted by lengths are the sum of all frames in segments.
    assert torch.allclose(found.sum((0, 1)), frames[segment >= 0].sum(0), atol=1e-5)


def test_gate_targets_shut_at_the_first_frame() -> None:
    segment = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1, -1, 2, 2, 2, 2]])
    assert gate_targets(segment).tolist() == [[0, 0, 0.5, 1, 0.5, 0, 0.5, 1, 0, 0, 0, 0.5, 1, 1]]
    assert gate_targets(segment, touching_only=True).tolist() == [[0, 1, 1, 1, 0.5, 0, 0.5, 1, 0, 0, 1, 1, 1, 1]]


def test_targets_of_the_first_stage_are_whitened_segment_means() -> None:
    made, sound = objective(teacher(), whitening=1.0), mels()
    batch = made.collate(crops(24), sound, None, training=False)
    segment, target = made._targets(batch, made.encoder.sampled_lengths(batch["lengths"]))
    inside = segment >= 0
    assert torch.allclose(target[inside].norm(dim=-1), torch.ones(int(inside.sum())), atol=1e-5)
    assert (target[~inside] == 0).all()
    # Over the segments, before they are scaled to length 1, axes are uncorrelated and equally wide.
    frames = made._first_frames(batch["clean"], batch["lengths"])
    means = torch.cat([
        torch.stack([frames[row, segment[row] == n].mean(0) for n in segment[row].unique() if n >= 0])
        for row in range(24)
    ])  # fmt: skip
    whitened = (means - made.centre) @ made.transform
    covariance = torch.cov(whitened.T)
    assert torch.allclose(covariance, torch.eye(12) * covariance[0, 0], atol=0.05 * float(covariance[0, 0]))
    assert whitened.mean(0).abs().max() < 1e-3 * float(whitened.abs().max())


def test_the_loss_is_zero_for_a_student_that_is_its_teacher() -> None:
    made, sound = objective(second=0.0), mels()
    made.train()
    batch = made.collate(crops(), sound, None, training=False)
    made(batch, made.weight_of(batch), 0.5)  # the second stage begins
    assert int(made.stage) == 2
    segment = batch["segment"]

    # A teacher whose frames are constant in segments and zero elsewhere, and a student that says the same.
    directions = F.normalize(torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(1)), dim=-1)
    content = torch.stack([directions[row][segment[row].clamp_min(0)] for row in range(3)])
    gate = gate_targets(segment).round()
    frames = content * gate[..., None]
    made.teacher.answers = lambda *features: type("Answer", (), {"features": frames})
    made.threshold.signal.copy_(torch.tensor([0.9, 0.02]))
    made.threshold.noise.copy_(torch.tensor([0.1, 0.02]))
    made._projected = lambda *features: torch.cat([content, (gate * 2 - 1)[..., None] * 40], dim=-1)
    made.eval()
    loss, figures = made(batch, made.weight_of(batch), 1.0)
    assert float(figures["inside"]) > 50
    assert float(loss) == pytest.approx(0.0, abs=1e-5)
    # And not for one that says anything else.
    wrong = content.roll(1, dims=-1)
    made._projected = lambda *features: torch.cat([wrong, (gate * 2 - 1)[..., None] * 40], dim=-1)
    assert float(made(batch, made.weight_of(batch), 1.0)[0]) > 0.1


def test_the_second_stage_segments_with_a_frozen_copy_of_the_student() -> None:
    made, sound = objective(second=0.5, merge_thresholds=(0.3, 0.3)), mels()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    made.train()

    def step(progress: float) -> None:
        batch = made.collate(crops(), sound, None, training=True)
        loss, _ = made(batch, made.weight_of(batch), progress)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(20):
        step(0.2)
    assert int(made.stage) == 1
    student = {name: tensor.clone() for name, tensor in made.encoder.state_dict().items()}
    step(0.5)
    assert int(made.stage) == 2
    frozen = {name: tensor.clone() for name, tensor in made.teacher.state_dict().items()}
    assert all(torch.equal(frozen[name], student[name]) for name in frozen)
    for _ in range(100):
        step(0.8)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in made.teacher.state_dict().items())
    assert any(not torch.equal(student[name], tensor) for name, tensor in made.encoder.state_dict().items())
    # Its segments are those of the public segmenter on the teacher's frames.
    made.eval()
    batch = made.collate(crops(), sound, None, training=False)
    counts = made.encoder.sampled_lengths(batch["lengths"])
    segment, _ = made._targets(batch, counts)
    frames = made.teacher.answers(*made.teacher.inputs(batch["clean"], batch["lengths"])).features
    for row in range(3):
        spans = greedy_segment(frames[row].detach(), made.threshold.value, float(batch["merge"][row]), "reset")
        wanted = torch.full((len(frames[row]),), -1)
        for number, (begin, end) in enumerate(spans.tolist()):
            wanted[begin:end] = number
        assert torch.equal(segment[row], wanted)


def test_generations_renew_the_teacher_at_equal_intervals() -> None:
    made, sound = objective(second=0.4, generations=3), mels()
    made.train()
    batch = made.collate(crops(), sound, None, training=True)
    seen = []
    for progress in (0.0, 0.39, 0.4, 0.59, 0.6, 0.79, 0.8, 1.0):
        with torch.no_grad():
            made.encoder.projection.bias.add_(0.01)
        copy = made.teacher.state_dict()["projection.bias"].clone()
        made(batch, made.weight_of(batch), progress)
        renewed = not torch.equal(copy, made.teacher.state_dict()["projection.bias"])
        seen.append((int(made.stage), renewed))
    assert [stage for stage, _ in seen] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [renewed for _, renewed in seen] == [False, False, True, False, True, False, True, False]
    made.eval()  # evaluations say that the run is over; they change nothing
    fresh = objective(second=0.4)
    fresh.eval()
    fresh(batch, fresh.weight_of(batch), 1.0)
    assert int(fresh.stage) == 1


def test_anchored_directions_stay_those_of_the_first_teacher() -> None:
    made, sound = objective(teacher(), second=0.0, anchored=True), mels()
    made.train()
    batch = made.collate(crops(), sound, None, training=False)
    with torch.no_grad():  # a gate that follows the level, so that there are segments
        made.encoder.projection.weight[-1] *= 20
    made(batch, made.weight_of(batch), 0.5)
    assert int(made.stage) == 2
    counts = made.encoder.sampled_lengths(batch["lengths"])
    made.threshold.signal.copy_(torch.tensor([0.6, 0.02]))
    made.threshold.noise.copy_(torch.tensor([0.4, 0.02]))
    segment, target = made._targets(batch, counts)
    own = made.teacher.answers(*made.teacher.inputs(batch["clean"], batch["lengths"])).features
    first = made._first_frames(batch["clean"], batch["lengths"])
    assert (segment >= 0).any()
    for row in range(3):
        for number in segment[row].unique().tolist():
            if number < 0:
                continue
            here = segment[row] == number
            wanted = F.normalize((first[row, here].mean(0) - made.centre) @ made.transform, dim=-1)
            assert torch.allclose(target[row, here], wanted.expand(int(here.sum()), -1), atol=1e-5)
    made.config = SylberConfig(teacher_layer=2)
    _, free = made._targets(batch, counts)
    here = segment[0] == 0
    assert torch.allclose(free[0, here][0], F.normalize(own[0, here].mean(0), dim=-1), atol=1e-5)


def test_one_batch_is_learned_by_heart() -> None:
    made, sound = objective(teacher()), mels()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    batch = made.collate(crops(), sound, None, training=False)
    made.train()
    before = None
    for _ in range(150):
        loss, figures = made(batch, made.weight_of(batch), 0.1)
        before = before or float(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = made.summary({**figures, "loss": loss.detach() * made.weight_of(batch)})
    assert found["cosine"] > 0.9
    assert found["gate_accuracy"] > 0.85  # frames whose target is 0.5 are wrong either way
    assert found["loss"] < 0.4 * before
    assert found["flatness"] < 0.3
    assert made.alarms(found) == []
    # The gate alone lets the segmenter find the seeds again.
    frames = made.export().answers(*made.encoder.inputs(batch["clean"], batch["lengths"])).features.detach()
    spans = greedy_segment(frames[0], 0.5, -1.0, "reset")
    assert len(spans) == int(batch["segment"][0].max()) + 1


def test_gradients_reach_the_student_only() -> None:
    made = objective(teacher(), second=0.5)
    names = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.startswith("encoder.") for name in names)


def test_losses_of_parts_add_up_to_that_of_the_batch() -> None:
    made, sound = objective(teacher()), mels()
    made.eval()
    whole = made.collate(crops(4), sound, None, training=False)
    weight = made.weight_of(whole)
    parts = [made.collate(crops(4)[i::2], sound, None, training=False) for i in range(2)]
    losses = [made(part, weight, 0.0)[0] for part in parts]
    assert float(sum(losses)) == pytest.approx(float(made(whole, weight, 0.0)[0]), rel=1e-5)


# ---- data


def test_a_crop_is_the_same_in_every_batch_and_mixtures_stay_faint() -> None:
    made = objective(mixture_probability=1.0, mixture_snr=(14.0, 26.0), perturb=PerturbConfig(noise_probability=0.0))
    sound = mels()
    together, alone = (made.collate(chosen, sound, None, training=True) for chosen in (crops(4), crops(4)[2:3]))
    for name in ("clean", "segment", "merge"):
        assert torch.equal(together[name][2], alone[name][0])
    assert torch.allclose(together["heard"][2], alone["heard"][0], atol=1e-5)  # sums of another shape round otherwise
    quiet = objective(mixture_probability=1.0, mixture_snr=(60.0, 60.0), mixture_cut=0.0)
    heard = quiet.collate(crops(4), sound, None, training=True)
    assert not torch.equal(heard["heard"], heard["clean"])
    assert (heard["heard"] >= heard["clean"] - 1e-4).all()  # sound is added, never taken away
    loud = heard["clean"].exp().sum(-1) > heard["clean"].exp().sum(-1).mean()
    assert (heard["heard"] - heard["clean"])[loud].abs().mean() < 0.02
    plain = objective(mixture_probability=0.0).collate(crops(4), sound, None, training=True)
    assert torch.equal(plain["heard"], plain["clean"])


def test_segments_of_a_crop_are_those_of_the_item_around_it() -> None:
    made, sound = objective(), mels()
    (row,) = made.collate([Crop(1, 60, 100, (0, 0, 0))], sound, None, training=False)["segment"]
    spans = EnergySeeds()(sound.cut(1, 0, 240))
    wanted = torch.full((50,), -1)
    for number, (begin, end) in enumerate((spans - 60) // 2):
        wanted[max(0, begin) : max(0, end)] = number
    first = int(wanted[wanted >= 0].min())
    assert torch.equal(torch.where(row >= 0, row - row[row >= 0].min() + first, -1), wanted)


# ---- refusals


def test_refusals_name_the_field() -> None:
    with pytest.raises(InputError, match="gated = true"):
        SylberObjective(TEACHER, SylberConfig())
    with pytest.raises(InputError, match="teacher_layer"):
        SylberObjective(MODEL, SylberConfig(teacher_layer=2))
    with pytest.raises(InputError, match="teacher_layer"):
        SylberObjective(MODEL, SylberConfig(), teacher())
    with pytest.raises(InputError, match="whitening"):
        SylberConfig(whitening=2.0)
    with pytest.raises(InputError, match="dropout"):
        SylberConfig(dropout=3.0)
    with pytest.raises(InputError, match="threshold_prior"):
        SylberConfig(threshold_prior=0.0)
    with pytest.raises(InputError, match="lower end"):
        SylberConfig(mixture_snr=(5.0, 1.0))
    with pytest.raises(CheckpointError, match="projected_layer"):
        W2vBertConfig(gated=True)
    with pytest.raises(CheckpointError, match="true or false"):
        W2vBertConfig(gated=1)
    made = objective()
    plain = Mels(*(getattr(mels(), name) for name in ("frames", "starts", "lengths", "mean", "deviation", "failed")))
    with pytest.raises(InputError, match="seeds"):
        made.collate(crops(), plain, None, training=False)
    other = W2vBertEncoder(W2vBertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=64, normalization="stored"))  # fmt: skip
    with pytest.raises(InputError, match="another size"):
        made.begin_with(other)


def test_alarms_tell_of_collapse() -> None:
    made = objective()
    healthy = {"alike": 0.2, "gate_mean": 0.7}
    assert made.alarms(healthy) == []
    assert "alike" in made.alarms({**healthy, "alike": 0.95})[0]
    assert "open" in made.alarms({**healthy, "gate_mean": 0.99})[0]
    assert "shut" in made.alarms({**healthy, "gate_mean": 0.01})[0]


# ---- gated frames


def test_gated_frames_are_directions_times_a_gate_in_every_form() -> None:
    torch.manual_seed(0)
    encoder = W2vBertEncoder(MODEL).eval()
    wave = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    frames = encoder(wave).features
    projected = encoder.projected(*encoder.features(wave, torch.tensor([16000, 16000])))
    assert frames.shape[-1] == encoder.dim == 12
    assert projected.shape[-1] == 13
    assert torch.allclose(frames.norm(dim=-1), projected[..., -1].sigmoid(), atol=1e-6)
    assert torch.allclose(F.normalize(frames, dim=-1), F.normalize(projected[..., :-1], dim=-1), atol=1e-5)
    state = encoder.stream_state(2)
    width = encoder.grid.num_samples(8)
    with torch.inference_mode():
        pieces = []
        for at in range(0, 48, 8):
            piece = wave[:, at * 320 :][:, :width]
            length = torch.full((2,), piece.shape[1])
            piece = F.pad(piece, (0, width - piece.shape[1]))
            step, state = encoder.advance(piece, length, torch.full((2,), 8), state)
            pieces.append(step)
    streamed = torch.cat(pieces, 1)[:, 2:]
    count = min(streamed.shape[1], frames.shape[1], 40)
    assert torch.allclose(streamed[:, :count], frames[:, :count], atol=1e-5)
