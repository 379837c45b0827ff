"""w2v-BERT 2.0 against transformers' Wav2Vec2BertModel, with random weights."""

import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import CheckpointError, InputError
from speechtok.nn.conformer import CausalConvModule, RelativeKeyAttention

SPEECH = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "speech" / "eval" / "librispeech"
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def transformers() -> types.ModuleType:
    return pytest.importorskip("transformers")


def pair(transformers: types.ModuleType, layer: int | None = None, **settings: object):
    """Their model with random weights, and ours with the same."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(**{**SMALL, **settings})
    theirs = transformers.Wav2Vec2BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layer_norm" in name or "distance_embedding" in name:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.5)
    ours = W2vBertEncoder(W2vBertConfig.from_hf(config.to_dict()), layer).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith(ours.ignored_prefixes)}
    kept = set(ours.state_dict())
    ours.load_state_dict({k: v for k, v in state.items() if k in kept})
    return theirs, ours


def difference(theirs, ours: W2vBertEncoder, features: Tensor, lengths: Tensor) -> float:
    """Largest difference of all hidden states on valid frames."""
    valid = torch.arange(features.shape[1]) < lengths[:, None]
    with torch.inference_mode():
        reference = theirs(features, attention_mask=valid.long(), output_hidden_states=True).hidden_states
        states = ours.hidden_states_from_features(features, lengths)
    assert len(states) == ours.layer + 1
    for state in states:
        assert state[~valid].abs().sum() == 0
    return max(float((a - b)[valid].abs().max()) for a, b in zip(reference, states, strict=False))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- hidden states


@pytest.mark.parametrize("lengths", [[40, 40], [40, 23], [40, 1, 17]])
def test_hidden_states_are_those_of_transformers(transformers: types.ModuleType, lengths: list[int]) -> None:
    theirs, ours = pair(
        transformers, conv_depthwise_kernel_size=5, left_max_position_embeddings=6, right_max_position_embeddings=2
    )
    assert difference(theirs, ours, noise(len(lengths), 40, 160), torch.tensor(lengths)) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 8, 9, 65, 200, 300])
def test_both_clips_of_the_distances(transformers: types.ModuleType, frames: int) -> None:
    theirs, ours = pair(transformers)  # kernel 31, left 64, right 8; 300 frames are two blocks of queries
    assert difference(theirs, ours, noise(2, frames, 160), torch.tensor([frames, (frames + 1) // 2])) <= 1e-5


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_only_the_needed_blocks_exist(transformers: types.ModuleType, layer: int) -> None:
    theirs, ours = pair(transformers, layer)
    assert len(ours.encoder["layers"]) == layer
    assert difference(theirs, ours, noise(2, 20, 160), torch.tensor([20, 9])) <= 1e-5


def test_the_adapter_does_not_matter(transformers: types.ModuleType) -> None:
    theirs, ours = pair(transformers, add_adapter=True, use_intermediate_ffn_before_adapter=True)
    features, lengths = noise(2, 20, 160), torch.tensor([20, 9])
    with torch.inference_mode():
        reference = theirs.encoder(
            theirs.feature_projection(features)[0], attention_mask=(torch.arange(20) < lengths[:, None]).long()
        ).last_hidden_state
        state = ours.hidden_states_from_features(features, lengths)[-1]
    assert (reference[0] - state[0]).abs().max() <= 1e-5
    assert (reference[1, :9] - state[1, :9]).abs().max() <= 1e-5


def test_from_wave_to_hidden_states(transformers: types.ModuleType) -> None:
    theirs, ours = pair(transformers)
    waves = [0.1 * noise(16160, seed=1).numpy(), 0.1 * noise(9000, seed=2).numpy()]
    extractor = transformers.SeamlessM4TFeatureExtractor()
    inputs = extractor(waves, sampling_rate=16000, return_tensors="pt")
    batch = torch.zeros(2, 16160)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    lengths = torch.tensor([16160, 9000])
    with torch.inference_mode():
        reference = theirs(**inputs).last_hidden_state
        out = ours(batch, lengths)
        states = ours.hidden_states(batch, lengths)
    assert out.lengths.tolist() == inputs.attention_mask.sum(1).tolist() == [49, 27]
    for row, count in enumerate(out.lengths.tolist()):
        # 1e-5 of the network and the difference of the features, see test_features.py
        assert (out.features[row, :count] - reference[row, :count]).abs().max() <= 1e-4
    assert torch.equal(states[-1], out.features)


# ---- keys and shapes


def test_full_size_keys_and_shapes(transformers: types.ModuleType) -> None:
    with torch.device("meta"):
        theirs = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig()).state_dict()
        ours = W2vBertEncoder(W2vBertConfig()).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(shapes) == 773
    assert sum(tensor.numel() for tensor in theirs.values()) == 580_493_120
    assert shapes.pop("masked_spec_embed") == (1024,)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes


def test_configuration_is_read(transformers: types.ModuleType) -> None:
    config = W2vBertConfig.from_hf(
        transformers.Wav2Vec2BertConfig(num_hidden_layers=5).to_dict(),
        transformers.SeamlessM4TFeatureExtractor().to_dict(),
    )
    assert config == W2vBertConfig(num_hidden_layers=5)
    assert W2vBertConfig.from_hf({}) == W2vBertConfig()


@pytest.mark.parametrize(
    ("config", "preprocessor", "name"),
    [
        ({"position_embeddings_type": "rotary"}, None, "position_embeddings_type"),
        ({"position_embeddings_type": None}, None, "position_embeddings_type"),
        ({"hidden_act": "gelu"}, None, "hidden_act"),
        ({"model_type": "hubert"}, None, "model_type"),
        ({"conv_depthwise_kernel_size": 30}, None, "conv_depthwise_kernel_size"),
        ({"num_attention_heads": 7}, None, "num_attention_heads"),
        ({"feature_projection_input_dim": 80}, None, "feature_projection_input_dim"),
        ({"num_hidden_layers": "24"}, None, "num_hidden_layers"),
        ({"intermediate_size": 0}, None, "intermediate_size"),
        ({}, {"stride": 1}, "stride"),
        ({}, {"sampling_rate": 8000}, "sampling_rate"),
        ({}, {"num_mel_bins": 128}, "num_mel_bins"),
        ({}, {"feature_extractor_type": "WhisperFeatureExtractor"}, "feature_extractor_type"),
    ],
)
def test_unsupported_settings_are_named(config: dict, preprocessor: dict | None, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        W2vBertConfig.from_hf(config, preprocessor)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_named(layer: int) -> None:
    with pytest.raises(InputError, match=f"layer {layer}"):
        W2vBertEncoder(W2vBertConfig(**SMALL), layer)


# ---- batches, ends, blocks


@pytest.fixture(scope="module")
def encoder() -> W2vBertEncoder:
    torch.manual_seed(1)
    return W2vBertEncoder(W2vBertConfig(**SMALL)).eval()


def test_facts(encoder: W2vBertEncoder) -> None:
    assert (encoder.type, encoder.dim, encoder.layer, encoder.context, encoder.look_ahead) == (
        "w2v_bert",
        64,
        3,
        None,
        None,
    )
    assert (encoder.sample_rate, encoder.hop, encoder.receptive_field) == (16000, 320, 560)
    assert W2vBertConfig(**encoder.config_dict()) == encoder.config


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (399, 0), (400, 0), (559, 0), (560, 1), (879, 1), (880, 2), (16000, 49), (32000, 99)],
)
def test_frame_counts(encoder: W2vBertEncoder, samples: int, frames: int) -> None:
    wave = 0.1 * noise(1, samples)
    with torch.inference_mode():
        out = encoder(wave)
        states = encoder.hidden_states(wave)
    assert out.features.shape == (1, frames, 64)
    assert out.lengths.tolist() == [frames]
    assert out.features.isfinite().all()
    assert [tuple(state.shape) for state in states] == [(1, frames, 64)] * 4


@pytest.mark.parametrize("source", ["noise", "speech"])
def test_a_row_is_the_same_alone_and_in_a_batch(encoder: W2vBertEncoder, source: str) -> None:
    whole = 0.1 * noise(160000)
    if source == "speech":
        soundfile = pytest.importorskip("soundfile")
        path = next((p for p in sorted(SPEECH.glob("*/*.flac")) if soundfile.info(p).duration > 10), None)
        if path is None:
            pytest.skip(f"no clip of 10 s under {SPEECH}")
        whole = torch.from_numpy(soundfile.read(path, dtype="float32")[0][:160000])
    lengths = torch.tensor([160000, 47777, 16160, 560, 450, 0])
    batch = torch.full((len(lengths), 160000), 9.0)
    for row, length in zip(batch, lengths.tolist(), strict=True):
        row[:length] = whole[:length]
    with torch.inference_mode():
        out = encoder(batch, lengths)
        assert out.features.isfinite().all()
        for row, length in enumerate(lengths.tolist()):
            alone = encoder(whole[None, :length])
            count = int(alone.lengths)
            assert out.lengths[row] == count
            assert out.features[row, count:].abs().sum() == 0
            if count:
                error = out.features[row, :count] - alone.features[0]
                assert error.abs().max() <= 1e-5
                assert (error.norm(dim=-1) / alone.features[0].norm(dim=-1)).max() <= encoder.rounding


def test_attention_without_any_valid_key_is_finite() -> None:
    torch.manual_seed(0)
    attention = RelativeKeyAttention(16, 2, 4, 2)
    x, valid = noise(2, 7, 16), torch.tensor([[True] * 7, [False] * 7])
    with torch.inference_mode():
        assert attention(x, valid).isfinite().all()
        assert attention.half()(x.half(), valid).isfinite().all()


def test_gradients_reach_the_distances(encoder: W2vBertEncoder) -> None:
    attention = RelativeKeyAttention(16, 2, 4, 2)
    attention(noise(2, 7, 16), torch.arange(7) < torch.tensor([[7], [3]])).square().sum().backward()
    grad = attention.distance_embedding.weight.grad
    assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("chunk", [1, 7, 30, 64])
def test_causal_convolution_with_a_cache_is_the_full_pass(chunk: int) -> None:
    torch.manual_seed(0)
    module, x, past, pieces = CausalConvModule(32, 31).eval(), noise(2, 100, 32), None, []
    with torch.inference_mode():
        for piece in x.split(chunk, dim=1):
            y, past = module.step(piece, past)
            assert past.shape == (2, 32, 30)
            pieces.append(y)
        # Other shapes may sum in another order: bit for bit the same in most cases, never further than this.
        assert (torch.cat(pieces, dim=1) - module(x)).abs().max() <= 1e-6
