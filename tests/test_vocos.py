"""Vocos: the inverse transform, rows of batches, pieces of streams, and what a sample depends on."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.errors import CheckpointError, InputError
from speechtok.nn.edges import ChunkPast
from speechtok.nn.istft import InverseStft
from speechtok.vocoders.stream import VocosStream
from speechtok.vocoders.vocos import Vocos, VocosConfig

TINY = {"hop": 32, "embedding": 8, "dim": 16, "inner": 24, "blocks": 2, "kernel": 3}
KINDS = {
    "whole": {"vocab_size": 20},
    "whole-repeat": {"vocab_size": 20, "repeat": 2, "speaker_dim": 5},
    "causal": {"vocab_size": 20, "causal": True},
    "ahead": {"vocab_size": 20, "causal": True, "look_ahead": 3, "speaker_dim": 5, "n_fft": 96},
    "repeat": {"vocab_size": 20, "causal": True, "look_ahead": 3, "repeat": 2},
    "mel": {"feature_dim": 6, "causal": True, "look_ahead": 1},
}
STREAMS = [name for name in KINDS if not name.startswith("whole")]


def vocoder(kind: str) -> Vocos:
    """With weights of a size at which everything has a say."""
    torch.manual_seed(0)
    model = Vocos(VocosConfig(**TINY, **KINDS[kind])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
            if name == "head.out.weight":
                parameter.mul_(0.3)
    return model


def drawn(model: Vocos, rows: int, units: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Units, or frames, and speakers."""
    config = model.config
    inputs = (
        torch.randint(config.vocab_size, (rows, units))
        if config.vocab_size
        else torch.randn(rows, units, config.feature_dim)
    )
    return inputs, torch.randn(rows, config.speaker_dim) if config.speaker_dim else None


# ---- inverse transform


@pytest.mark.parametrize(("n_fft", "hop"), [(1280, 320), (640, 160), (1920, 480), (1024, 256), (400, 160)])
def test_a_true_spectrum_gives_the_sound(n_fft: int, hop: int) -> None:
    torch.manual_seed(0)
    wave = torch.randn(2, 40 * hop) * torch.linspace(0.01, 0.5, 40 * hop)
    transform = InverseStft(n_fft, hop)
    padded = F.pad(wave, (transform.cut, transform.cut))
    spectrum = torch.stft(padded, n_fft, hop, window=torch.hann_window(n_fft), center=False, return_complex=True).mT
    assert spectrum.shape[1] == 40
    back = transform(spectrum)
    assert back.shape == wave.shape
    snr = 10 * torch.log10(wave.square().sum() / (wave - back).square().sum())
    assert snr > 100


@pytest.mark.parametrize(("n_fft", "hop"), [(1280, 320), (64, 16), (512, 128)])
def test_centred_transform_is_that_of_torch(n_fft: int, hop: int) -> None:
    torch.manual_seed(0)
    spectrum = torch.randn(3, n_fft // 2 + 1, 25, dtype=torch.complex64)
    wanted = torch.istft(spectrum, n_fft, hop, window=torch.hann_window(n_fft), center=True)
    got = InverseStft(n_fft, hop, "center")(spectrum.mT)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-6 * float(wanted.abs().max().clamp_min(1))


def test_transforms_that_cannot_be() -> None:
    for sizes in ((1280, 641), (1280, 0), (1281, 320), (1280, 321)):
        with pytest.raises(InputError, match="hop"):
            InverseStft(*sizes)
    with pytest.raises(InputError, match="padding"):
        InverseStft(64, 16, "valid")


# ---- the network


@torch.inference_mode()
def test_a_reference_in_plain_torch() -> None:
    """Section 2 of the published description, written down again."""
    model = vocoder("whole")
    weights, units = model.state_dict(), torch.randint(20, (2, 17))
    x = weights["embedding.weight"][units].mT
    x = F.conv1d(x, weights["backbone.embed.weight"], weights["backbone.embed.bias"], padding=1)

    def norm(x, name):
        return F.layer_norm(x.mT, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6).mT

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"][:, None]

    x = norm(x, "backbone.norm")
    for block in ("backbone.convnext.0", "backbone.convnext.1"):
        y = F.conv1d(x, weights[f"{block}.dwconv.weight"], weights[f"{block}.dwconv.bias"], padding=1, groups=16)
        y = linear(norm(y, f"{block}.norm"), f"{block}.pwconv1")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + weights[f"{block}.gamma"][:, None] * linear(y, f"{block}.pwconv2")
    x = linear(norm(x, "backbone.final_layer_norm"), "head.out")
    magnitude, phase = x[:, :65].exp().clamp(max=100), x[:, 65:]
    frames = torch.fft.irfft(torch.polar(magnitude, phase), dim=1) * torch.hann_window(128)[:, None]
    wave, weight = torch.zeros(2, 16 * 32 + 128), torch.zeros(16 * 32 + 128)
    for t in range(17):
        wave[:, t * 32 : t * 32 + 128] += frames[..., t]
        weight[t * 32 : t * 32 + 128] += torch.hann_window(128).square()
    wanted = (wave / weight)[:, 48:-48]
    assert wanted.std() > 0.01
    torch.testing.assert_close(model(units), wanted, rtol=0, atol=1e-6)


def test_first_weights() -> None:
    model = Vocos(VocosConfig(vocab_size=100))
    assert 1.7e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.9e6
    assert all(torch.allclose(block.gamma, torch.tensor(1 / 6)) for block in model.backbone.convnext)
    assert model(torch.randint(100, (1, 50))).abs().max() < 1


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_unit_is_a_hop(kind: str) -> None:
    model = vocoder(kind)
    for count in [*range(1, 30), 99, 200]:
        inputs, speaker = drawn(model, 1, count)
        assert model(inputs, speaker=speaker).shape == (1, count * 32)


@pytest.mark.parametrize(("rate", "hop"), [(16000, 320), (24000, 480)])
@torch.inference_mode()
def test_configurations_of_16_and_24_khz(rate: int, hop: int) -> None:
    model = Vocos(VocosConfig(vocab_size=10, sample_rate=rate, hop=hop, dim=8, inner=8, blocks=1))
    with torch.backends.mkldnn.flags(enabled=False):  # which compiles for every new length
        assert all(model(torch.zeros(1, count, dtype=torch.int64)).shape[1] == count * hop for count in range(1, 201))
    assert model.sample_rate == rate
    assert model.head.istft.n_fft == 4 * hop


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_are_what_they_are_alone(kind: str) -> None:
    model, lengths = vocoder(kind), [1, 2, 5, 9, 16]
    inputs, speaker = drawn(model, len(lengths), max(lengths))
    together = model(inputs, torch.tensor(lengths), speaker)
    assert together.std() > 0.01
    for row, length in enumerate(lengths):
        alone = model(inputs[row : row + 1, :length], speaker=None if speaker is None else speaker[row : row + 1])
        torch.testing.assert_close(together[row, : length * 32], alone[0], rtol=0, atol=1e-6)
        assert not together[row, length * 32 :].any()


def test_loud_frames_are_bounded_and_have_gradients() -> None:
    model = vocoder("whole")
    with torch.no_grad():
        model.head.out.bias[:65] = 200.0  # exp of it is infinite
    wave = model(torch.randint(20, (1, 8)))
    assert torch.isfinite(wave).all()
    wave.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert not model.head.out.bias.grad[:65].any()


# ---- streams


@pytest.mark.parametrize("kind", STREAMS)
@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_pieces_are_the_whole(kind: str, pieces: list[int], seed: int) -> None:
    model = vocoder(kind)
    torch.manual_seed(seed)
    inputs, speaker = drawn(model, 1, sum(pieces))
    stream = VocosStream(model, None if speaker is None else speaker[0])
    given_out, waves, before = 0, [], 0
    for count in pieces:
        waves.append(stream.push(inputs[0, before : before + count]))
        before, given_out = before + count, given_out + len(waves[-1])
        assert given_out == max(0, before * 32 - model.delay)
    waves.append(stream.flush())
    if not before:
        assert not len(torch.cat(waves))
        return
    with torch.inference_mode():
        wanted = model(inputs, speaker=speaker)[0]
    torch.testing.assert_close(torch.cat(waves), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", STREAMS)
@torch.inference_mode()
def test_streams_at_different_places_in_one_batch(kind: str) -> None:
    model, block = vocoder(kind), 4
    counts = [13, 8, 3]
    speakers = torch.randn(3, 5) if model.config.speaker_dim else None
    inputs = [drawn(model, 1, count)[0][0] for count in counts]
    states = [model.stream_state(1, None if speakers is None else speakers[i : i + 1]) for i in range(3)]
    got: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(10):  # the second begins one turn later, the third two
        running = [i for i in range(3) if turn >= i]
        pieces = [inputs[i][(turn - i) * block : (turn - i + 1) * block] for i in running]
        here = torch.tensor([len(piece) for piece in pieces])
        filled = [torch.cat([piece, piece.new_ones(block - len(piece), *piece.shape[1:])]) for piece in pieces]
        wave, state = model.advance(torch.stack(filled), here, ChunkPast.join([states[i] for i in running]))
        for i, row, part in zip(running, wave, state.rows(), strict=True):
            states[i] = part
            got[i].append(row)
    for i, count in enumerate(counts):
        assert states[i].seen.tolist() == [count]
        wanted = model(inputs[i][None], speaker=None if speakers is None else speakers[i : i + 1])[0]
        wave = torch.cat(got[i])[model.delay :][: len(wanted)]
        torch.testing.assert_close(wave, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", STREAMS)
@torch.inference_mode()
def test_what_comes_later_has_no_say(kind: str) -> None:
    model = vocoder(kind)
    inputs, speaker = drawn(model, 1, 40)
    changed = inputs.clone()
    changed[0, 20] = (changed[0, 20] + 7) % 20 if model.config.vocab_size else -changed[0, 20]
    different = (model(inputs, speaker=speaker) - model(changed, speaker=speaker))[0].abs() > 1e-6
    first = int(different.nonzero()[0])
    # The bound is reached but for the window's first samples, which are nearly zero.
    assert 20 * 32 - model.delay <= first <= 20 * 32 - model.delay + model.config.frame_hop // 2


def test_only_causal_models_have_streams() -> None:
    model = vocoder("whole")
    with pytest.raises(InputError, match="causal"):
        VocosStream(model)
    stream = VocosStream(vocoder("causal"))
    stream.push(torch.tensor([1, 2]))
    stream.flush()
    assert not len(stream.flush())
    with pytest.raises(InputError, match="ended"):
        stream.push(torch.tensor([1]))


# ---- speakers


def test_speakers() -> None:
    model = vocoder("whole-repeat")
    units, speaker = torch.randint(20, (64, 4)), torch.randn(64, 5)
    with torch.no_grad():
        null, told = model(units), model(units, speaker=speaker)
        assert torch.equal(null, model(units, speaker=model.null_speaker.expand(64, -1)))
        assert ((told - null).abs().amax(1) > 1e-3).all()
        model.train()
        torch.manual_seed(0)
        share = ((model(units, speaker=speaker) - null).abs().amax(1) < 1e-6).float().mean()
    assert 0.02 < share < 0.25
    model(units, speaker=speaker).square().mean().backward()
    assert model.null_speaker.grad.any()


def test_a_fresh_model_has_one_voice() -> None:
    """The condition's weights begin at zero, and learn from the first step on."""
    torch.manual_seed(0)
    model = Vocos(VocosConfig(vocab_size=20, speaker_dim=5, speaker_dropout=0.0, **TINY))
    units = torch.randint(20, (2, 6))
    told = model(units, speaker=torch.randn(2, 5))
    torch.testing.assert_close(told, model(units), rtol=0, atol=1e-7)
    told.square().mean().backward()
    assert all(block.norm.affine.weight.grad.any() for block in model.backbone.convnext)


# ---- configurations and weights


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("feature_dim", {}),
        ("feature_dim", {"vocab_size": 5, "feature_dim": 5}),
        ("repeat", {"vocab_size": 5, "repeat": 3}),
        ("kernel", {"vocab_size": 5, "kernel": 4}),
        ("look_ahead", {"vocab_size": 5, "look_ahead": 1}),
        ("look_ahead", {"vocab_size": 5, "causal": True, "look_ahead": -1}),
        ("dim", {"vocab_size": 5, "dim": 0}),
        ("speaker_dropout", {"vocab_size": 5, "speaker_dropout": 1.0}),
        ("n_fft", {"vocab_size": 5, "n_fft": 100}),
    ],
)
def test_impossible_configurations(field: str, fields: dict) -> None:
    with pytest.raises(InputError, match=field):
        VocosConfig(**{"hop": 320, **fields})


def test_inputs_that_do_not_fit() -> None:
    units, mels = vocoder("causal"), vocoder("mel")
    for inputs, match in (
        (torch.tensor([[0, 20]]), "has 20"),
        (torch.tensor([[-1]]), "has 20"),
        (torch.zeros(1, 3), "int"),
        (torch.zeros(1, 0, dtype=torch.int64), "no units"),
    ):
        with pytest.raises(InputError, match=match):
            units(inputs)
    with pytest.raises(InputError, match="frames"):
        mels(torch.zeros(1, 3, 7))
    with pytest.raises(InputError, match="one voice"):
        units(torch.tensor([[1]]), speaker=torch.zeros(1, 5))
    with pytest.raises(InputError, match="speakers"):
        vocoder("ahead")(torch.tensor([[1]]), speaker=torch.zeros(5))


def test_weights_are_held_to_account() -> None:
    model = vocoder("ahead")
    weights = model.state_dict()
    again = Vocos(VocosConfig(**model.config_dict()), weights=weights).eval()
    units = torch.randint(20, (1, 9))
    assert torch.equal(again(units), model(units))
    weights["surplus"] = weights.pop("null_speaker")
    with pytest.raises(CheckpointError, match=r"missing: null_speaker.*unexpected: surplus"):
        Vocos(model.config, weights=weights)
