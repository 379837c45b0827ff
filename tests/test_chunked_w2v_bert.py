"""The exact-streaming form of w2v-BERT: its mask, its windows, its steps, against plain references."""

import pytest
import torch
from torch import Tensor

from speechtok.encoders.pretrained import from_pretrained
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import CheckpointError, InputError
from speechtok.nn.conformer import CausalConvModule, ChunkedAttention, ConformerBlock, RelativeKeyAttention
from speechtok.nn.subsampling import ConvSubsampling

SETTINGS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
            "conv_depthwise_kernel_size": 7, "normalization": "stored", "attention_chunk": 8, "attention_past": 16,
            "look_ahead": 3}  # fmt: skip
PROJECTED = {"smoothing": 3, "projected_layer": 3, "projection_size": 6}


def encoder(layer: int | None = None, **changes) -> W2vBertEncoder:
    torch.manual_seed(0)
    model = W2vBertEncoder(W2vBertConfig(**{**SETTINGS, **changes}), layer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if model.config.normalization == "stored":
            model.feature_mean += 10.0
            model.feature_scale *= 0.3
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked_attention(attention: ChunkedAttention, x: Tensor, valid: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every pair of frames by itself, from the definition of the mask."""
    frames, size = x.shape[1], x.shape[2] // attention.heads
    q, k, v = (
        f(x).unflatten(-1, (attention.heads, size))
        for f in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    out = torch.zeros_like(q)
    for row in range(x.shape[0]):
        for i in range(frames):
            begin = i // attention.chunk * attention.chunk
            seen = range(max(0, begin - attention.past), min(frames, begin + attention.chunk))
            keys = [j for j in seen if valid[row, j]]
            for head in range(attention.heads):
                scores = []
                for j in keys:
                    embedded = k[row, j, head] + attention.distance_embedding.weight[j - i + attention.left]
                    score = q[row, i, head] @ embedded / size**0.5
                    scores.append(score + (0.0 if bias is None else bias[row, j]))
                if keys:
                    weights = torch.softmax(torch.stack(scores), 0)
                    out[row, i, head] = sum(w * v[row, j, head] for w, j in zip(weights, keys, strict=True))
    return attention.linear_out(out.flatten(2))


@pytest.mark.parametrize(("chunk", "past", "frames"), [(4, 8, 21), (4, 0, 8), (8, 8, 5), (2, 6, 9)])
@torch.no_grad()
def test_attention_is_that_of_the_mask(chunk: int, past: int, frames: int) -> None:
    torch.manual_seed(1)
    attention = ChunkedAttention(16, 2, chunk, past)
    x, valid = noise(2, frames, 16) * 20, torch.arange(frames) < torch.tensor([[frames], [frames - 2]])
    bias = noise(2, frames, seed=3) * 10
    for given in (None, bias):
        ours, slow = attention(x, valid, given), masked_attention(attention, x, valid, given)
        assert (ours - slow)[valid].abs().max() < 1e-5


@torch.no_grad()
def test_one_chunk_for_all_is_full_attention() -> None:
    torch.manual_seed(1)
    chunked, full = ChunkedAttention(16, 2, 12, 0), RelativeKeyAttention(16, 2, 11, 11)
    full.load_state_dict(chunked.state_dict())
    x, bias = noise(2, 12, 16) * 20, noise(2, 12)
    assert torch.allclose(chunked(x), full(x), atol=1e-6)
    assert torch.allclose(chunked(x, None, bias), full(x, None, bias), atol=1e-6)


@torch.no_grad()
def test_observers_see_probabilities() -> None:
    for attention in (ChunkedAttention(16, 2, 4, 4), RelativeKeyAttention(16, 2, 5, 5)):
        seen: list[Tensor] = []
        attention.observer = seen.append
        attention(noise(1, 12, 16))
        assert all(torch.allclose(p.sum(-1), torch.ones(p.shape[:-1])) for p in seen)
        assert seen


@torch.no_grad()
def test_a_convolution_continues_bit_for_bit() -> None:
    module, x = CausalConvModule(8, 31), noise(2, 90, 8)
    whole, past, parts = module(x), None, []
    for piece in x.split([1, 30, 29, 2, 28], dim=1):
        y, past = module.step(piece, past)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


def advance(model: W2vBertEncoder, wave: Tensor) -> Tensor:
    """Frames of one sound, float [T, D], chunk by chunk."""
    grid, chunk, after = model.grid, model.context.chunk, model.config.answers_after
    total, state, parts = grid.num_frames(wave.shape[1]), model.stream_state(1), []
    for begin in range(0, total + after, chunk):
        samples = torch.zeros(1, grid.num_samples(chunk))
        piece = wave[:, begin * grid.hop :][:, : samples.shape[1]]
        samples[:, : piece.shape[1]] = piece
        positions = min(chunk, total + after - begin)
        frames, state = model.advance(samples, torch.tensor([piece.shape[1]]), torch.tensor([positions]), state)
        parts.append(frames[0, :positions])
    return torch.cat(parts)[after:]


@pytest.mark.parametrize(
    "changes", [{}, {"smoothing": 5}, {"look_ahead": 0}, {"look_ahead": 11, "smoothing": 3}, PROJECTED]
)
@pytest.mark.parametrize("samples", [560, 5000, 32000])
@torch.inference_mode()
def test_steps_give_the_frames_of_the_whole(changes: dict, samples: int) -> None:
    model, wave = encoder(**changes), noise(1, samples)
    assert torch.allclose(advance(model, wave), model(wave).features[0], atol=1e-5)


@torch.inference_mode()
def test_convolutional_sub_sampling_streams_too() -> None:
    model = encoder(subsampling="conv", feature_projection_input_dim=19 * 4)
    wave = noise(1, 32000)
    out = model(wave)
    assert out.features.shape == (1, 48, 32)
    assert (model.grid.hop, model.grid.rate) == (640, 25.0)
    assert torch.allclose(advance(model, wave), out.features[0], atol=1e-5)
    assert model(wave[:, : model.grid.num_samples(1)]).features.shape[1] == 1
    assert model(wave[:, : model.grid.num_samples(1) - 1]).features.shape[1] == 0


@pytest.mark.parametrize("smoothing", [1, 3])
@torch.inference_mode()
def test_a_window_of_the_stated_context_is_enough(smoothing: int) -> None:
    model, wave = encoder(smoothing=smoothing), noise(1, 64000)
    whole, grid = model(wave).features[0], model.grid
    for frame in (0, 4, 5, 60, 100, 150, 198):
        begin, end = model.context.needs(frame, frame + 1)
        piece = wave[:, begin * grid.hop : begin * grid.hop + grid.num_samples(min(end, 199) - begin)]
        assert torch.allclose(model(piece).features[0, frame - begin], whole[frame], atol=1e-5)


@torch.inference_mode()
def test_what_lies_outside_the_context_does_not_matter() -> None:
    model, wave = encoder(2), noise(1, 64000)
    whole, grid, frame = model(wave).features[0], model.grid, 120
    begin, end = model.context.needs(frame, frame + 1)
    other = noise(1, 64000, seed=5)
    first, last = begin * grid.hop, (end - 1) * grid.hop + grid.receptive_field
    other[:, first:last] = wave[:, first:last]
    assert torch.allclose(model(other).features[0, frame], whole[frame], atol=1e-5)
    other[:, last - 200 : last] = 0.0  # and what lies inside does
    assert not torch.allclose(model(other).features[0, frame], whole[frame], atol=1e-3)


@torch.inference_mode()
def test_smoothing_is_a_mean_of_neighbours() -> None:
    plain, smooth, wave = encoder(), encoder(smoothing=3), noise(1, 32000)
    states = plain(wave).features[0]
    middle = (states[:-2] + states[1:-1] + states[2:]) / 3
    # The last chunk holds one position more, so only frames before it are the same.
    assert torch.allclose(smooth(wave).features[0, 1:80], middle[:79], atol=1e-5)
    assert torch.allclose(smooth.hidden_states(wave)[-1][0, :80], states[:80], atol=1e-5)


@torch.inference_mode()
def test_one_layer_is_projected() -> None:
    model, wave = encoder(2, projected_layer=2, projection_size=6), noise(1, 32000)
    frames = model(wave).features
    assert frames.shape[2] == model.dim == 6
    state = model.hidden_states(wave)[-1]
    assert torch.allclose(frames, state @ model.projection.weight.T + model.projection.bias, atol=1e-5)
    for layer in (1, 3):
        other = encoder(layer, projected_layer=2, projection_size=6)
        assert other(wave).features.shape[2] == other.dim == 32


@torch.inference_mode()
def test_rows_of_a_batch_are_as_alone() -> None:
    model, wave, lengths = encoder(), noise(3, 32000), torch.tensor([32000, 9000, 700])
    together = model(wave, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(wave[row : row + 1, :length]).features[0]
        assert torch.allclose(together.features[row, : len(alone)], alone, atol=1e-5)
        assert not together.features[row, len(alone) :].any()


@torch.no_grad()
def test_sub_sampling_reads_seven_frames_four_apart() -> None:
    module = ConvSubsampling(80, 3)
    x = noise(1, 31, 80)
    whole = module(x)
    assert whole.shape == (1, 7, module.dim)
    for index in range(7):
        assert torch.allclose(module(x[:, 4 * index : 4 * index + 7])[:, 0], whole[:, index], atol=1e-6)


@torch.no_grad()
def test_identity_blocks_pass_their_input() -> None:
    block, x = ConformerBlock(16, 2, 32, 5, chunk=4, past=4), noise(1, 10, 16)
    block.begin_as_identity()
    assert torch.allclose(block(x), torch.nn.functional.layer_norm(x, (16,)), atol=1e-6)


def test_layers_above_are_not_needed() -> None:
    assert len(encoder(1).blocks) == 1
    assert encoder(0).context.left == 0
    # Each block reaches back by its past and by the chunk that its convolution touches.
    assert [encoder(layer).context.left for layer in (1, 2, 3)] == [24, 48, 72]


def test_blocks_that_see_everything_cannot_go_step_by_step() -> None:
    with pytest.raises(TypeError, match="whole row"):
        ConformerBlock(16, 2, 32, 5).state(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_chunk": 1}, "attention_chunk"),
        ({"attention_past": 12}, "multiple"),
        ({"attention_chunk": None, "attention_past": 0}, "need an attention_chunk"),
        ({"smoothing": 2}, "odd"),
        ({"smoothing": 9}, "at most 2"),
        ({"normalization": "batch"}, "normalization"),
        ({"subsampling": "conv"}, "multiple of 19"),
        ({"subsampling": "pool"}, "subsampling"),
        ({"look_ahead": -1}, "look_ahead"),
        ({"projected_layer": 9, "projection_size": 4}, "projected_layer"),
        ({"projected_layer": 2}, "projection_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        W2vBertConfig(**{**SETTINGS, **changes})


def test_saved_encoders_come_back(tmp_path) -> None:
    model, wave = encoder(smoothing=3, projected_layer=2, projection_size=6), noise(1, 16000)
    save_encoder(model, tmp_path / "encoder")
    loaded = from_pretrained(tmp_path / "encoder")
    assert loaded.config == model.config
    assert torch.equal(loaded(wave).features, model(wave).features)
    assert from_pretrained(tmp_path / "encoder", 2).dim == 6
    assert from_pretrained(tmp_path / "encoder", 1).dim == 32
    with pytest.raises(InputError, match="layer 4"):
        from_pretrained(tmp_path / "encoder", 4)
    (tmp_path / "encoder" / "encoder.json").write_text("{}")
    with pytest.raises(CheckpointError, match="encoder"):
        from_pretrained(tmp_path / "encoder")
