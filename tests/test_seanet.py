"""SEANet: rows of a batch, chunks of streams, and what frames depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.errors import CheckpointError
from speechtok.nn.edges import ChunkPast, Edges, pad
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder

SHAPE = {"num_filters": 4, "hidden_size": 8, "upsampling_ratios": (4, 3, 2), "num_residual_layers": 2}
KINDS = {
    "constant": {"num_lstm_layers": 0, "pad_mode": "constant"},
    "constant-lstm": {"num_lstm_layers": 2, "pad_mode": "constant"},
    "reflect": {"num_lstm_layers": 0},
    "reflect-lstm": {"num_lstm_layers": 1, "use_conv_shortcut": False},
}
HOP = 24
LENGTHS = [1, 2, 3, HOP - 1, HOP, HOP + 1, 2 * HOP, 191, 192, 193, 194, 215, 216, 217, 383, 384, 385, 387, 400]
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", params=KINDS)
def networks(request):
    torch.manual_seed(0)
    config = SeanetConfig(**SHAPE, **KINDS[request.param])
    return config, SeanetEncoder(config).eval(), SeanetDecoder(config).eval()


def in_chunks(network, x, columns, hop):
    """Run [1, C, N] through `advance` in chunks of so many columns, the last one filled up with junk."""
    past, parts = network.past(1), []
    up = columns // hop if hop > 0 else columns
    for begin in range(0, x.shape[-1], columns):
        piece = x[..., begin : begin + columns]
        count = piece.shape[-1]
        piece = torch.cat([piece, torch.full((1, x.shape[1], columns - count), 9.0)], dim=-1)
        frames = -(-count * up // columns)
        y, past = network.advance(piece, torch.tensor([count]), torch.tensor([frames]), past)
        past = ChunkPast.join([*past.rows()])
        assert past.seen.tolist() == [-(-min(begin + columns, x.shape[-1]) * up // columns)]
        parts.append((y, count))
    return parts


@torch.inference_mode()
def test_rows_are_what_they_are_alone(networks):
    _, encoder, _ = networks
    torch.manual_seed(1)
    waves = torch.randn(len(LENGTHS), 1, max(LENGTHS))
    together = encoder(waves.clone(), Edges(torch.tensor(LENGTHS)))
    for row, wave, length in zip(together, waves, LENGTHS, strict=True):
        alone = encoder(wave[None, :, :length])[0]
        assert alone.shape[-1] == -(-length // HOP)
        torch.testing.assert_close(row[:, : alone.shape[-1]], alone, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_chunks_are_the_whole(networks, length):
    config, encoder, decoder = networks
    torch.manual_seed(length)
    wave = torch.randn(1, 1, length)
    frames = encoder(wave)
    parts = in_chunks(encoder, wave, config.chunk * HOP, HOP)
    torch.testing.assert_close(torch.cat([y[..., : -(-count // HOP)] for y, count in parts], -1), frames, **CLOSE)
    parts = in_chunks(decoder, frames, config.chunk, 1)
    torch.testing.assert_close(torch.cat([y[..., : count * HOP] for y, count in parts], -1), decoder(frames), **CLOSE)


@torch.inference_mode()
def test_streams_at_different_places_in_one_batch(networks):
    config, encoder, _ = networks
    torch.manual_seed(2)
    width = config.chunk * HOP
    waves = [torch.randn(1, 1, n) for n in (3 * width - 5, 2 * width, width + 1)]
    expected = [encoder(wave) for wave in waves]
    pasts, got = [encoder.past(1) for _ in waves], [[] for _ in waves]
    for turn in range(4):  # the second stream begins one turn later, the third two
        active = [i for i in range(3) if 0 <= (turn - i) * width < waves[i].shape[-1]]
        pieces = [waves[i][0, 0, (turn - i) * width :][:width] for i in active]
        lengths = torch.tensor([len(piece) for piece in pieces])
        batch = torch.nn.utils.rnn.pad_sequence([torch.zeros(width), *pieces], batch_first=True)[1:, None]
        frames = -(-lengths // HOP)
        y, past = encoder.advance(batch, lengths, frames, ChunkPast.join([pasts[i] for i in active]))
        for i, row, one, count in zip(active, y, past.rows(), frames.tolist(), strict=True):
            pasts[i] = one
            got[i].append(row[None, :, :count])
    for parts, frames in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, -1), frames, **CLOSE)


@pytest.mark.parametrize("kind", ["constant", "constant-lstm"])
@torch.inference_mode()
def test_constant_padding_is_causal(kind):
    """R6: samples from hop * t0 on leave the frames before t0 as they are; frame t0 hears the first of them."""
    torch.manual_seed(0)
    encoder = SeanetEncoder(SeanetConfig(**SHAPE, **KINDS[kind])).eval()
    wave = torch.randn(1, 1, 20 * HOP)
    before = encoder(wave)
    for first in (0, 1, 7, 19):
        other = wave.clone()
        other[..., first * HOP :] += 1
        after = encoder(other)
        assert torch.equal(after[..., :first], before[..., :first])
        assert not torch.equal(after[..., first], before[..., first])


@torch.inference_mode()
def test_reflect_padding_looks_ahead_at_the_start():
    """Spec B5, trap 5: with the published padding frame 6 reaches frame 0, frame 8 does not."""
    torch.manual_seed(0)
    encoder = SeanetEncoder(SeanetConfig(num_filters=4, hidden_size=8)).eval()
    wave = torch.randn(1, 1, 20 * 320)
    before = encoder(wave)
    for frame, reached in ((6, True), (8, False)):
        other = wave.clone()
        other[..., frame * 320 :] += 1
        assert torch.equal(encoder(other)[..., 0], before[..., 0]) != reached


@torch.inference_mode()
def test_the_past_is_as_long_as_stated():
    """The first sample of it reaches a frame, the one before it does not."""
    torch.manual_seed(0)
    encoder = SeanetEncoder(SeanetConfig(**SHAPE, **KINDS["constant"])).double().eval()
    wave = torch.randn(1, 1, 40 * HOP, dtype=torch.float64)
    before, at = encoder(wave)[..., 30], 30 * HOP - encoder.left
    for sample, reached in ((at, True), (at - 1, False)):
        other = wave.clone()
        other[..., sample] += 1e6
        assert torch.equal(encoder(other)[..., 30], before) != reached


@torch.inference_mode()
def test_75_frames_in_a_second():
    encoder = SeanetEncoder(SeanetConfig(num_filters=2, hidden_size=8, num_lstm_layers=0)).eval()
    decoder = SeanetDecoder(SeanetConfig(num_filters=2, hidden_size=8, num_lstm_layers=0)).eval()
    frames = encoder(torch.randn(1, 1, 24000))
    assert frames.shape == (1, 8, 75)
    assert decoder(frames).shape == (1, 1, 24000)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    left=st.integers(0, 6),
    right=st.integers(0, 3),
    stride=st.integers(1, 5),
    mode=st.sampled_from(["reflect", "constant"]),
)
def test_edges_are_those_of_each_row_alone(lengths, left, right, stride, mode):
    """Against padding row by row; what lies behind the ends is junk."""
    rows = torch.arange(1.0, 1 + 2 * len(lengths) * max(lengths)).reshape(len(lengths), 2, -1)
    edges = Edges(torch.tensor(lengths))
    padded = edges.around(rows, left, right, stride, mode)
    assert edges.lengths.tolist() == [-(-n // stride) for n in lengths]
    for row, whole, n in zip(padded, rows, lengths, strict=True):
        expected = pad(whole[None, :, :n], left, right + -n % stride, mode)[0]
        assert torch.equal(row[:, : expected.shape[-1]], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample_rate": 0},
        {"num_filters": 3},
        {"upsampling_ratios": ()},
        {"pad_mode": "zero"},
        {"norm_type": "batch"},
        {"num_lstm_layers": -1},
        {"use_causal_conv": 1},
        {"use_causal_conv": False, "trim_right_ratio": 0.5},
    ],
)
def test_unusable_configurations(wrong):
    with pytest.raises(CheckpointError, match=next(iter(wrong)) if len(wrong) == 1 else "trim_right_ratio"):
        SeanetConfig(**wrong)
