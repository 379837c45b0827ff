"""MERT's loss: heads, masks, mixture, relaxation, gradients, targets in time, figures (checks K3, K4, K6 - K9, K11)."""

from dataclasses import replace

import librosa
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from speechtok.encoders import from_pretrained
from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.encoders.saved import save_encoder
from speechtok.errors import CheckpointError, InputError
from speechtok.frames import FrameGrid
from speechtok.nn.cqt_features import FMIN, centred_cqt
from speechtok.nn.transformer import attention_weights
from speechtok.training import mert
from speechtok.training.masking import draw_mask
from speechtok.training.mert import MertObjective, scale_gradient
from speechtok.training.mert_config import MertConfig
from speechtok.training.mixture import mix_in_batch
from speechtok.training.music_teachers import TaughtWaves, TeacherCodes
from speechtok.training.sampler import Crop
from speechtok.training.waves import Waves

HOP, RATE = 320, 24000
BOOKS, CODES = 3, 11
MODEL = HubertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    do_stable_layer_norm=True,
    sample_rate=RATE,
)
CONFIG = MertConfig(
    final_dim=16, cqt_bins=24, cqt_bins_per_octave=12, cqt_fmin=261.6, dropout=0.0, layerdrop=0.0, feature_grad_mult=1.0
)


def noise(hops: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, hops * HOP).astype(np.float32)


def waves_of(*sounds: np.ndarray) -> Waves:
    """Items in memory."""
    rows = [np.rint(sound * 32768).astype(np.int16).reshape(-1, HOP) for sound in sounds]
    lengths = np.array([len(row) for row in rows])
    return Waves(np.concatenate(rows), np.cumsum(lengths) - lengths, lengths, RATE, ())


def taught(waves: Waves, codes: list[np.ndarray], offset: int = 0) -> TaughtWaves:
    grid = FrameGrid(RATE, HOP, HOP + 2 * offset)
    teacher = TeacherCodes(grid, codes[0].shape[1], CODES, lambda item: codes[item].astype(np.uint16))
    return TaughtWaves.join(waves, teacher)


def random_sound(*hops: int, seed: int = 0) -> TaughtWaves:
    generator = np.random.default_rng(seed + 100)
    codes = [generator.integers(0, CODES, (count, BOOKS)) for count in hops]
    return taught(waves_of(*(noise(count, seed + i) for i, count in enumerate(hops))), codes)


def objective_of(config: MertConfig = CONFIG, model: HubertConfig = MODEL, seed: int = 0, **teacher) -> MertObjective:
    torch.manual_seed(seed)
    counts = {"books": BOOKS, "codes": CODES} | teacher
    return MertObjective(model, config, **(counts if config.acoustic_weight else {}))


def crops_of(*places: tuple[int, int, int], step: int = 0) -> list[Crop]:
    return [Crop(*place, seed=(0, step, row)) for row, place in enumerate(places)]


def batch_of(
    objective: MertObjective, sound: Waves, *places: tuple[int, int, int], training: bool = False, step: int = 0
):
    return objective.collate(crops_of(*places, step=step), sound, None, training=training)


PLACES = ((0, 5, 40), (1, 0, 40), (0, 30, 40))


# ---- frames, heads


def test_frames_are_those_of_the_convolutions() -> None:
    objective = objective_of()
    assert [objective.encoder.grid.num_frames(n) for n in (24000, 120000, 122880)] == [74, 374, 383]
    batch = batch_of(objective, random_sound(80, 60), *PLACES)
    assert batch["mask"].shape == (3, 39)  # the last hop has no whole frame
    assert batch["codes"].shape == (3, 39, BOOKS)


def test_the_loss_is_that_of_fairseq(monkeypatch) -> None:
    """NCE with the positive in slot 0 and its duplicates at minus infinity is the cross-entropy over all codes."""
    config = replace(CONFIG, cqt_weight=0.0, feature_penalty=0.0)
    objective = objective_of(config).eval()
    batch = batch_of(objective, random_sound(80, 60), *PLACES)
    with torch.no_grad():
        weight = objective.weight_of(batch)
        loss, figures = objective(batch, weight, 0.0)
        features, _ = objective.encoder.inputs(batch["heard"], batch["lengths"])
        hide = lambda x: torch.where(batch["mask"][..., None], objective.mask_vector, x)  # noqa: E731
        frames = [*objective.encoder.walk(features, None, batch["lengths"], hide)][-1][batch["mask"]]
        total = 0.0
        for book, answers in enumerate(objective.project(frames).chunk(BOOKS, -1)):
            labels, target = objective.labels[book], batch["codes"][batch["mask"]][:, book]
            for answer, code in zip(answers, target.tolist(), strict=True):
                candidates = torch.cat([labels[code][None], labels])
                scores = F.cosine_similarity(answer[None], candidates) / 0.1
                scores[1:][(labels == labels[code]).all(-1)] = -torch.inf
                total += float(F.cross_entropy(scores[None], torch.tensor([0])))
    # The published loss adds the books up; ours is their mean.
    assert float(loss) == pytest.approx(total / BOOKS / weight, rel=1e-5)
    assert float(figures["acoustic"]) == pytest.approx(total / BOOKS, rel=1e-5)


def test_training_begins_near_the_entropy_of_the_codes() -> None:
    config = replace(CONFIG, final_dim=64, cqt_weight=0.0, feature_penalty=0.0)
    objective = objective_of(config, replace(MODEL, hidden_size=64), books=8, codes=1024)
    generator = np.random.default_rng(0)
    sound = taught(waves_of(noise(300, 0)), [generator.integers(0, 1024, (300, 8))])
    batch = batch_of(objective, sound, (0, 0, 300))
    loss, _ = objective(batch, objective.weight_of(batch), 0.0)
    assert float(loss.detach()) == pytest.approx(np.log(1024) + 0.2, rel=0.03)


def test_the_number_of_books_does_not_change_the_size_of_the_loss() -> None:
    sound = random_sound(80, 60)
    losses = []
    for books in (1, 2, 0):
        objective = objective_of(replace(CONFIG, books=books, cqt_weight=0.0, feature_penalty=0.0)).eval()
        assert objective.books == (books or BOOKS)
        batch = batch_of(objective, sound, *PLACES)
        losses.append(float(objective(batch, objective.weight_of(batch), 0.0)[0].detach()))
    assert max(losses) / min(losses) < 1.3  # a sum would give 3


@pytest.mark.parametrize("name", ["codes", "around"])
def test_what_is_not_hidden_has_no_say(name: str, monkeypatch) -> None:
    objective = objective_of().eval()
    objective.cqt_deviation.fill_(0.1)
    sound = random_sound(80, 60)
    batch = batch_of(objective, sound, *PLACES)
    weight = objective.weight_of(batch)
    with torch.no_grad():
        before = float(objective(batch, weight, 0.0)[0])
        if name == "codes":
            other = torch.where(batch["mask"][..., None], batch["codes"], (batch["codes"] + 1) % CODES)
            assert float(objective({**batch, "codes": other}, weight, 0.0)[0]) == before
            hidden = torch.where(batch["mask"][..., None], (batch["codes"] + 1) % CODES, batch["codes"])
            assert float(objective({**batch, "codes": hidden}, weight, 0.0)[0]) != before
        else:
            original = mert.centred_cqt
            for changed, same in ((~batch["mask"], True), (batch["mask"], False)):
                monkeypatch.setattr(
                    mert, "centred_cqt", lambda *x, where=changed, **y: original(*x, **y) + where[..., None]
                )
                assert (float(objective(batch, weight, 0.0)[0]) == before) == same


# ---- masks and mixture


def test_the_mask_is_fairseqs_on_average() -> None:
    frames, rows = 374, 400
    theirs = _compute_mask_indices((rows, frames), 0.8, 5, min_masks=2)
    config = MertConfig()
    ours = [draw_mask(frames, config.mask_probability, config.mask_span, np.random.default_rng(i)) for i in range(rows)]
    assert np.mean(ours) == pytest.approx(0.583, abs=0.01)
    assert np.mean(theirs) == pytest.approx(np.mean(ours), abs=0.015)
    assert all(abs(row.mean() - 0.583) < 0.25 for row in ours)


def mixed(clean: torch.Tensor, lengths: torch.Tensor | None = None, seed: int = 0, **changes) -> torch.Tensor:
    rows, width = clean.shape
    lengths = torch.full((rows,), width) if lengths is None else lengths
    arguments = {"probability": 0.5, "segments": 3, "samples": (30, 60), "gain": 1.0} | changes
    return mix_in_batch(clean, lengths, [np.random.default_rng([seed, row]) for row in range(rows)], **arguments)


def test_mixture_changes_some_rows_by_pieces_of_others() -> None:
    clean = torch.randn(600, 400, generator=torch.Generator().manual_seed(0))
    heard = mixed(clean)
    assert clean.data_ptr() != heard.data_ptr()
    changed = (heard != clean).sum(1)
    fraction = float((changed > 0).float().mean())
    assert abs(fraction - 0.5) < 3 * (0.25 / 600) ** 0.5
    assert int(changed.max()) <= 3 * 60
    assert int(changed[changed > 0].min()) >= 30
    assert torch.equal(mixed(clean, gain=0.0), clean)
    assert torch.equal(mixed(clean, probability=0.0), clean)
    assert bool(((mixed(clean, probability=1.0) != clean).sum(1) > 0).all())


def test_what_is_added_stands_in_another_row() -> None:
    clean = torch.zeros(3, 100)
    clean[:] = torch.tensor([[1.0], [10.0], [100.0]])
    heard = mixed(clean, probability=1.0, segments=1, samples=(20, 20))
    for row, added in enumerate(heard - clean):
        values = set(added[added != 0].tolist())
        assert values  # from one of the others, or from where they meet
        assert values <= {1.0, 10.0, 100.0} - {float(clean[row, 0])}
    louder = mixed(clean, probability=1.0, segments=1, samples=(20, 20), gain=0.5)
    assert torch.allclose(louder - clean, 0.5 * (heard - clean))


def test_a_row_that_is_alone_stays_clean_and_keeps_its_other_draws() -> None:
    clean = torch.randn(1, 400)
    assert torch.equal(mixed(clean, probability=1.0), clean)
    objective = objective_of(replace(CONFIG, mixture_probability=1.0, layerdrop=0.5))
    sound = random_sound(80, 60)
    alone = batch_of(objective, sound, PLACES[0], training=True)
    beside = batch_of(objective, sound, *PLACES, training=True)
    assert torch.equal(alone["heard"][0], torch.from_numpy(sound.cut(0, 5, 40)))
    assert not torch.equal(beside["heard"][0], alone["heard"][0])
    for name in ("mask", "codes", "around", "skip"):
        assert torch.equal(alone[name][0], beside[name][0]), name


def test_padding_is_neither_taken_nor_changed() -> None:
    clean = torch.ones(2, 100)
    clean[1, 40:] = 7.0
    lengths = torch.tensor([100, 40])
    heard = mixed(clean, lengths, probability=1.0, segments=3, samples=(30, 90))
    assert bool((heard[1, 40:] == 7.0).all())
    assert set((heard - clean)[0].tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_targets_and_masks_do_not_know_of_the_mixture() -> None:
    sound = random_sound(80, 60)
    mixing = objective_of(replace(CONFIG, mixture_probability=1.0))
    plain = objective_of(replace(CONFIG, mixture_probability=0.0))
    one, two = (batch_of(objective, sound, *PLACES, training=True) for objective in (mixing, plain))
    assert all(torch.equal(one[name], two[name]) for name in ("mask", "asked", "codes", "around", "lengths"))
    assert not torch.equal(one["heard"], two["heard"])
    held_out = batch_of(mixing, sound, *PLACES)
    assert torch.equal(held_out["heard"], two["heard"])


# ---- attention


@given(st.floats(1, 64), st.integers(0, 2**31), st.booleans())
@settings(max_examples=30, deadline=None)
def test_relaxed_attention_is_the_plain_one(relaxation: float, seed: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (3 * torch.randn(2, 3, 7, 8, generator=generator) for _ in range(2))
    keys = torch.rand(2, 1, 1, 7, generator=generator) < 0.6
    keys[..., 0] = True
    bias = keys if masked else torch.randn(2, 3, 7, 7, generator=generator)
    scores = (query @ key.mT) / 8**0.5
    plain = torch.softmax(scores.masked_fill(~keys, -torch.inf) if masked else scores + bias, -1)
    assert torch.allclose(attention_weights(query, key, bias, relaxation), plain, atol=1e-6)


def test_relaxation_keeps_large_scores_finite_in_half_precision() -> None:
    query, key = torch.full((1, 1, 4, 64), 112.0).half(), torch.full((1, 1, 5, 64), 112.0).half()
    key[..., 0, :] *= -1
    plain = (query * 64**-0.5) @ key.mT  # 100,352: more than float16 holds
    assert bool(plain.isinf().any())
    finished = plain / 32  # as MERT's code has it: too late
    assert bool(finished.isinf().any())
    relaxed = attention_weights(query, key, None, 32.0)
    assert bool(relaxed.isfinite().all())
    expected = torch.softmax((query.double() * 64**-0.5) @ key.double().mT, -1)
    assert torch.allclose(relaxed.double(), expected, atol=1e-6)


@pytest.mark.parametrize("stable", [True, False])
def test_an_encoder_with_relaxation_gives_the_same(stable: bool) -> None:
    model = replace(MODEL, do_stable_layer_norm=stable)
    plain, relaxed = (objective_of(replace(CONFIG, attention_relaxation=c), model).eval() for c in (1.0, 32.0))
    sound = random_sound(80, 60, 9)
    batch = batch_of(plain, sound, *PLACES, (2, 0, 9))  # a short row: keys are masked
    results = [objective(batch, objective.weight_of(batch), 0.0) for objective in (plain, relaxed)]
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    for objective, (loss, _) in zip((plain, relaxed), results, strict=True):
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in objective.parameters() if p.grad is not None)
    one, two = (objective.encoder.encoder.blocks[0].attention.k_proj.weight.grad for objective in (plain, relaxed))
    assert torch.allclose(one, two, atol=1e-6)
    assert "attention_entropy_layer1" in plain.summary({**results[0][1], "loss": results[0][0].detach()})


def test_dropout_and_skipped_blocks_are_for_training_alone() -> None:
    config = replace(CONFIG, dropout=0.3, layerdrop=0.4)
    objective, plain = objective_of(config), objective_of()
    sound = random_sound(80, 60)
    batch = batch_of(objective, sound, *PLACES)
    assert "skip" not in batch
    weight = objective.weight_of(batch)
    losses = [float(one.eval()(batch, weight, 0.0)[0].detach()) for one in (objective, plain)]
    assert losses[0] == losses[1]
    assert float(objective.train()(batch, weight, 0.0)[0].detach()) != losses[0]
    draws = torch.cat([batch_of(objective, sound, *PLACES, training=True, step=i)["skip"] for i in range(100)])
    assert draws.shape == (300, 2)
    assert float(draws.float().mean()) == pytest.approx(0.4, abs=0.06)


def test_a_skipped_block_is_passed_over_row_by_row() -> None:
    encoder = objective_of(model=replace(MODEL, do_stable_layer_norm=False)).encoder.eval()
    wave, lengths = torch.randn(3, 8000), torch.full((3,), 8000)
    with torch.no_grad():
        features, _ = encoder.inputs(wave, lengths)
        skip = torch.tensor([[False, False], [True, False], [True, True]])
        plain = list(encoder.walk(features, None, lengths))
        states = list(encoder.walk(features, None, lengths, skip=skip))
        assert torch.allclose(states[2][0], plain[2][0], atol=1e-6)
        assert torch.equal(states[1][1], plain[0][1])
        assert not torch.equal(states[2][1], states[1][1])
        assert torch.equal(states[2][2], plain[0][2])


# ---- gradients


def gradients(config: MertConfig) -> dict[str, torch.Tensor]:
    objective = objective_of(config)
    batch = batch_of(objective, random_sound(80, 60), *PLACES)
    objective(batch, objective.weight_of(batch), 0.0)[0].backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("only_penalty", [False, True])
def test_the_convolutions_learn_by_a_share(only_penalty: bool) -> None:
    config = replace(CONFIG, feature_penalty=10.0)
    if only_penalty:
        config = replace(config, acoustic_weight=1e-20, cqt_weight=0.0)
    whole, quarter = gradients(config), gradients(replace(config, feature_grad_mult=0.25))
    stem = [name for name in whole if name.startswith("encoder.feature_extractor")]
    assert len(stem) == 9
    assert all(bool(whole[name].any()) for name in stem)
    for name in whole:
        factor = 0.25 if name in stem else 1.0
        assert torch.equal(quarter[name], factor * whole[name]), name


def test_scaled_gradients() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    y = scale_gradient(x, 0.1)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((4, 5), 0.1))


def test_every_weight_gets_a_gradient() -> None:
    objective = objective_of(replace(CONFIG, layerdrop=0.5), replace(MODEL, feat_extract_norm="layer", conv_bias=True))
    batch = batch_of(objective, random_sound(80, 60), *PLACES, training=True)
    batch["skip"][:] = True  # even a block that no row goes through: processes wait for all gradients
    objective(batch, objective.weight_of(batch), 0.0)[0].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


# ---- shares of a step


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_shares_of_a_step_add_up(norm: str) -> None:
    objective = objective_of(model=replace(MODEL, feat_extract_norm=norm)).eval()
    sound = random_sound(80, 60, 25)
    places = (*PLACES, (2, 0, 40))  # the last item is shorter
    batch = batch_of(objective, sound, *places)
    assert batch["lengths"].tolist() == [40 * HOP] * 3 + [25 * HOP]
    assert not batch["mask"][3, 24:].any()
    weight = objective.weight_of(batch)
    with torch.no_grad():
        whole, figures = objective(batch, weight, 0.0)
        parts = []
        for row, crop in enumerate(crops_of(*places)):
            part = objective.collate([crop], sound, None, training=False)
            count = part["mask"].shape[1]
            assert torch.equal(part["mask"][0], batch["mask"][row, :count])
            parts.append(objective(part, weight, 0.0))
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(float(whole), rel=1e-5)
    for name in ("acoustic", "cqt", "penalty", "asked"):
        assert sum(float(found[name]) for _, found in parts) == pytest.approx(float(figures[name]), rel=1e-5), name


# ---- targets in time


@given(st.integers(0, 60), st.integers(1, 30), st.integers(-500, 500), st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_the_frame_that_holds_the_middle(first: int, count: int, offset: int, total: int) -> None:
    codes = np.arange(1, total + 1, dtype=np.uint16)[:, None]
    grid = conv_grid = HubertEncoder(MODEL).grid
    teacher = TeacherCodes(FrameGrid(RATE, HOP, HOP + 2 * max(0, offset), max(0, -offset)), 1, 100, lambda item: codes)
    found, known = teacher.on_grid(grid, 0, first, count)
    for i in range(count):
        middle = HOP * (first + i) + 200
        assert conv_grid.centre_seconds(first + i) * RATE == pytest.approx(middle)
        inside = [t for t in range(total) if teacher.grid.span(t)[0] <= middle < teacher.grid.span(t)[1]]
        assert bool(known[i]) == bool(inside)
        assert found[i, 0] == (inside[0] + 1 if inside else 0)


def test_a_codecs_frame_stands_beside_the_convolutions_frame_of_its_number() -> None:
    objective = objective_of()
    codes = [np.stack([np.arange(80) % CODES] * BOOKS, 1), np.zeros((60, BOOKS))]
    batch = batch_of(objective, taught(waves_of(noise(80, 0), noise(60, 1)), codes), (0, 5, 40))
    assert batch["codes"][0, :, 0].tolist() == [(5 + t) % CODES for t in range(39)]


def test_frames_without_a_code_are_not_asked() -> None:
    objective = objective_of().eval()
    sound = taught(waves_of(noise(80, 0)), [np.zeros((20, BOOKS))])  # the teacher has the first 20 frames only
    batch = batch_of(objective, sound, (0, 5, 40))
    assert not batch["asked"][0, 15:].any()
    assert batch["mask"][0, 15:].any()
    assert objective.weight_of(batch) == int(batch["mask"][0, :15].sum()) > 0
    assert bool(objective(batch, objective.weight_of(batch), 0.0)[0].isfinite())


@pytest.mark.parametrize("place", [(0, 60, 40), (0, 0, 40), (0, 160, 40), (1, 0, 40)])
def test_magnitudes_of_a_crop_are_those_of_the_whole_item(place: tuple[int, int, int]) -> None:
    """The real sound around a crop is read, by filters that are longer than the crop's frames."""
    config = replace(CONFIG, cqt_fmin=65.4, cqt_bins=36)
    objective = objective_of(config)
    sound = random_sound(200, 30)
    batch = batch_of(objective, sound, place)
    item, first, _ = place
    wave = torch.from_numpy(sound.cut(item, 0, 400))[None]
    grid = objective.encoder.grid
    whole = centred_cqt(objective.transform, wave, grid, grid.num_frames(wave.shape[1]))[0]
    count = batch["mask"].shape[1]
    found = objective.cqt_targets(batch["around"], torch.ones(1, count, dtype=torch.bool))
    assert torch.allclose(found, whole[first : first + count], atol=1e-5)
    bare = centred_cqt(objective.transform, batch["heard"], grid, count)[0]
    assert (bare[:5] - found[:5]).abs().max() > 1e-3 or item == 1 or first == 0


def test_magnitudes_are_centred_on_the_middle_of_the_frame() -> None:
    """Against inner products with librosa's wavelets in float64."""
    objective = objective_of()
    wave = torch.from_numpy(noise(60, 3))
    grid = objective.encoder.grid
    found = centred_cqt(objective.transform, wave[None], grid, 59)[0]
    freqs = 261.6 * 2.0 ** (np.arange(24) / 12)
    wavelets, sizes = librosa.filters.wavelet(freqs=freqs, sr=RATE, pad_fft=False, dtype=np.complex128)
    padded = np.pad(wave.double().numpy(), 4000)
    for frame in (0, 7, 30, 58):
        for kernel, size, value in zip(wavelets, sizes, found[frame].tolist(), strict=True):
            held = int(np.floor(size / 2) - np.floor(-size / 2))  # librosa centres the samples -size/2 ... size/2
            origin = (len(kernel) - held) // 2 - int(np.floor(-size / 2))
            begin = 4000 + 320 * frame + 200 - origin
            product = (padded[begin : begin + len(kernel)] * kernel.conj()).sum() * size**0.5
            assert value == pytest.approx(np.log1p(abs(product)), abs=1e-5)


def test_the_reach_covers_half_the_longest_filter_and_little_more() -> None:
    for fmin, bins in ((32.7, 12), (65.4, 48), (261.6, 12)):
        objective = objective_of(replace(CONFIG, cqt_fmin=fmin, cqt_bins_per_octave=bins))
        _, sizes = librosa.filters.wavelet(freqs=fmin * 2.0 ** (np.arange(24) / bins), sr=RATE, pad_fft=False)
        # More by the filters of the decimation, which are longest where it goes furthest.
        assert max(sizes) / 2 < objective.reach * HOP <= 2 * max(sizes) / 2 + 6 * HOP


def test_targets_are_standardised_over_the_sound() -> None:
    objective = objective_of()
    sound = random_sound(150, 120, 200)
    objective.measure_targets(sound)
    rows = torch.cat(
        [
            objective.cqt_targets(batch["around"], torch.ones_like(batch["mask"]))
            for batch in (batch_of(objective, sound, (item, 0, 200)) for item in range(3))
        ]
    )
    again = objective_of()
    again.measure_targets(sound)
    assert torch.equal(again.cqt_mean, objective.cqt_mean)
    rows = torch.cat(
        [
            objective.cqt_targets(batch["around"], torch.ones_like(batch["mask"]))
            for batch in (batch_of(objective, sound, (i, 0, int(sound.lengths[i]))) for i in range(3))
        ]
    )
    assert rows.mean(0).abs().max() < 1e-3
    assert (rows.std(0) - 1).abs().max() < 0.01
    silent = waves_of(np.zeros(100 * HOP, np.float32))
    with pytest.raises(InputError, match="flat"):
        objective_of().measure_targets(silent)


def sweeps(items: int, hops: int, seed: int) -> TaughtWaves:
    """Tones that rise and fall by a step in every frame: a hidden frame's code lies between those of its neighbours."""
    generator = np.random.default_rng(seed)
    turns = np.where(generator.random((items, hops)) < 0.05, -1, 1)
    places = np.cumsum(np.cumprod(turns, 1), 1) + generator.integers(0, 20, (items, 1))
    codes = np.abs(places % 20 - 10)
    phases = np.cumsum(np.repeat(2 * np.pi * 400 * 2 ** (codes / 3) / RATE, HOP, axis=1), axis=1)
    return taught(waves_of(*(0.3 * np.sin(phase) for phase in phases)), [row[:, None] for row in codes])


def shifted(sound: TaughtWaves, by: int) -> TaughtWaves:
    codes = [np.roll(sound.teacher.item(i), -by, axis=0).astype(np.int64) for i in range(len(sound.lengths))]
    return taught(sound, codes)


def test_labels_that_are_a_frame_off_fit_worse() -> None:
    config = replace(CONFIG, cqt_weight=0.0, feature_penalty=0.0, mask_probability=0.1, mask_span=2,
                     mixture_probability=0.0)  # fmt: skip
    objective = objective_of(config, books=1)
    training, held_out = sweeps(40, 80, 1), sweeps(12, 80, 2)
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    for step in range(80):
        items = np.random.default_rng(step).permutation(40)[:8].tolist()
        batch = batch_of(objective, training, *((item, 0, 80) for item in items), training=True, step=step)
        loss, _ = objective(batch, objective.weight_of(batch), 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.eval()
    losses = {}
    with torch.no_grad():
        for by in (-1, 0, 1):
            batch = batch_of(objective, shifted(held_out, by), *((item, 0, 80) for item in range(12)))
            losses[by] = float(objective(batch, objective.weight_of(batch), 0.0)[0])
    assert losses[0] < 0.5 * np.log(CODES)  # it has learned something
    assert losses[0] < 0.8 * min(losses[-1], losses[1]), losses


# ---- CQT features as input


def test_cqt_features_beside_the_convolutions(tmp_path) -> None:
    torch.manual_seed(0)
    config = replace(MODEL, feature_extractor_cqt=True, feature_extractor_cqt_bins=84)
    encoder = HubertEncoder(config).eval()
    assert encoder.feature_projection.projection.weight.shape == (32, 16 + 84)
    assert not [name for name in encoder.state_dict() if "cqt" in name]  # filters are made, not stored
    rows = [torch.from_numpy(noise(60, 0)), torch.from_numpy(noise(31, 1)), torch.from_numpy(noise(2, 2))]
    lengths = torch.tensor([len(row) for row in rows])
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5.0)
    with torch.no_grad():
        together = encoder(batch, lengths)
        for i, row in enumerate(rows):
            alone = encoder(row[None]).features[0]
            assert len(alone) == int(together.lengths[i]) == encoder.grid.num_frames(len(row))
            assert torch.allclose(together.features[i, : len(alone)], alone, atol=1e-5)
        features, magnitudes = encoder.inputs(batch, lengths)
        assert magnitudes.shape == (*features.shape[:2], 84)
        tone = torch.sin(2 * np.pi * FMIN * 2**4 * torch.arange(24000) / RATE)[None]
        assert int(encoder.inputs(tone, torch.tensor([24000]))[1][0, 37].argmax()) == 48
        loaded = from_pretrained(save_encoder(encoder, tmp_path / "encoder"))
        assert torch.equal(loaded(batch, lengths).features, together.features)
        first = from_pretrained(tmp_path / "encoder", 1)
        assert torch.allclose(first(batch, lengths).features, encoder.hidden_states(batch, lengths)[1], atol=1e-6)
    plain = HubertEncoder(MODEL)
    assert not [name for name in plain.config_dict() if "cqt" in name]
    assert encoder.config_dict()["feature_extractor_cqt_bins"] == 84
    with pytest.raises(CheckpointError, match="feature_extractor_cqt_bins"):
        replace(MODEL, feature_extractor_cqt_bins=85)
    with pytest.raises(CheckpointError, match="feature_extractor_cqt"):
        HubertConfig.from_hf({"model_type": "mert_model", "feature_extractor_cqt": True})


def test_training_with_cqt_features() -> None:
    model = replace(MODEL, feature_extractor_cqt=True, feature_extractor_cqt_bins=84)
    objective = objective_of(model=model)
    batch = batch_of(objective, random_sound(80, 60), *PLACES, training=True)
    objective(batch, objective.weight_of(batch), 0.0)[0].backward()
    assert all(p.grad is not None for p in objective.parameters())


# ---- what comes out


@pytest.mark.parametrize("changes", [{}, {"sigma_reparam": True}, {"identity_init": True}])
def test_export_is_the_encoder_with_plain_rounded_weights(changes: dict) -> None:
    objective = objective_of(replace(CONFIG, **changes))
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    batch = batch_of(objective, random_sound(80, 60), *PLACES)
    objective(batch, objective.weight_of(batch), 0.0)[0].backward()
    optimizer.step()
    encoder = objective.export()
    assert set(encoder.state_dict()) == set(HubertEncoder(MODEL).state_dict())
    assert all(torch.equal(x, x.bfloat16().float()) for x in encoder.state_dict().values())
    wave = torch.from_numpy(noise(60, 5))[None]
    with torch.no_grad():
        ours, theirs = encoder(wave).features, objective.encoder.eval()(wave).features
    assert torch.allclose(ours, theirs, atol=0.05 * float(theirs.abs().max()))


def test_identity_init_passes_the_input_on() -> None:
    encoder = objective_of(replace(CONFIG, identity_init=True)).encoder.eval()
    with torch.no_grad():
        states = encoder.hidden_states(torch.from_numpy(noise(60, 5))[None])
    assert torch.equal(states[0], states[1])


def test_figures_and_alarms() -> None:
    objective = objective_of().eval()
    sound = random_sound(80, 60)
    objective.measure_targets(sound)
    batch = batch_of(objective, sound, *PLACES)
    weight = objective.weight_of(batch)
    with torch.no_grad():
        loss, figures = objective(batch, weight, 0.0)
    summary = objective.summary({**figures, "loss": loss * weight})
    assert summary["loss"] == pytest.approx(summary["acoustic"] + summary["cqt"] + 10 * summary["penalty"], rel=1e-5)
    names = {f"accuracy_book{book}" for book in range(1, BOOKS + 1)}
    assert names <= set(summary)
    assert summary["accuracy"] == pytest.approx(np.mean([summary[name] for name in names]))
    codes = batch["codes"][batch["asked"]]
    majority = np.mean([np.bincount(codes[:, k]).max() / len(codes) for k in range(BOOKS)])
    assert summary["majority"] == pytest.approx(majority)
    assert 1 < summary["code_perplexity"] <= CODES
    target = objective.cqt_targets(batch["around"], batch["asked"]).double()
    variance = float(target.var(0, correction=0).mean())
    assert summary["cqt_r2"] == pytest.approx(1 - summary["cqt"] / variance, rel=1e-3)
    bad = {**summary, "accuracy": 0.1, "majority": 0.2, "guess_perplexity": 1.0, "cqt_r2": -0.5}
    assert len(objective.alarms(bad)) == 3
    assert objective.alarms({**summary, "accuracy": 0.5, "guess_perplexity": 5.0, "cqt_r2": 0.5}) == []


@pytest.mark.parametrize("off", ["acoustic_weight", "cqt_weight"])
def test_either_teacher_may_be_left_out(off: str) -> None:
    objective = objective_of(replace(CONFIG, **{off: 0.0}))
    sound = random_sound(80, 60)
    objective.measure_targets(sound)
    batch = batch_of(objective, waves_of(noise(80, 0), noise(60, 1)) if off == "acoustic_weight" else sound, *PLACES)
    loss, figures = objective.eval()(batch, objective.weight_of(batch), 0.0)
    summary = objective.summary({**figures, "loss": loss.detach()})
    assert ("cqt_r2" in summary) == (off != "cqt_weight")
    assert ("accuracy" in summary) == (off != "acoustic_weight")
    objective.alarms(summary)


@pytest.mark.parametrize(
    "changes",
    [
        {"acoustic_weight": 0.0, "cqt_weight": 0.0},
        {"acoustic_weight": -1.0},
        {"feature_penalty": float("inf")},
        {"books": -1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"cqt_fmin": float("nan")},
        {"mixture_gain": float("nan")},
        {"cqt_bins": 0},
        {"mask_probability": 0.0},
        {"dropout": 1.0},
        {"mixture_probability": 1.5},
        {"mixture_seconds": (1.0, 0.5)},
        {"mixture_segments": 0},
        {"attention_relaxation": 0.5},
        {"sigma_reparam": True, "identity_init": True},
    ],
)
def test_unusable_settings_are_refused(changes: dict) -> None:
    with pytest.raises(InputError):
        replace(CONFIG, **changes)


def test_teacher_and_settings_must_fit() -> None:
    with pytest.raises(InputError, match="acoustic"):
        MertObjective(MODEL, CONFIG)
    with pytest.raises(InputError, match="acoustic"):
        MertObjective(MODEL, replace(CONFIG, acoustic_weight=0.0), 2, 8)
    with pytest.raises(InputError, match="3 codebooks"):
        MertObjective(MODEL, replace(CONFIG, books=4), 3, 8)
    with pytest.raises(InputError, match="TaughtWaves"):
        batch_of(objective_of(), waves_of(noise(80, 0)), (0, 0, 40))
