"""Flow matching: paths, the loss, sampling with guidance, and what has a say in a sample."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from speechtok.errors import CheckpointError, InputError
from speechtok.vocoders.condition import GAP, Condition, lay_out
from speechtok.vocoders.flow import FlowConfig, UnitFlow
from speechtok.vocoders.paths import integrate, point, velocity

TINY = {"vocab_size": 9, "bins": 5, "dim": 32, "heads": 2, "blocks": 2, "inner": 48, "positions": 8, "embedding": 8}


def decoder(**fields) -> UnitFlow:
    """With weights of a size at which everything has a say."""
    torch.manual_seed(0)
    model = UnitFlow(FlowConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("out.") or "no_condition" in name or "null" in name:
                parameter.normal_(0, 0.3)
    model.set_statistics(torch.linspace(-5, -3, 5), torch.linspace(1, 2, 5))
    return model


def condition(*lengths: int, speaker_dim: int = 0) -> Condition:
    """Segments of two frames, every third one a gap."""
    frames = max(lengths)
    units = torch.randint(9, (len(lengths), frames), generator=torch.Generator().manual_seed(1))
    units[:, 4::6] = units[:, 5::6] = GAP
    places = torch.rand(len(lengths), frames, 2, generator=torch.Generator().manual_seed(2))
    speaker = torch.randn(len(lengths), speaker_dim, generator=torch.Generator().manual_seed(3))
    return Condition(units, places, torch.tensor(lengths), speaker if speaker_dim else None)


def row_of(whole: Condition, row: int) -> Condition:
    """A row as if it were alone."""
    length = int(whole.lengths[row])
    speaker = None if whole.speaker is None else whole.speaker[row : row + 1]
    here = slice(row, row + 1)
    return Condition(whole.units[here, :length], whole.places[here, :length], whole.lengths[here], speaker)


# ---- paths


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 64])
@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.2])
def test_one_sample_is_reached_exactly(method: str, steps: int, sigma: float) -> None:
    """With one sample all paths end at it, and the mean velocity at a point is that of the path through it."""
    torch.manual_seed(0)
    target, noise = torch.randn(3, 7, 5, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)

    def field(x: Tensor, time: Tensor) -> Tensor:
        time = time.double()
        return (target - (1 - sigma) * x) / (1 - (1 - sigma) * time)

    end = integrate(field, noise, steps, method)
    assert (end - (target + sigma * noise)).abs().max() <= 1e-6


def test_paths() -> None:
    target, noise = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    time = torch.tensor([0.0, 0.3, 0.7, 1.0])
    at = point(target, noise, time, 0.1)
    torch.testing.assert_close(at[0], noise[0])
    torch.testing.assert_close(at[3], target[3] + 0.1 * noise[3])
    torch.testing.assert_close(at[1], (1 - 0.9 * 0.3) * noise[1] + 0.3 * target[1])
    later = point(target, noise, time + 0.01, 0.1)
    torch.testing.assert_close((later - at) / 0.01, velocity(target, noise, 0.1), rtol=0, atol=1e-3)


def test_errors_of_both_methods() -> None:
    """On ``x' = x`` Euler's error falls with the steps, that of midpoints with their square."""

    def error(steps: int, method: str) -> float:
        return abs(float(integrate(lambda x, _: x, torch.ones(1, dtype=torch.float64), steps, method)) - math.e)

    assert error(10, "euler") / error(20, "euler") == pytest.approx(2, abs=0.2)
    assert error(10, "midpoint") / error(20, "midpoint") == pytest.approx(4, abs=0.4)
    for steps, method in ((0, "euler"), (3, "heun")):
        with pytest.raises(InputError, match="step"):
            integrate(lambda x, _: x, torch.ones(1), steps, method)


# ---- loss


def test_the_loss_is_the_published_one() -> None:
    model, given = decoder(sigma=0.05, speaker_dim=3), condition(6, 9, speaker_dim=3)
    mel, noise, time = torch.randn(2, 9, 5) - 4, torch.randn(2, 9, 5), torch.tensor([0.2, 0.9])
    dropped = torch.tensor([False, True])
    x = (mel - model.mean) / model.scale
    moved = (1 - 0.95 * time[:, None, None]) * noise + time[:, None, None] * x
    with torch.no_grad():
        guess = model(moved, time, given, dropped)
        errors = (guess - (x - 0.95 * noise)).square()
        wanted = (errors[0, :6].sum() + errors[1].sum()) / (15 * 5)
        got = model.loss(mel, given, noise, time, dropped).sum() / 15
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)


def test_what_is_not_heard_has_no_say() -> None:
    model, given = decoder(speaker_dim=3), condition(9, 9, speaker_dim=3)
    x, time = torch.randn(2, 9, 5), torch.tensor(0.4)
    other = replace(given, units=given.units.flip(1), places=given.places.flip(1), speaker=-given.speaker)
    with torch.no_grad():
        one, two = (model(x, time, each, torch.tensor([True, False])) for each in (given, other))
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)
    with torch.no_grad():
        moments = [model(x, torch.tensor(moment), given) for moment in (0.0, 0.05, 0.5, 1.0)]
    assert all((moments[i] - moments[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    for changed in ("units", "places", "speaker"):
        with torch.no_grad():
            part = model(x, time, replace(given, **{changed: getattr(other, changed)}))
            assert (part - model(x, time, given)).abs().max() > 1e-3


# ---- samples


def exact(model: UnitFlow, mel: Tensor) -> UnitFlow:
    """A model whose field is that of one sample."""
    target, sigma = (mel - model.mean) / model.scale, model.config.sigma
    model.forward = lambda x, time, *_: (  # type: ignore[method-assign]
        (target - (1 - sigma) * x) / (1 - (1 - sigma) * time.expand(len(x))[:, None, None])
    )
    return model


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_model_that_knows_one_sample(method: str, steps: int) -> None:
    mel, given = torch.randn(2, 9, 5) - 4, condition(9, 9)
    model = exact(decoder(sigma=0.0), mel)
    for guidance in (0.0, 0.7):
        got = model.sample(given, seed=5, steps=steps, method=method, guidance=guidance)
        assert (got - mel).abs().max() <= 1e-4
    loss = model.loss(mel, given, torch.randn(2, 9, 5), torch.tensor([0.1, 0.6]))
    assert loss.max() <= 1e-6


def test_guidance() -> None:
    model, given = decoder(), condition(8, 8)
    noise = torch.randn(8, 5, generator=torch.Generator().manual_seed(4)).expand(2, -1, -1)
    everything = torch.tensor([True, True])

    def by_hand(guidance: float) -> Tensor:
        x = noise
        with torch.no_grad():
            for step in range(3):
                time = torch.tensor(step / 3)
                told, untold = model(x, time, given), model(x, time, given, everything)
                x = x + (told + guidance * (told - untold)) / 3
        return x * model.scale + model.mean

    for guidance in (0.0, 0.7, 2.0):
        got = model.sample(given, seed=4, steps=3, method="euler", guidance=guidance)
        assert (got - by_hand(guidance)).abs().max() <= 1e-5
    assert (by_hand(0.7) - by_hand(0.0)).abs().max() > 1e-2
    calls: list[Tensor | None] = []
    forward = model.forward
    model.forward = lambda *given: (calls.append(given[3] if len(given) > 3 else None), forward(*given))[1]
    model.sample(given, seed=4, steps=3, method="euler", guidance=0.0)
    assert calls == [None] * 3


def test_samples_depend_on_the_seed_alone() -> None:
    model, given = decoder(), condition(8, 5)
    one = model.sample(given, seed=1)
    torch.rand(7)
    assert torch.equal(one, model.sample(given, seed=1))
    assert (one - model.sample(given, seed=2)).abs().max() > 1e-2
    assert torch.equal(model.sample(given, seed=1, temperature=0.0), model.sample(given, seed=2, temperature=0.0))
    assert (model.sample(given, seed=1, temperature=0.5) - one).abs().max() > 1e-2
    for numbers in ({"guidance": -1.0}, {"temperature": -0.1}, {"steps": 0}):
        with pytest.raises(InputError):
            model.sample(given, seed=1, **numbers)


def test_padding_has_no_say() -> None:
    model, given = decoder(speaker_dim=3), condition(1, 4, 9, 16, speaker_dim=3)
    mel, noise, time = torch.randn(4, 16, 5), torch.randn(4, 16, 5), torch.rand(4)
    behind = torch.arange(16) >= given.lengths[:, None]
    mel[behind] = float("nan")
    samples = model.sample(given, seed=3)
    with torch.no_grad():
        losses = model.loss(mel, given, noise, time)
        for row, length in enumerate(given.lengths.tolist()):
            here, alone = slice(row, row + 1), row_of(given, row)
            sample = model.sample(alone, seed=3)
            torch.testing.assert_close(samples[here, :length], sample, rtol=0, atol=1e-4)
            assert not samples[row, length:].any()
            loss = model.loss(mel[here, :length], alone, noise[here, :length], time[here])
            torch.testing.assert_close(losses[here], loss, rtol=1e-4, atol=1e-5)


def test_units_are_learned() -> None:
    """Every unit has a spectrum of its own."""
    torch.manual_seed(0)
    model = UnitFlow(FlowConfig(**TINY | {"vocab_size": 2, "blocks": 1, "sigma": 0.0}))
    units = torch.tensor([[0, 0, 1, 1, 0, 1]] * 16)
    spectra = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0], [-2.0, -2.0, 2.0, 2.0, 2.0]])
    given = Condition(units, torch.zeros(16, 6, 2), torch.full((16,), 6))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        dropped = torch.rand(16) < model.config.drop
        loss = model.loss(spectra[units], given, torch.randn(16, 6, 5), torch.rand(16), dropped)
        (loss.sum() / (16 * 6)).backward()
        optimizer.step()
    got = model.eval().sample(row_of(given, 0), seed=0, guidance=0.0)[0]
    assert (got - spectra[units[0]]).abs().mean() < 0.7
    assert (got.sign() == spectra[units[0]].sign()).float().mean() > 0.9


# ---- conditions


def test_units_over_frames() -> None:
    units, places = lay_out(np.array([7, 3], np.int32), np.array([[2, 4], [4, 8]]), 10)
    assert units.tolist() == [GAP, GAP, 7, 7, 3, 3, 3, 3, GAP, GAP]
    assert places[:, 0].tolist() == pytest.approx([0.25, 0.75, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875, 0.25, 0.75])
    assert places[:, 1].tolist() == pytest.approx([math.log(2)] * 4 + [math.log(4)] * 4 + [math.log(2)] * 2)
    units, places = lay_out(np.zeros(0, np.int32), np.zeros((0, 2), np.int64), 3)
    assert units.tolist() == [GAP] * 3
    assert places[:, 1].tolist() == pytest.approx([math.log(3)] * 3)
    assert lay_out(np.array([1]), np.array([[0, 5]]), 5)[0].tolist() == [1] * 5


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([[2, 2], [3, 4]], id="empty"),
        pytest.param([[2, 4], [3, 5]], id="overlap"),
        pytest.param([[4, 6], [1, 2]], id="order"),
        pytest.param([[-1, 2], [3, 4]], id="before"),
        pytest.param([[1, 2], [3, 11]], id="behind"),
        pytest.param([[1, 2]], id="too few"),
    ],
)
def test_segments_that_do_not_fit(spans: list) -> None:
    with pytest.raises(InputError, match="segments"):
        lay_out(np.array([7, 3], np.int32), np.array(spans), 10)


def test_what_does_not_fit() -> None:
    for fields in ({"dim": 33}, {"heads": 3}, {"bins": 0}, {"drop": 1.0}, {"sigma": -0.1}, {"speaker_dim": -1}):
        with pytest.raises(InputError, match="dim" if "heads" in fields else next(iter(fields))):
            FlowConfig(**TINY | fields)
    model, given = decoder(), condition(4, 4)
    x, time = torch.zeros(2, 4, 5), torch.tensor(0.5)
    for wrong in (given.units + 9, given.units - 2):
        with pytest.raises(InputError, match="has 9"):
            model(x, time, replace(given, units=wrong))
    with pytest.raises(InputError, match="one voice"):
        model(x, time, condition(4, 4, speaker_dim=3))
    with pytest.raises(InputError, match="speakers"):
        decoder(speaker_dim=4)(x, time, condition(4, 4, speaker_dim=3))


def test_speakers() -> None:
    model, given = decoder(speaker_dim=3), condition(*[4] * 64, speaker_dim=3)
    x, time = torch.randn(64, 4, 5), torch.rand(64)
    with torch.no_grad():
        null, told = model(x, time, replace(given, speaker=None)), model(x, time, given)
        assert ((told - null).abs().amax((1, 2)) > 1e-4).all()
        model.train()
        torch.manual_seed(0)
        share = ((model(x, time, given) - null).abs().amax((1, 2)) < 1e-6).float().mean()
    assert 0.02 < share < 0.25


def test_weights_and_statistics_are_kept() -> None:
    model, given = decoder(), condition(5)
    again = UnitFlow(FlowConfig(**model.config_dict()), weights=model.state_dict()).eval()
    assert torch.equal(again.sample(given, seed=1), model.sample(given, seed=1))
    assert torch.equal(again.scale, torch.linspace(1, 2, 5))
    weights = model.state_dict()
    del weights["mean"]
    with pytest.raises(CheckpointError, match="missing: mean"):
        UnitFlow(model.config, weights=weights)
