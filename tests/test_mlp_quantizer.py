"""The pointwise network quantizer: ids, margins that hold, save and load."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import FormatError
from speechtok.quantizers.mlp import MlpQuantizer, UnitMlp
from speechtok.tokenizer import Tokenizer


def make(dim: int = 6, hidden: tuple[int, ...] = (16, 12), units: int = 9, seed: int = 0) -> MlpQuantizer:
    torch.manual_seed(seed)
    mlp = UnitMlp(dim, hidden, units)
    mlp.mean.copy_(torch.randn(dim))
    mlp.scale.copy_(torch.rand(dim) + 0.5)
    return MlpQuantizer(mlp)


def test_ids_are_the_largest_logits() -> None:
    quantizer, x = make(), 3 * torch.randn(2, 50, 6)
    y = (x - quantizer.mlp.mean) / quantizer.mlp.scale
    for index, layer in enumerate(quantizer.mlp.layers):
        y = layer(y.relu() if index else y)
    codes = quantizer(x)
    assert codes.ids.dtype == torch.int32 and codes.ids.shape == (2, 1, 50) and codes.margins.shape == (2, 50)
    assert torch.equal(codes.ids[:, 0].long(), y.argmax(-1))
    assert len(codes.ids.unique()) > 3


@given(st.integers(0, 2**31), st.sampled_from([(), (16,), (16, 12)]))
@settings(max_examples=40, deadline=None)
def test_a_smaller_change_than_the_margin_changes_no_id(seed: int, hidden: tuple[int, ...]) -> None:
    quantizer = make(hidden=hidden, seed=seed % 7)
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(1, 40, 6, generator=generator)
    codes = quantizer(x)
    assert bool((codes.margins >= 0).all()) and bool((codes.margins > 1e-6).any())
    for _ in range(5):
        move = torch.randn(x.shape, generator=generator)
        move *= 0.999 * (codes.margins * x.norm(dim=-1) / move.norm(dim=-1))[..., None]
        assert torch.equal(quantizer(x + move).ids, codes.ids)


def test_margins_of_a_single_map_are_tight() -> None:
    # Without hidden layers the frame can be moved to where two logits are equal.
    quantizer = make(hidden=())
    quantizer = MlpQuantizer(_flat(quantizer.mlp))
    x = torch.randn(1, 30, 6)
    codes, weight = quantizer(x), quantizer.mlp.layers[0].weight
    logits = quantizer.mlp(x.double())
    for frame in range(30):
        a = int(codes.ids[0, 0, frame])
        gaps = torch.stack(
            [(logits[0, frame, a] - logits[0, frame, b]) / (weight[a] - weight[b]).norm() for b in range(9) if b != a]
        )
        wanted = float((gaps.min() / x[0, frame].norm()).detach())
        assert float(codes.margins[0, frame]) == pytest.approx(wanted, rel=1e-5)


def _flat(mlp: UnitMlp) -> UnitMlp:
    mlp.mean.zero_()
    mlp.scale.fill_(1)
    return mlp


def test_a_single_unit_is_certain() -> None:
    codes = make(units=1)(torch.randn(1, 4, 6))
    assert codes.ids.tolist() == [[[0, 0, 0, 0]]] and bool(codes.margins.isinf().all())


def test_nan_frames_have_nan_margins() -> None:
    x = torch.randn(1, 3, 6)
    x[0, 1, 2] = torch.nan
    assert make()(x).margins.isnan().tolist() == [[False, True, False]]


def test_batches_do_not_matter() -> None:
    quantizer, x = make(), torch.randn(64, 7, 6)
    whole = quantizer(x)
    for row in range(0, 64, 9):
        assert torch.equal(quantizer(x[row : row + 1]).ids, whole.ids[row : row + 1])


def test_a_tokenizer_of_it_is_saved_and_loaded(tmp_path, clip) -> None:
    tokenizer = Tokenizer(MfccEncoder(), make(39, (8,), 5), name="tiny")
    units = tokenizer.encode(clip)
    loaded = Tokenizer.load(tokenizer.save(tmp_path / "tiny"))
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(clip).ids, units.ids)
    path = tmp_path / "tiny" / "tokenizer.json"
    description = json.loads(path.read_text())
    assert description["quantizer_config"] == {"units": 5, "dim": 39, "hidden": [8]}
    description["quantizer_config"]["hidden"] = [9]
    path.write_text(json.dumps(description))
    with pytest.raises(FormatError, match=r"configuration says .*hidden"):
        Tokenizer.load(tmp_path / "tiny")


def test_wrong_weights_are_refused() -> None:
    state = make().state_dict()
    with pytest.raises(FormatError, match="holds"):
        MlpQuantizer.from_tensors({"mlp.mean": state["mlp.mean"]})
    with pytest.raises(FormatError, match="do not fit"):
        MlpQuantizer.from_tensors({**state, "mlp.layers.1.bias": torch.zeros(3)})
    with pytest.raises(FormatError, match="finite"):
        MlpQuantizer.from_tensors({**state, "mlp.mean": torch.full((6,), torch.nan)})
    with pytest.raises(FormatError, match="positive"):
        MlpQuantizer.from_tensors({**state, "mlp.scale": torch.zeros(6)})
    with pytest.raises(FormatError, match="another one"):
        make()(torch.zeros(1, 2, 5))
