"""Losses of codecs: multi-scale mel, discriminator, balancer, and a run of the loop with all three."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.compat import import_torchaudio
from speechtok.errors import AudioError, InputError
from speechtok.nn.discriminators import MultiScaleStft, feature_distance, generator_loss, hinge_loss
from speechtok.training.balancer import Balancer
from speechtok.training.loop import train
from speechtok.training.recipe import DataConfig, OptimizerConfig, Recipe, RunConfig
from speechtok.training.sampler import Crop
from speechtok.training.spectral import MultiScaleMel, mel_power
from speechtok.training.waves import Waves

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "assets" / "clips"


def sounds(rows: int, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise whose level changes, and the same with some more noise."""
    generator = torch.Generator().manual_seed(seed)
    wave = torch.randn(rows, samples, generator=generator) * torch.linspace(0.01, 0.5, samples)
    return wave + 0.05 * torch.randn(rows, samples, generator=generator), wave


# ---- multi-scale mel


def test_mel_loss_is_that_of_torchaudio() -> None:
    torchaudio = import_torchaudio()
    decoded, wave = sounds(3, 4096)
    terms = []
    for size in (64, 128, 256, 512, 1024):
        front = torchaudio.transforms.MelSpectrogram(
            24000, size, size, size // 4, f_min=64.0, n_mels=64, normalized=True, center=False
        ).double()
        pad = (size - size // 4) // 2
        one, two = (front(F.pad(x.double(), (pad, pad))) for x in (decoded, wave))
        logs = (one + 1e-5).log10() - (two + 1e-5).log10()
        terms += [(one - two).abs().mean((1, 2)), logs.square().mean((1, 2))]
    wanted = torch.stack(terms).mean(0)
    assert torch.allclose(MultiScaleMel()(decoded, wave).double(), wanted, rtol=1e-4)
    double = torch.stack([term * (1 + i % 2) for i, term in enumerate(terms)]).sum(0) / 15
    assert torch.allclose(MultiScaleMel(log_weight=2.0)(decoded, wave).double(), double, rtol=1e-4)


def test_gradient_of_the_mel_spectrum() -> None:
    wave, window = torch.randn(2, 43, dtype=torch.float64), torch.hann_window(16, dtype=torch.float64)
    bank = torch.rand(9, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mel_power(x, window, bank, 4), wave.requires_grad_())
    spectrum = torch.stft(wave, 16, 4, 16, window, center=False, return_complex=True)
    assert torch.allclose(mel_power(wave, window, bank, 4), spectrum.abs().square().mT @ bank)


def test_rows_of_a_mel_loss_are_independent() -> None:
    mel = MultiScaleMel()
    decoded, wave = sounds(3, 4800)
    lengths = torch.tensor([4800, 3000, 100])
    losses = mel(decoded, wave, lengths)
    for row in (0, 1):  # the third is shorter than a batch may be
        place = slice(row, row + 1), slice(int(lengths[row]))
        assert torch.allclose(losses[row], mel(decoded[place], wave[place]), rtol=1e-5)
    behind = decoded.clone()
    behind[1, 3000:], behind[2, 100:] = 3.0, 7.0
    behind.requires_grad_()
    assert torch.equal(mel(behind, wave, lengths), losses)
    (gradient,) = torch.autograd.grad(mel(behind, wave, lengths).sum(), behind)
    assert not gradient[1, 3000:].any() and not gradient[2, 100:].any() and gradient[2, :100].any()
    assert torch.equal(mel(decoded, wave), mel(decoded, wave, torch.tensor([4800] * 3)))


def test_mel_loss_of_silence_and_in_bfloat16() -> None:
    mel, (decoded, wave) = MultiScaleMel(), sounds(2, 2400)
    silence = torch.zeros(2, 2400, requires_grad=True)
    (gradient,) = torch.autograd.grad(mel(silence, wave).sum(), silence)
    assert torch.isfinite(gradient).all()
    assert not mel(wave, wave).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel(decoded, wave), mel(decoded.float(), wave))
        assert mel(decoded.bfloat16(), wave).dtype == torch.float32


def test_mel_loss_says_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        MultiScaleMel(windows=(63,))
    with pytest.raises(AudioError, match="12000"):
        MultiScaleMel(sample_rate=16000, high=12000.0)
    with pytest.raises(InputError, match="alike"):
        MultiScaleMel()(torch.zeros(1, 2400), torch.zeros(1, 2401))
    with pytest.raises(InputError, match="at least 256"):
        MultiScaleMel()(torch.zeros(1, 255), torch.zeros(1, 255))


# ---- discriminator


def published(weights: dict[str, Tensor], wave: Tensor, window: int) -> tuple[Tensor, list[Tensor]]:
    """The network of one scale as EnCodec's repository has it, written out with torchaudio's spectrogram."""
    front = import_torchaudio().transforms.Spectrogram(
        window, window, window // 4, normalized=True, center=False, pad_mode=None, power=None
    )
    spectrum = front(wave[:, None])
    x, features = torch.cat([spectrum.real, spectrum.imag], 1).permute(0, 1, 3, 2), []

    def conv(name: str, x: Tensor, **settings) -> Tensor:
        g, v = (weights[f"{name}.parametrizations.weight.original{i}"] for i in (0, 1))
        return F.conv2d(x, v * g / v.square().sum((1, 2, 3), keepdim=True).sqrt(), weights[f"{name}.bias"], **settings)

    settings = [{"padding": (1, 4)}]
    settings += [{"stride": (1, 2), "dilation": (d, 1), "padding": (d, 4)} for d in (1, 2, 4)] + [{"padding": (1, 1)}]
    for i, chosen in enumerate(settings):
        x = F.leaky_relu(conv(f"layers.{i}", x, **chosen), 0.2)
        features.append(x)
    return conv("last", x, padding=(1, 1))[:, 0], features


def test_discriminator_is_the_published_one() -> None:
    torch.manual_seed(0)
    judge, (_, wave) = MultiScaleStft(filters=4), sounds(2, 4800)
    logits, features = judge(wave)
    assert [x.shape[1] for x in logits] == [(4800 - n) // (n // 4) + 1 for n in (2048, 1024, 512, 256, 128)]
    for scale, window, ours, maps in zip(judge.scales, (2048, 1024, 512, 256, 128), logits, features, strict=True):
        theirs, wanted = published(scale.state_dict(), wave, window)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert len(maps) == 5 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, wanted, strict=True))
    with pytest.raises(InputError, match="2048 samples"):
        judge(wave[:, :2000])
    with pytest.raises(InputError, match="multiples of 4"):
        MultiScaleStft(windows=())
    assert len(MultiScaleStft((256, 64), filters=2).scales) == 2


def test_published_size_of_the_discriminator() -> None:
    # Per scale: 2 to 32 channels (3, 9), three times 32 to 32, (3, 3), and (3, 3) to 1; a gain for each channel.
    weights = 2 * 32 * 27 + 3 * 32 * 32 * 27 + 32 * 32 * 9 + 32 * 9
    assert sum(p.numel() for p in MultiScaleStft().parameters()) == 5 * (weights + 2 * (5 * 32 + 1))


def test_losses_of_the_discriminator() -> None:
    real = [torch.tensor([[2.0, 0.5], [0.0, -1.0]]), torch.tensor([[[1.0]], [[3.0]]])]
    decoded = [torch.tensor([[-2.0, 0.0], [1.0, 1.0]]), torch.tensor([[[-0.5]], [[0.5]]])]
    assert hinge_loss(real, decoded).tolist() == pytest.approx([(0.25 + 0.5 + 0.0 + 0.5) / 2, (1.5 + 2.0 + 1.5) / 2])
    assert generator_loss(decoded).tolist() == pytest.approx([(1.0 + 0.5) / 2, (-1.0 - 0.5) / 2])
    a, b = (
        [[torch.tensor([[1.0, -3.0]]), torch.tensor([[4.0]])]],
        [[torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0]])]],
    )
    assert feature_distance(a, b).tolist() == pytest.approx([((1.5 / 2.0) + (3.0 / 4.0)) / 2])
    scaled = [[100 * x for x in a[0]]], [[100 * x for x in b[0]]]
    assert torch.allclose(feature_distance(*scaled), feature_distance(a, b))
    with pytest.raises(ValueError, match="zip"):
        hinge_loss(real, decoded[:1])


def test_the_discriminator_learns_what_is_real() -> None:
    torch.manual_seed(0)
    judge = MultiScaleStft((256, 64), filters=4)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    time, generator = torch.arange(1024) / 24000, torch.Generator().manual_seed(0)

    def pair() -> tuple[Tensor, Tensor]:
        pitch = 500 + 3000 * torch.rand(4, 1, generator=generator)
        return torch.sin(2 * torch.pi * pitch * time), torch.randn(4, 1024, generator=generator) / 2**0.5

    for _ in range(40):
        real, decoded = pair()
        optimizer.zero_grad()
        hinge_loss(judge(real)[0], judge(decoded)[0]).mean().backward()
        optimizer.step()
    real, decoded = pair()
    assert hinge_loss(judge(real)[0], judge(decoded)[0]).mean() < 1.0  # 2 is a coin
    assert (generator_loss(judge(decoded)[0]) > generator_loss(judge(real)[0])).all()


# ---- balancer


def pulls(wave: Tensor) -> dict[str, Tensor]:
    """Two losses with constant gradients of each row: 1 in one direction, 1e6 in another."""
    return {"small": wave[:, 0], "large": 1e6 * wave[:, 1]}


def test_scales_of_losses_do_not_matter() -> None:
    balancer, wave = Balancer({"small": 1.0, "large": 1.0}), torch.zeros(3, 4, requires_grad=True)
    gradient, figures = balancer(pulls(wave), wave)
    assert torch.allclose(gradient, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(3, 4))
    assert figures["norm_large"] == pytest.approx(3e6) and figures["norm_small"] == pytest.approx(3.0)
    uneven = Balancer({"large": 3.0, "small": 1.0, "absent": 9.0})
    assert torch.allclose(uneven(pulls(wave), wave)[0][0], torch.tensor([0.25, 0.75, 0.0, 0.0]))


def test_norms_are_unbiased_moving_means() -> None:
    balancer, norms = Balancer({"a": 1.0}, decay=0.9), [2.0, 5.0, 0.5]
    for step, norm in enumerate(norms, 1):
        wave = torch.ones(2, 2, requires_grad=True)
        # Rows with norms apart: their mean counts.
        gradient, _ = balancer({"a": (wave[:, 0] * torch.tensor([0.5, 1.5]) * norm)}, wave)
        mean = sum(0.9 ** (step - i) * value for i, value in enumerate(norms[:step], 1))
        mean /= sum(0.9 ** (step - i) for i in range(1, step + 1))
        assert gradient[:, 0].tolist() == pytest.approx([0.5 * norm / mean, 1.5 * norm / mean])
    copy = Balancer({"a": 1.0}, decay=0.9)
    copy.load_state_dict(balancer.state_dict())
    wave = torch.ones(1, 2, requires_grad=True)
    one, two = (entry({"a": 3 * wave[:, 0]}, wave)[0] for entry in (balancer, copy))
    assert torch.equal(one, two)
    state = balancer.state_dict()
    balancer.eval()({"a": 7 * wave[:, 0]}, wave)
    assert all(torch.equal(state[name], value) for name, value in balancer.state_dict().items())


def test_a_loss_may_begin_later() -> None:
    balancer = Balancer({"small": 1.0, "large": 1.0})
    for _ in range(5):
        wave = torch.zeros(3, 4, requires_grad=True)
        gradient = balancer({"small": pulls(wave)["small"]}, wave)[0]
        assert gradient[0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert balancer(pulls(wave), wave)[0][0].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])


def test_the_balanced_gradient_trains_what_made_the_sound() -> None:
    torch.manual_seed(0)
    layer, balancer, x = nn.Linear(5, 4), Balancer({"small": 1.0, "large": 2.0}), torch.randn(3, 5)
    wave = layer(x)
    wave.backward(balancer(pulls(wave), wave)[0])
    wanted = torch.zeros(4, 5)
    wanted[0], wanted[1] = x.sum(0) / 3, x.sum(0) * 2 / 3
    assert torch.allclose(layer.weight.grad, wanted, atol=1e-6)


def test_balancer_says_what_does_not_fit() -> None:
    wave = torch.zeros(3, 4, requires_grad=True)
    for weights, decay in (({}, 0.9), ({"a": 0.0}, 0.9), ({"a": 1.0}, 1.0)):
        with pytest.raises(InputError, match="weights must be positive"):
            Balancer(weights, decay)
    with pytest.raises(InputError, match="large"):
        Balancer({"small": 1.0})(pulls(wave), wave)
    with pytest.raises(InputError, match="no norms yet"):
        Balancer({"small": 1.0}).eval()({"small": wave[:, 0]}, wave)


# ---- all together in the loop


class Gan(nn.Module):
    """Learns to pass sound through a convolution: the parts of a codec's objective without a codec."""

    perturb_config = None

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 4, 9, padding=4), nn.ELU(), nn.Conv1d(4, 1, 9, padding=4))
        self.judge = MultiScaleStft((256, 64), filters=2)
        self.mel = MultiScaleMel(windows=(64, 256), bins=16)
        self.balancer = Balancer({"wave": 0.1, "mel": 2.0, "adversarial": 4.0, "features": 4.0})

    def collate(self, crops: list[Crop], sound: Waves, noises: None, *, training: bool) -> dict[str, Tensor]:
        return {"wave": torch.from_numpy(np.stack([sound.cut(crop.item, crop.start, crop.length) for crop in crops]))}

    def compiled(self) -> Iterable[nn.Module]:
        return [self.net]

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        return len(batch["wave"])

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        wave = batch["wave"]
        decoded = self.net(wave[:, None])[:, 0].float()
        figures = {"rows": torch.tensor(float(len(wave))), "mel": self.mel(decoded, wave).sum().detach()}
        if not self.training:
            return figures["mel"] / weight, figures
        heard = decoded.detach().requires_grad_()  # one pass of the judge serves both sides
        (real, wanted), (fake, given) = self.judge(wave), self.judge(heard)
        losses = {
            "wave": (heard - wave).abs().mean(1),
            "mel": self.mel(heard, wave),
            "adversarial": generator_loss(fake),
            "features": feature_distance(wanted, given),
        }
        balanced, norms = self.balancer(losses, heard)
        hinge = hinge_loss(real, fake).sum()
        return ((decoded * balanced).sum() + hinge) / weight, {**figures, **norms, "hinge": hinge.detach()}

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        return {name: float(value) / float(figures["rows"]) for name, value in figures.items()}

    def alarms(self, summary: dict[str, float]) -> list[str]:
        return []


def run_gan(folder: Path, steps: int = 6, **changes) -> list[dict]:
    torch.manual_seed(0)
    config = RunConfig(steps, precision="float32", log_every=1, evaluate_every=steps, checkpoint_every=3)
    data, optimizer = DataConfig(crop_seconds=(0.32,), batch_seconds=2.56), OptimizerConfig(learning_rate=3e-3)
    waves = Waves.build(CLIPS, folder.parent / "waves")  # the processes of a run only read what the run alone has made
    run = train(Gan(), Recipe("gan", {}, {}, config, data, optimizer), waves, folder, held_out=waves, **changes)
    return [line for line in run.history if line["split"] == "train"]


FIGURES = ("mel", "hinge", "norm_adversarial", "norm_features", "norm_wave", "gradient_norm")


def test_a_run_with_a_discriminator_resumes_exactly(tmp_path: Path) -> None:
    whole = run_gan(tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(event) -> None:
        if event.stage == "train" and event.done == 5:
            raise Killed

    with pytest.raises(Killed):
        run_gan(tmp_path / "broken", on_event=kill)
    again = run_gan(tmp_path / "broken")
    assert [[line[name] for name in FIGURES] for line in again] == [[line[name] for name in FIGURES] for line in whole]
    one, two = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_a_gan_as_one(tmp_path: Path, torchrun) -> None:
    alone = run_gan(tmp_path / "alone")
    folder = tmp_path / "together"
    torchrun(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.{Path(__file__).stem} as t; "
        f"t.run_gan(Path({str(folder)!r}))"
    )
    together = run_gan(folder)  # reads what is there
    for one, two in zip(alone, together, strict=True):
        assert [two[name] for name in FIGURES] == pytest.approx([one[name] for name in FIGURES], rel=1e-3)


def test_a_gan_learns(tmp_path: Path) -> None:
    lines = run_gan(tmp_path / "run", steps=40)
    assert np.mean([line["mel"] for line in lines[-5:]]) < 0.8 * lines[0]["mel"]
    assert all(np.isfinite(line["loss"]) for line in lines)
