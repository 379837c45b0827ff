"""The w2v-BERT objective against slow references, and its gradients."""

import math

import numpy as np
import pytest
import torch

from speechtok.audio.perturb import PerturbConfig
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError
from speechtok.nn.product_quantizer import GumbelQuantizer, RandomProjectionQuantizer, gumbel_noise, perplexity
from speechtok.training.masking import draw_distractors, draw_mask
from speechtok.training.mels import Mels
from speechtok.training.sampler import Crop, Sampler
from speechtok.training.w2v_bert import W2vBertObjective
from speechtok.training.w2v_bert_config import W2vBertObjectiveConfig

MODEL = W2vBertConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, conv_depthwise_kernel_size=5,
    normalization="stored", attention_chunk=8, attention_past=16, look_ahead=2,
)  # fmt: skip
SMALL = {"contrastive_blocks": 2, "groups": 2, "codes": 16, "code_dim": 16, "target_groups": 2, "final_dim": 24,
         "distractors": 7, "quantizer_init": 0.3}  # fmt: skip


def mels(items: int = 6, frames: int = 160, seed: int = 0) -> Mels:
    """Made-up speech: one of 40 sounds after the other, each for 60 to 200 ms, with some noise."""
    generator = np.random.default_rng(seed)
    sounds, total = generator.normal(size=(40, 80)), items * frames
    spoken = np.repeat(generator.integers(0, 40, total), generator.integers(6, 20, total))[:total]
    values = sounds[spoken] + 0.1 * generator.normal(size=(total, 80))
    starts, lengths = np.arange(items) * frames, np.full(items, frames)
    return Mels(values.astype(np.float16), starts, lengths, np.zeros(80, np.float32), np.ones(80, np.float32), ())


def crops(count: int = 3, frames: int = 160) -> list[Crop]:
    return [Crop(item, 0, frames, (7, 0, item)) for item in range(count)]


def objective(model: W2vBertConfig = MODEL, **changes) -> W2vBertObjective:
    torch.manual_seed(0)
    perturb = changes.pop("perturb", None)
    return W2vBertObjective(model, W2vBertObjectiveConfig(**{**SMALL, **changes}), perturb)


# ---- draws


@pytest.mark.parametrize("frames", [375, 750])
def test_the_published_mask_covers_half_of_the_frames(frames: int) -> None:
    generator = np.random.default_rng(0)
    shares = [draw_mask(frames, 0.065, 10, generator).mean() for _ in range(1000)]
    assert abs(np.mean(shares) - 0.49) <= 0.02


def test_masks_are_spans_and_never_empty() -> None:
    generator = np.random.default_rng(1)
    for frames in (1, 5, 40, 400):
        mask = draw_mask(frames, 0.01, 10, generator)
        assert mask.any()
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]))))[::2]
        # A run is shorter than a span only where the sound ends.
        assert all(run >= min(10, frames) for run in runs[:-1])
    assert not draw_mask(4000, 0.001, 10, generator).all()
    with pytest.raises(InputError, match="probability"):
        draw_mask(10, 0.0, 10, generator)


def test_distractors_are_others_and_uniform() -> None:
    drawn = draw_distractors(5, 20000, np.random.default_rng(0))
    assert drawn.shape == (5, 20000)
    for row, others in enumerate(drawn):
        counts = np.bincount(others, minlength=5)
        assert counts[row] == 0
        assert np.abs(np.delete(counts, row) / 20000 - 0.25).max() < 0.02
    assert draw_distractors(1, 3, np.random.default_rng(0)).tolist() == [[0, 0, 0]]


def test_padded_frames_are_never_hidden() -> None:
    model = objective()
    corpus = Mels(mels().frames, np.array([0, 200]), np.array([160, 60]), np.zeros(80), np.ones(80), ())
    batch = model.collate([Crop(0, 0, 160, (0,)), Crop(1, 0, 160, (1,))], corpus, None, training=True)
    assert batch["mask"].shape == (2, 80)
    assert not batch["mask"][1, 30:].any()
    assert batch["mask"].sum() == batch["hidden"].sum() == model.weight_of(batch)


def test_draws_of_a_crop_do_not_depend_on_its_batch() -> None:
    model = objective(perturb=PerturbConfig(noise_probability=0.0))
    together = model.collate(crops(3), mels(), None, training=True)
    for row, crop in enumerate(crops(3)):
        alone = model.collate([crop], mels(), None, training=True)
        count = int(alone["hidden"].sum())
        for name in ("clean", "heard", "mask"):
            assert torch.equal(alone[name][0], together[name][row])
        for name in ("where", "distractors", "noise"):
            assert torch.equal(alone[name][0, :count], together[name][row, :count])


def test_the_perturbed_copy_is_only_what_the_blocks_hear() -> None:
    model = objective(perturb=PerturbConfig(noise_probability=0.0))
    batch = model.collate(crops(2), mels(), None, training=True)
    assert not torch.allclose(batch["heard"], batch["clean"])
    held_out = model.collate(crops(2), mels(), None, training=False)
    assert torch.equal(held_out["heard"], held_out["clean"])
    assert "noise" not in held_out


# ---- sampler


def test_sampler_is_a_function_of_the_step() -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 300)
    one, two = (Sampler(lengths, (256, 512, 1024), 3072, 5) for _ in range(2))
    assert [one(step) for step in (3, 1, 2)] == [two(step) for step in (3, 1, 2)]
    assert one(1) != one(2)
    assert Sampler(lengths, (256, 512, 1024), 3072, 6)(1) != one(1)


def test_sampler_fills_batches_with_crops_of_one_length() -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 300)
    sampler = Sampler(lengths, (256, 512, 1024), 3072, 0, least=3)
    for step in range(200):
        chosen = sampler(step)
        (length,) = {crop.length for crop in chosen}
        assert len(chosen) == 3072 // length
        assert len({crop.item for crop in chosen}) == len(chosen)
        for crop in chosen:
            bucket = max((c for c in (256, 512, 1024) if c <= lengths[crop.item]), default=256)
            assert bucket == length
            assert 0 <= crop.start <= max(0, lengths[crop.item] - length)


def test_sampler_draws_sound_in_proportion() -> None:
    lengths = np.array([300] * 40 + [1500] * 40)
    sampler = Sampler(lengths, (256, 1024), 2048, 0)
    heard = np.zeros(2)
    for step in range(600):
        heard[int(sampler(step)[0].item >= 40)] += 1
    assert abs(heard[1] / heard.sum() - 1500 / 1800) < 0.05
    with pytest.raises(InputError):
        Sampler(np.zeros(0, int), (256,), 100, 0)
    with pytest.raises(InputError, match="longer sounds"):
        Sampler(np.array([3, 9]), (256,), 100, 0)
    short = Sampler(np.array([3, 300]), (256,), 512, 0)
    assert {crop.item for step in range(20) for crop in short(step)} == {1}
    with pytest.raises(InputError, match="fewer than the 4"):
        Sampler(lengths, (256, 1024), 3072, 0, least=4)


# ---- terms of the loss


def slow_contrast(model: W2vBertObjective, context, vectors, ids, distractors):
    a, b = model.project_context(context), model.project_code(vectors)
    losses = torch.zeros(a.shape[:2])
    for row in range(a.shape[0]):
        for frame in range(a.shape[1]):
            right = torch.cosine_similarity(a[row, frame], b[row, frame], dim=0) / 0.1
            terms = [math.exp(right.item())]
            for other in distractors[row, frame].tolist():
                if ids[row, other].tolist() != ids[row, frame].tolist():
                    cosine = torch.cosine_similarity(a[row, frame], b[row, other], dim=0)
                    terms.append(math.exp(cosine.item() / 0.1))
            losses[row, frame] = -math.log(terms[0] / sum(terms))
    return losses


def test_contrastive_loss_is_that_of_a_slow_loop() -> None:
    model, generator = objective(), torch.Generator().manual_seed(1)
    context, vectors = torch.randn(2, 6, 32, generator=generator), torch.randn(2, 6, 16, generator=generator)
    ids = torch.randint(2, (2, 6, 2), generator=generator)  # few codes: some distractors equal the right one
    distractors = torch.from_numpy(np.stack([draw_distractors(6, 7, np.random.default_rng(i)) for i in range(2)]))
    loss, _ = model._contrast(context, vectors, ids, distractors)
    assert torch.allclose(loss, slow_contrast(model, context, vectors, ids, distractors), atol=1e-4)


def test_contrastive_loss_of_equal_scores() -> None:
    model = objective(distractors=100)
    same, ids = torch.ones(1, 150, 32), torch.arange(150)[None, :, None].expand(1, 150, 2)
    distractors = torch.from_numpy(draw_distractors(150, 100, np.random.default_rng(0)))[None]
    loss, _ = model._contrast(same, torch.ones(1, 150, 16), ids, distractors)
    assert torch.allclose(loss, torch.full_like(loss, math.log(101)), atol=1e-4)
    loss, _ = model._contrast(same, torch.ones(1, 150, 16), torch.zeros_like(ids), distractors)
    assert torch.allclose(loss, torch.zeros_like(loss), atol=1e-5)  # all distractors are the right answer
    half = (torch.arange(150) < 75).long()[None, :, None].expand(1, 150, 2)
    valid = (half[0, distractors[0], 0] != half[0, :, :1]).sum(-1)
    loss, _ = model._contrast(same, torch.ones(1, 150, 16), half, distractors)
    assert torch.allclose(loss[0], torch.log1p(valid.float()), atol=1e-4)


def test_diversity_of_uniform_and_collapsed_codes() -> None:
    model, hidden = objective(), torch.ones(2, 5, dtype=torch.bool)
    uniform = torch.full((2, 5, 2, 16), 1 / 16)
    assert abs(float(model._diversity(uniform, hidden)) / 10) < 1e-6
    one = torch.zeros(2, 5, 2, 16)
    one[..., 3] = 1.0
    assert abs(float(model._diversity(one, hidden)) / 10 - (1 - 2 / 32)) < 1e-6


def test_perplexity() -> None:
    assert perplexity(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).tolist() == pytest.approx([2.0, 1.0])


def test_gumbel_quantizer_returns_rows_of_its_codebooks() -> None:
    torch.manual_seed(0)
    quantizer, x = GumbelQuantizer(12, 2, 9, 8), torch.randn(50, 12)
    logits = quantizer.logits(x).unflatten(-1, (2, 9))
    vectors, ids, _ = quantizer(x, None)
    assert torch.equal(ids, logits.argmax(-1))
    noise = gumbel_noise((50, 2, 9), torch.Generator().manual_seed(0))
    for temperature in (2.0, 1e-3):
        vectors, ids, probabilities = quantizer(x, noise, temperature)
        assert torch.equal(ids, (logits + noise).argmax(-1))
        rows = torch.stack([quantizer.codebooks[g][ids[:, g]] for g in range(2)], 1).flatten(1)
        assert torch.allclose(vectors, rows, atol=1e-6)
    assert torch.allclose(probabilities, logits.softmax(-1))
    assert abs(noise.mean() - 0.5772) < 0.1  # Euler's constant


def test_random_projections_are_frozen_and_find_the_nearest_entry() -> None:
    quantizer, x = RandomProjectionQuantizer(20, 3, 11, 4, seed=2), torch.randn(30, 20)
    assert list(quantizer.parameters()) == []
    ids = quantizer(x)
    for book in range(3):
        projected = torch.nn.functional.normalize(x @ quantizer.projections[book], dim=-1)
        distance = torch.cdist(projected, quantizer.entries[book])
        assert torch.equal(ids[:, book], distance.argmin(-1))
    assert torch.equal(ids, RandomProjectionQuantizer(20, 3, 11, 4, seed=2)(x))


# ---- gradients: C6


def gradients(model: W2vBertObjective, **weights: float) -> dict[str, float]:
    """Norm of the gradient of every part for a loss with only the given terms."""
    object.__setattr__(model.config, "contrastive_weight", weights.get("contrastive", 0.0))
    object.__setattr__(model.config, "diversity_weight", weights.get("diversity", 0.0))
    object.__setattr__(model.config, "masked_weight", weights.get("masked", 1e-30))
    model.zero_grad()
    batch = model.collate(crops(), mels(), None, training=True)
    loss, _ = model(batch, model.weight_of(batch), 0.5)
    loss.backward()
    return {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()}


def test_masked_prediction_does_not_move_the_quantizer() -> None:
    norms = gradients(objective(), masked=1.0)
    assert all(norm == 0 for name, norm in norms.items() if name.startswith(("quantizer.", "project_")))
    assert norms["predict_code.weight"] > 0
    assert norms["encoder.encoder.layers.0.ffn1.output_dense.weight"] > 0


def test_the_contrastive_loss_moves_the_codebook_and_not_the_upper_blocks() -> None:
    norms = gradients(objective(), contrastive=1.0)
    assert norms["quantizer.codebooks"] > 1e-6
    assert norms["quantizer.logits.weight"] > 1e-6
    assert norms["encoder.encoder.layers.1.ffn1.output_dense.weight"] > 1e-6
    assert all(norm < 1e-20 for name, norm in norms.items() if name.startswith("encoder.encoder.layers.2."))


# ---- forms


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 1, "target_groups": 1, "mask_fill": "noise"},
        {"projection_weight": 1.0, "projection_books": 3, "projection_codes": 16},
        {"masked_weight": 0.0},
        {"sigma_reparam": True, "target_context": 1},
        {"recalibration": 2.0, "singularity_weight": 0.1, "identity_init": True},
    ],
)
def test_every_form_trains_all_of_its_parameters(changes: dict) -> None:
    model = objective(**changes)
    batch = model.collate(crops(), mels(), None, training=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # after the first step no branch is zero any more
        optimizer.zero_grad()
        loss, figures = model(batch, model.weight_of(batch), 0.1)
        loss.backward()
        optimizer.step()
    idle = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    if changes.get("masked_weight") == 0.0:
        idle = {name for name in idle if not name.startswith("encoder.encoder.layers.2.")}
    # A bias that is the same for all keys does not change a softmax.
    assert {name for name in idle if not name.endswith("linear_k.bias")} == set()
    summary = model.summary({**figures, "loss": loss.detach() * model.weight_of(batch)})
    assert all(math.isfinite(value) for value in summary.values())
    assert 1.0 <= summary["code_perplexity"] <= 16.0


def test_convolutional_sub_sampling_trains_at_25_frames() -> None:
    model = objective(
        W2vBertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            conv_depthwise_kernel_size=5, subsampling="conv", feature_projection_input_dim=19 * 4,
        ),
        contrastive_blocks=1,
    )  # fmt: skip
    batch = model.collate(crops(2), mels(), None, training=True)
    assert batch["mask"].shape == (2, 39)
    loss, _ = model(batch, model.weight_of(batch), 0.0)
    loss.backward()
    assert model.encoder.subsampling.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contrastive_blocks": 4}, "contrastive_blocks"),
        ({"target_groups": 3}, "target_groups"),
        ({"mask_fill": "zero"}, "mask_fill"),
        ({"projection_weight": 1.0}, "projection_books"),
        ({"temperature": (0.0, 1.0)}, "temperature"),
        ({"distractors": 0}, "distractors"),
        ({"target_groups": 0}, "target_groups"),
        ({"dropout": 1.5}, "dropout"),
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"contrastive_weight": 0.0, "masked_weight": 0.0}, "nothing would be learned"),
        ({"sigma_reparam": True, "identity_init": True}, "choose one"),
        ({"singularity_weight": 0.1, "mask_fill": "noise"}, "mask vector"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        objective(**changes)


def test_temperature_reaches_its_end() -> None:
    config = W2vBertObjectiveConfig(**{**SMALL, "temperature": (2.0, 0.5), "temperature_steps": 0.5})
    assert config.temperature_at(0.0) == 2.0
    assert config.temperature_at(0.25) == pytest.approx(1.0)
    assert config.temperature_at(0.5) == config.temperature_at(1.0) == pytest.approx(0.5)


def test_export_is_the_encoder_in_bfloat16_values() -> None:
    model = objective(sigma_reparam=True)
    encoder = model.export()
    model.eval()
    wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        ours, theirs = encoder.hidden_states(wave), model.encoder.hidden_states(wave)
    assert all(torch.allclose(one, two, atol=0.1) for one, two in zip(ours, theirs, strict=True))
    assert encoder.config.projected_layer == model.config.contrastive_blocks
    assert torch.equal(encoder.projection.weight, model.project_context.weight.bfloat16().float())
    assert all(torch.equal(t, t.bfloat16().float()) for t in encoder.state_dict().values())


# ---- learning: C11, C12


def fit(model: W2vBertObjective, steps: int, rate: float = 3e-3) -> dict[str, float]:
    """Train on eight items, always with the same hidden frames; figures of the codes without sampling."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    corpus, chosen = mels(8), crops(8)
    for step in range(steps):
        batch = model.collate(chosen, corpus, None, training=True)
        loss, _ = model(batch, model.weight_of(batch), step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = model.collate(chosen, corpus, None, training=False)
    with torch.no_grad():
        loss, figures = model.eval()(batch, model.weight_of(batch), 1.0)
    return model.summary({**figures, "loss": loss * model.weight_of(batch)})


HEALTHY = {"codes": 32, "temperature": (1.0, 0.1), "identity_init": True, "diversity_weight": 0.5, "target_context": 1}


def test_one_batch_can_be_learned_by_heart() -> None:
    model = objective(**HEALTHY)
    start = fit(model, 1, 0.0)
    end = fit(model.train(), 300, 6e-3)
    assert end["contrastive_accuracy"] > 0.9 > start["contrastive_accuracy"]
    assert end["masked_accuracy"] > start["masked_accuracy"] + 0.2
    assert end["code_perplexity"] > 20
    assert model.alarms(end) == []


def test_without_the_contrastive_term_the_alarm_fires() -> None:
    """Nothing teaches the quantizer then: few codes occur, and they are easy to guess, which looks like success."""
    model = objective(
        codes=128, groups=1, target_groups=1, quantizer_init=1.0, temperature=(1.0, 0.1), contrastive_weight=0.0
    )
    figures = fit(model, 300, 1e-2)
    assert figures["masked_accuracy"] > 0.6
    assert len(model.alarms(figures)) == 2
