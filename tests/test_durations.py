"""Durations of deduplicated units."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from speechtok.errors import CheckpointError, InputError
from speechtok.vocoders.durations import (
    DurationConfig,
    DurationPredictor,
    duration_loss,
    frames_of,
    interior_runs,
)


def predictor(seed: int = 0, **fields) -> DurationPredictor:
    torch.manual_seed(seed)
    return DurationPredictor(DurationConfig(**{"vocab_size": 12, "dim": 16} | fields)).eval()


@pytest.mark.parametrize(
    ("ids", "units", "durations"),
    [
        ([5, 5, 7, 7, 7, 2, 9], [7, 2], [3, 1]),
        ([5, 5, 7], [5, 7], [2, 1]),
        ([5, 5], [5], [2]),
        ([1, 2, 1], [2], [1]),
        ([], [], []),
    ],
)
def test_interior_runs(ids: list[int], units: list[int], durations: list[int]) -> None:
    got = interior_runs(np.array(ids, np.int32))
    assert [part.tolist() for part in got] == [units, durations]


@torch.inference_mode()
def test_a_reference_in_plain_torch() -> None:
    model = predictor(speaker_dim=3)
    w, units, speaker = model.state_dict(), torch.randint(12, (2, 9)), torch.randn(2, 3)
    x = w["embedding.weight"][units] + (speaker @ w["speaker.weight"].T)[:, None]
    for index in ("1", "2"):
        x = F.conv1d(x.mT, w[f"network.conv{index}.0.weight"], w[f"network.conv{index}.0.bias"], padding=1).mT
        x = F.layer_norm(x.relu(), (16,), w[f"network.ln{index}.weight"], w[f"network.ln{index}.bias"])
    wanted = (x @ w["network.proj.weight"].T + w["network.proj.bias"])[..., 0]
    torch.testing.assert_close(model(units, speaker=speaker), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 32])
@torch.inference_mode()
def test_rows_are_what_they_are_alone(classes: int) -> None:
    model, lengths = predictor(classes=classes), torch.tensor([1, 2, 7, 10])
    units, durations = torch.randint(12, (4, 10)), torch.randint(1, 40, (4, 10))
    together = model(units, lengths)
    losses = duration_loss(together, durations, lengths)
    for row, length in enumerate(lengths.tolist()):
        here = slice(row, row + 1)
        alone = model(units[here, :length])
        torch.testing.assert_close(together[here, :length], alone, rtol=0, atol=1e-6)
        loss = duration_loss(alone, durations[here, :length], lengths[here])
        torch.testing.assert_close(losses[here], loss, rtol=1e-5, atol=1e-6)


def test_losses_by_hand() -> None:
    predicted, durations = torch.tensor([[0.5, 2.0, 9.0]]), torch.tensor([[1, 3, 8]])
    wanted = (0.5 - math.log(2)) ** 2 + (2.0 - math.log(4)) ** 2
    assert float(duration_loss(predicted, durations, torch.tensor([2]))) == pytest.approx(wanted, rel=1e-6)
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]])
    total = math.log(1 + math.e + math.e**2)
    wanted = (total - 2.0) + (math.log(math.e**3 + math.e + 1) - 3.0)
    # Three frames, and the first class; 77 frames are of the last class as well.
    for long in (3, 77):
        got = float(duration_loss(logits, torch.tensor([[long, 1]]), torch.tensor([2])))
        assert got == pytest.approx(wanted, rel=1e-6)


def test_frames() -> None:
    logs = torch.tensor([[-3.0, 0.0, 0.5, math.log(3.4), math.log(3.6), math.log(41)]])
    assert frames_of(logs).tolist() == [[1, 1, 1, 2, 3, 40]]
    assert frames_of((torch.arange(1, 60) + 1).float().log()[None]).tolist() == [list(range(1, 60))]
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    logits = probabilities.log().expand(1, 20_000, 3)
    assert frames_of(logits).unique().tolist() == [2]
    drawn = frames_of(logits, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, frames_of(logits, generator=torch.Generator().manual_seed(3)))
    shares = torch.bincount(drawn[0], minlength=4)[1:] / 20_000
    assert (shares - probabilities).abs().max() < 0.015
    with pytest.raises(InputError, match="classes"):
        frames_of(logs, generator=torch.Generator())


@pytest.mark.parametrize("classes", [0, 32])
def test_durations_are_learned_from_whole_sequences(classes: int) -> None:
    """Every unit has a duration of its own, which the next unit doubles if it is even."""
    rng = np.random.default_rng(0)
    units = torch.from_numpy(rng.integers(0, 12, (32, 12)))
    following = torch.cat([units[:, 1:], torch.ones(32, 1, dtype=torch.int64)], 1)
    durations = (units % 5 + 1) * (2 - following % 2)
    model = predictor(classes=classes, dropout=0.0, dim=32).train()
    optimizer, lengths = torch.optim.AdamW(model.parameters(), 1e-2), torch.full((32,), 12)
    for _ in range(50):
        optimizer.zero_grad()
        (duration_loss(model(units, lengths), durations, lengths).sum() / lengths.sum()).backward()
        optimizer.step()
    got = frames_of(model.eval()(units))
    assert 0.95 < float(got.sum() / durations.sum()) < 1.05
    assert float((got == durations).float().mean()) > 0.85


def test_what_does_not_fit() -> None:
    for fields in ({"vocab_size": 0}, {"kernel": 2}, {"classes": -1}, {"dropout": 1.0}, {"dim": 1.5}):
        with pytest.raises(InputError, match=next(iter(fields))):
            predictor(**fields)
    model = predictor()
    with pytest.raises(InputError, match="below 12"):
        model(torch.tensor([[12]]))
    with pytest.raises(InputError, match="one voice"):
        model(torch.tensor([[1]]), speaker=torch.zeros(1, 3))
    weights = model.state_dict() | {"network.proj.bias": torch.zeros(32)}
    with pytest.raises(CheckpointError, match=r"network.proj.bias \(32,\) instead of \(1,\)"):
        DurationPredictor(model.config, weights=weights)
    again = DurationPredictor(DurationConfig(**model.config_dict()), weights=model.state_dict()).eval()
    assert torch.equal(again(torch.tensor([[3, 4]])), model(torch.tensor([[3, 4]])))
