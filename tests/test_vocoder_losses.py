"""Discriminators and losses of vocoders against the published descriptions, written down again."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.compat import import_torchaudio
from speechtok.errors import InputError
from speechtok.nn.discriminators import feature_matching, generator_loss, hinge_loss
from speechtok.nn.wave_discriminators import MultiPeriod, MultiResolution
from speechtok.training.spectral import log_mel_distance


def sound(rows: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, samples, generator=generator) * torch.linspace(0.05, 0.5, samples)


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MultiPeriod((2, 3), (4, 6, 8)) if kind == "periods" else MultiResolution((128, 64), 4)


# ---- discriminators


@pytest.mark.parametrize("samples", [60, 61, 64])
@torch.inference_mode()
def test_periods(samples: int) -> None:
    judge, wave = small("periods"), sound(2, samples)
    logits, features = judge(wave)
    for index, period in enumerate((2, 3)):
        x, maps = wave[:, None, None], []
        if samples % period:
            missing = period - samples % period
            mirrored = wave[:, samples - 1 - missing : samples - 1].flip(1)
            x = torch.cat([x, mirrored[:, None, None]], 3)
        x = torch.stack([x[..., offset::period] for offset in range(period)], 4)[:, :, 0]  # [B, 1, N / p, p]
        for stride, layer in zip((3, 3, 1), judge.scales[index].layers, strict=True):
            x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, (stride, 1), (2, 0)), 0.1)
            maps.append(x)
        last = judge.scales[index].last
        x = F.conv2d(x, last.weight, last.bias, 1, (1, 0))
        torch.testing.assert_close(logits[index], x.reshape(2, -1), rtol=0, atol=1e-5)
        assert len(features[index]) == 3  # without the first layer
        for got, wanted in zip(features[index], [*maps[1:], x], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_resolutions() -> None:
    judge, wave = small("resolutions"), sound(2, 500) + 0.3
    logits, features = judge(wave)
    centred = wave - wave.mean(1, keepdim=True)
    centred = centred / centred.abs().amax(1, keepdim=True) * 0.8
    for index, size in enumerate((128, 64)):
        spectrum = torch.stft(centred, size, size // 4, window=torch.hann_window(size), return_complex=True)
        bins = size // 2 + 1
        edges = [int(share * bins) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
        maps, ends = [], []
        for band in range(5):
            part = spectrum[:, edges[band] : edges[band + 1]].mT
            x = torch.stack([part.real, part.imag], 1)
            for depth, layer in enumerate(judge.scales[index].bands[band]):
                stride, padding = (1, 2 if 0 < depth < 4 else 1), (1, 4 if depth < 4 else 1)
                x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, stride, padding), 0.1)
                maps += [x] if depth else []
            ends.append(x)
        last = judge.scales[index].last
        x = F.conv2d(torch.cat(ends, 3), last.weight, last.bias, padding=1)
        torch.testing.assert_close(logits[index], x.reshape(2, -1), rtol=0, atol=1e-5)
        assert len(features[index]) == 5 * 4 + 1
        for got, wanted in zip(features[index], [*maps, x], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_published_sizes() -> None:
    periods, resolutions = MultiPeriod(), MultiResolution()
    # HiFi-GAN's five periods have 41.1 million parameters; weight norm adds a number for each channel.
    count = sum(parameter.numel() for parameter in periods.parameters())
    assert count == 5 * sum(
        b * a * 5 + 2 * b for a, b in ((1, 32), (32, 128), (128, 512), (512, 1024), (1024, 1024))
    ) + 5 * (1024 * 3 + 2)
    assert 41e6 < count < 41.2e6
    assert [len(scale.window) for scale in resolutions.scales] == [2048, 1024, 512]
    assert resolutions.scales[0].widths == [102, 154, 256, 256, 257]
    assert all(layers[0].out_channels == 32 for scale in resolutions.scales for layers in scale.bands)


@torch.inference_mode()
def test_level_has_no_say_in_resolutions() -> None:
    judge, wave = small("resolutions"), sound(2, 500)
    quiet = judge(wave * torch.tensor([[0.01], [3.0]]))[0]
    for one, two in zip(judge(wave)[0], quiet, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["periods", "resolutions"])
def test_a_discriminator_learns_to_tell(kind: str) -> None:
    """Tones from noise, in a few steps, by the hinge loss; then the noise's gradient points to the tones' side."""
    judge = small(kind)
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-2)
    time = torch.arange(256) / 16.0
    real = torch.stack([torch.sin((1 + row / 4) * time) for row in range(8)])
    for step in range(20):
        fake = sound(8, 256, step)
        loss = hinge_loss(judge(real)[0], judge(fake)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    fake = sound(8, 256, 99).requires_grad_()
    before = generator_loss(judge(fake)[0], clipped=True).mean()
    (gradient,) = torch.autograd.grad(before, fake)
    moved = fake.detach() - 0.05 * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-9)
    assert generator_loss(judge(moved)[0], clipped=True).mean() < before


@pytest.mark.parametrize("kind", ["periods", "resolutions"])
def test_waves_that_are_too_short(kind: str) -> None:
    judge = small(kind)
    shortest = 3 if kind == "periods" else 65
    judge(sound(1, shortest))
    for wave in (sound(1, shortest - 1), sound(1, 100)[0]):
        with pytest.raises(InputError, match=f"at least {shortest}"):
            judge(wave)


def test_discriminators_that_cannot_be() -> None:
    for periods, channels in (((), (4, 4)), ((2, 0), (4, 4)), ((2,), (4,))):
        with pytest.raises(InputError, match="periods"):
            MultiPeriod(periods, channels)
    for windows in ((), (130,), (32,)):
        with pytest.raises(InputError, match="windows"):
            MultiResolution(windows)


# ---- losses


def test_adversarial_losses_by_hand() -> None:
    decoded = [torch.tensor([[0.5, 3.0], [-1.0, 1.0]]), torch.tensor([[1.5], [0.0]])]
    assert generator_loss(decoded, clipped=True).tolist() == pytest.approx([(0.25 + 0.0) / 2, (1.0 + 1.0) / 2])
    real = [[torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0]])], [torch.tensor([[0.0]]), torch.tensor([[1.0]])]]
    fake = [[torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0]])], [torch.tensor([[1.0]]), torch.tensor([[1.0]])]]
    assert feature_matching(real, fake).tolist() == pytest.approx([((0.5 + 1.0 + 3.0) + 1.0) / 2])
    leaf = torch.tensor([[1.0]], requires_grad=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        feature_matching([[leaf]], [[torch.zeros(1, 1)]]).sum().backward()


@pytest.mark.parametrize("rate", [16000, 24000])
def test_mel_distance_is_that_of_torchaudio(rate: int) -> None:
    torchaudio = import_torchaudio()
    decoded, wave = sound(3, 5000), sound(3, 5000, 1)
    mel = torchaudio.transforms.MelSpectrogram(rate, 1024, hop_length=256, n_mels=100, power=1).double()
    one, two = (mel(x.double()).clamp_min(1e-7).log() for x in (decoded, wave))
    wanted = (one - two).abs().mean((1, 2))
    got = log_mel_distance(decoded, wave, sample_rate=rate)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=0)


def test_mel_distance_of_rows() -> None:
    lengths = torch.tensor([5000, 2000, 1100])
    decoded, wave = sound(3, 5000).requires_grad_(), sound(3, 5000, 1)
    together = log_mel_distance(decoded, wave, lengths, sample_rate=16000)
    for row, length in enumerate(lengths.tolist()):
        alone = log_mel_distance(decoded[row : row + 1, :length], wave[row : row + 1, :length], sample_rate=16000)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=0)
    together.sum().backward()
    assert not decoded.grad[1, 2000:].any()
    assert decoded.grad[1, :2000].any()
    silent = torch.zeros(1, 5000, requires_grad=True)
    log_mel_distance(silent, wave[:1], sample_rate=16000).sum().backward()
    assert torch.isfinite(silent.grad).all()
    with pytest.raises(InputError, match="alike"):
        log_mel_distance(decoded, wave[:, :-1], sample_rate=16000)
