"""WavLM against transformers: hidden states, padding, buckets."""

import pytest
import torch

from speechtok.encoders.pretrained import build, load_checkpoint
from speechtok.encoders.wavlm import WavLMConfig, WavLMEncoder, relative_buckets
from speechtok.errors import CheckpointError
from tests.parity.test_hubert import SMALL, TOLERANCE, difference, padded, randomize, reference, transformers, waves

# Few buckets, so that short tests reach the logarithmic ones and the last.
VARIANTS = {
    "post_ln": {"num_buckets": 16, "max_bucket_distance": 20},
    "post_ln_published_buckets": {},
    "pre_ln": {
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "num_buckets": 32,
        "max_bucket_distance": 30,
    },
}


def pair(variant, layer=None):
    config = transformers.WavLMConfig(**(SMALL | VARIANTS[variant]))
    model = randomize(transformers.WavLMModel(config))
    ours = load_checkpoint(WavLMEncoder, WavLMConfig.from_hf(config.to_dict(), None), layer, model.state_dict())
    return model, ours


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hidden_state_is_that_of_transformers(variant):
    model, ours = pair(variant)
    for length in (400, 401, 719, 720, 4711, 16001):
        wave = waves(length)[0][None]
        with torch.inference_mode():
            assert difference(ours.hidden_states(wave), reference(model, wave)) <= TOLERANCE, length


def test_padded_batch_with_attention_mask_is_that_of_transformers():
    model, ours = pair("pre_ln")
    batch, lengths = padded(waves(16000, 5003, 401))
    mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        states = ours.hidden_states(batch, lengths)
    theirs = reference(model, batch * mask, mask)
    for row, count in enumerate(ours.frame_lengths(lengths).tolist()):
        assert difference([x[row, :count] for x in states], [x[row, :count] for x in theirs]) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_a_padded_batch_is_the_single_file(variant):
    model, ours = pair(variant)
    rows = waves(16000, 9999, 1041, 400, 399, 0)
    batch, lengths = padded(rows, extra=555)
    with torch.inference_mode():
        states = ours.hidden_states(batch, lengths)
        assert all(bool(x.isfinite().all()) for x in states)
        for row, wave in enumerate(rows):
            count = ours.grid.num_frames(len(wave))
            assert all(not x[row, count:].any() for x in states)
            if count:
                mine = [x[row, :count] for x in states]
                assert difference(mine, [x[0] for x in ours.hidden_states(wave[None])]) <= TOLERANCE
                assert difference(mine, [x[0] for x in reference(model, wave[None])]) <= TOLERANCE


@pytest.mark.parametrize("variant", ["post_ln", "pre_ln"])
def test_a_shortened_encoder_gives_the_same_hidden_states(variant):
    _, full = pair(variant)
    wave = waves(4711)[0][None]
    with torch.inference_mode():
        states = full.hidden_states(wave)
        for layer in range(4):
            ours = pair(variant, layer)[1]
            assert torch.equal(ours(wave).features, states[layer])
            twin = build("wavlm", ours.config_dict(), layer)
            twin.load_state_dict(ours.state_dict(), strict=True)
            assert torch.equal(twin(wave).features, states[layer])


def test_gradients_reach_all_weights_beside_an_empty_row():
    _, ours = pair("post_ln")
    batch, lengths = padded(waves(4000, 2000, 0))
    ours(batch, lengths).features.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.parameters())


@pytest.mark.parametrize(("buckets", "distance"), [(320, 800), (16, 20), (32, 128)])
def test_buckets_are_those_of_transformers(buckets, distance):
    settings = SMALL | {"num_buckets": buckets, "max_bucket_distance": distance}
    model = transformers.WavLMModel(transformers.WavLMConfig(**settings))
    positions = torch.arange(-3000, 3001)
    theirs = model.encoder.layers[0].attention._relative_positions_bucket(positions)
    assert torch.equal(relative_buckets(positions, buckets, distance), theirs)


def test_unsupported_buckets_are_refused():
    with pytest.raises(CheckpointError, match="num_buckets"):
        WavLMConfig(num_buckets=30)
    with pytest.raises(CheckpointError, match="max_bucket_distance"):
        WavLMConfig(max_bucket_distance=80)
