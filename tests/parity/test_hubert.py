"""HuBERT family against transformers: hidden states, padding, position convolution, frame grid."""

import pytest
import torch
import transformers
from transformers import HubertModel, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.encoders.pretrained import load_checkpoint
from speechtok.errors import AudioError, CheckpointError, InputError
from speechtok.nn.stem import ACTIVATIONS, conv_grid

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_dim": [32, 24, 32, 24, 32, 24, 40],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "attn_implementation": "eager",
}
VARIANTS = {
    "base": {},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "mert_330m": {"do_stable_layer_norm": True},
    "mhubert_25hz": {
        "conv_pos_batch_norm": True,
        "conv_dim": [32, 24, 32, 24, 32, 24, 40, 24],
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2, 2],
    },
    "no_projection_norm": {"feat_proj_layer_norm": False, "layer_norm_eps": 1e-3},
    "other_activations": {"hidden_act": "relu", "feat_extract_activation": "swish", "num_conv_pos_embeddings": 9},
    "layer_norm_post_ln": {"feat_extract_norm": "layer", "conv_bias": True},
}
LENGTHS = (720, 721, 1039, 1040, 1041, 4711, 16000)
TOLERANCE = 1e-5


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere, so that no norm is hidden behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if not tensor.is_floating_point():
                continue
            if "running_var" in name or name.endswith(("original0", "weight_g")):
                tensor.copy_(0.5 + noise.abs())
            elif "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.ndim <= 1 or "running_mean" in name:
                tensor.copy_(0.3 * noise)
            elif "gru_rel_pos_const" in name or "rel_attn_embed" in name:
                tensor.copy_(1 + noise)
            else:
                # The stem gets more: where it gives small values, the norm behind it magnifies their rounding errors.
                tensor.copy_(noise * (2.5 if "conv_layers" in name else 1.0) / tensor[0].numel() ** 0.5)
    return model.eval()


def reference(model: torch.nn.Module, wave: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Hidden states of transformers; the last one after the final layer norm, in all versions of it."""
    with torch.inference_mode():
        out = model(wave, attention_mask=mask, output_hidden_states=True)
    return [*out.hidden_states[:-1], out.last_hidden_state]


def pair(variant: str, layer: int | None = None, preprocessor: dict | None = None):
    config = transformers.HubertConfig(**(SMALL | VARIANTS[variant]))
    model = randomize(HubertModel(config))
    ours = HubertConfig.from_hf(config.to_dict(), preprocessor)
    return model, load_checkpoint(HubertEncoder, ours, layer, model.state_dict())


def waves(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(n, generator=generator) + 0.02 for n in lengths]


def padded(rows: list[torch.Tensor], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch with rubbish behind the end of each row."""
    lengths = torch.tensor([len(row) for row in rows])
    batch = torch.full((len(rows), int(lengths.max()) + extra), 7.0)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return batch, lengths


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert len(a) == len(b)
    assert [x.shape for x in a] == [x.shape for x in b]
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hidden_state_is_that_of_transformers(variant):
    model, ours = pair(variant)
    for length in LENGTHS if variant == "mhubert_25hz" else (400, 401, 719, *LENGTHS):
        wave = waves(length)[0][None]
        with torch.inference_mode():
            states, frames = ours.hidden_states(wave), ours(wave)
        assert difference(states, reference(model, wave)) <= TOLERANCE, length
        assert torch.equal(frames.features, states[-1])
        assert frames.lengths.tolist() == [states[-1].shape[1]] == [ours.grid.num_frames(length)]


@pytest.mark.parametrize("variant", ["large", "layer_norm_post_ln"])
def test_padded_batch_with_attention_mask_is_that_of_transformers(variant):
    model, ours = pair(variant)
    batch, lengths = padded(waves(16000, 5003, 401))
    mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        states = ours.hidden_states(batch, lengths)
    theirs = reference(model, batch * mask, mask)
    for row, count in enumerate(ours.frame_lengths(lengths).tolist()):
        assert difference([x[row, :count] for x in states], [x[row, :count] for x in theirs]) <= TOLERANCE
        assert all(not x[row, count:].any() for x in states)


@pytest.mark.parametrize("do_normalize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_a_padded_batch_is_the_single_file(variant, do_normalize):
    model, ours = pair(variant, preprocessor={"do_normalize": do_normalize})
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    rows = waves(16000, 9999, 1041, 720, 399, 0, 1)
    batch, lengths = padded(rows, extra=777)
    with torch.inference_mode():
        states, frames = ours.hidden_states(batch, lengths), ours(batch, lengths)
        assert torch.equal(frames.features, states[-1])
        assert all(bool(x.isfinite().all()) for x in states)
        for row, wave in enumerate(rows):
            count = int(frames.lengths[row])
            assert count == ours.grid.num_frames(len(wave))
            assert all(not x[row, count:].any() for x in states)
            if count == 0:
                continue
            mine = [x[row, :count] for x in states]
            single = [x[0] for x in ours.hidden_states(wave[None])]
            values = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values
            assert difference(mine, single) <= TOLERANCE
            assert difference(mine, [x[0] for x in reference(model, values)]) <= TOLERANCE


def test_rows_too_short_for_a_frame():
    _, ours = pair("base")
    for length in (0, 1, 9, 10, 399):
        out = ours(torch.ones(2, length))
        assert out.features.shape == (2, 0, 48)
        assert out.lengths.tolist() == [0, 0]
        assert [x.shape for x in ours.hidden_states(torch.ones(2, length))] == [(2, 0, 48)] * 4
    out = ours(torch.ones(2, 400), torch.tensor([0, 399]))
    assert out.lengths.tolist() == [0, 0]
    assert not out.features.any()
    with pytest.raises(AudioError):
        ours.hidden_states(torch.ones(400))


@pytest.mark.parametrize("variant", ["base", "large", "mhubert_25hz"])
def test_a_shortened_encoder_gives_the_same_hidden_states(variant):
    _, full = pair(variant)
    wave = waves(4711)[0][None]
    with torch.inference_mode():
        states = full.hidden_states(wave)
        for layer in range(4):
            ours = pair(variant, layer)[1]
            assert len(ours.encoder.layers) == layer
            assert set(ours.state_dict()) <= set(full.state_dict())
            assert torch.equal(ours(wave).features, states[layer])
            assert difference(ours.hidden_states(wave), states[: layer + 1]) == 0
    with pytest.raises(InputError, match=r"0 \.\.\. 3"):
        pair(variant, 4)


def test_wav2vec2_with_adapter_and_masked_weights():
    changes = {"do_stable_layer_norm": True, "add_adapter": True, "feat_extract_norm": "layer"}
    config = transformers.Wav2Vec2Config(**(SMALL | changes))
    model = randomize(Wav2Vec2Model(config))
    ours = load_checkpoint(HubertEncoder, HubertConfig.from_hf(config.to_dict(), None), None, model.state_dict())
    wave = waves(4711)[0][None]
    captured = []
    model.encoder.register_forward_hook(lambda module, inputs, output: captured.append(output.last_hidden_state))
    states = reference(model, wave)[:-1]
    with torch.inference_mode():
        assert difference(ours.hidden_states(wave), [*states, captured[0]]) <= TOLERANCE


def test_training_mode_changes_nothing():
    _, ours = pair("mhubert_25hz")
    wave = waves(4711)[0][None]
    with torch.inference_mode():
        before = ours(wave).features
        assert torch.equal(ours.train()(wave).features, before)


def test_gradients_reach_all_weights():
    _, ours = pair("base")
    batch, lengths = padded(waves(4000, 2000, 0))
    ours(batch, lengths).features.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.parameters())


def test_frame_grid():
    config = HubertConfig()
    grid = conv_grid(24000, config.conv_kernel, config.conv_stride)
    assert (grid.hop, grid.receptive_field) == (320, 400)
    expected = {0: 0, 399: 0, 400: 1, 719: 1, 720: 2, 16000: 49, 24000: 74, 80000: 249, 120000: 374, 122880: 383}
    assert {n: grid.num_frames(n) for n in expected} == expected
    _, ours = pair("mhubert_25hz")
    assert (ours.grid.hop, ours.grid.receptive_field, ours.grid.rate) == (640, 720, 25.0)
    assert ours.context is None
    assert ours.look_ahead is None
    assert not ours.exact_stream


def test_activations_are_those_of_transformers():
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 1001)
    for name, function in ACTIVATIONS.items():
        assert torch.allclose(function(x), ACT2FN[name](x), atol=1e-6), name


def test_configuration_of_published_files():
    mert = {"model_type": "mert_model", "sample_rate": 24000, "attention_relax": 32.0, "deepnorm": False}
    assert HubertConfig.from_hf(mert, None) == HubertConfig(sample_rate=24000)
    assert HubertConfig.from_hf(mert | {"sample_rate": 16000}, {"do_normalize": False}).sample_rate == 16000
    assert HubertConfig.from_hf(mert, {"sampling_rate": 22050}) == HubertConfig(sample_rate=22050, do_normalize=True)
    assert HubertConfig.from_hf({"model_type": "hubert", "sample_rate": 8000}, None) == HubertConfig()
    switched = {"feat_proj_layer_norm": False, "conv_pos_batch_norm": True}
    assert HubertConfig.from_hf(switched | {"model_type": "wav2vec2"}, None) == HubertConfig()
    assert not HubertConfig.from_hf(switched | {"model_type": "hubert"}, None).feat_proj_layer_norm


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepnorm", True),
        ("feature_extractor_cqt", True),
        ("adapter_attn_dim", 16),
        ("hidden_act", "xielu"),
        ("feat_extract_activation", "nothing"),
        ("feat_extract_norm", "batch"),
        ("conv_dim", [512, 512]),
        ("conv_stride", 5),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, -2]),
        ("num_attention_heads", 7),
        ("num_conv_pos_embedding_groups", 7),
        ("hidden_size", "768"),
        ("layer_norm_eps", 0),
        ("conv_bias", 1),
    ],
)
def test_unsupported_settings_are_refused_by_name(name, value):
    with pytest.raises(CheckpointError, match=name if name not in ("conv_dim",) else "conv_kernel"):
        HubertConfig.from_hf({"model_type": "hubert", name: value}, None)
