"""Constant-Q transform against librosa's wavelets, librosa, nnAudio; lengths, rows, chunks, gradients; the encoder."""

import json
import math
from functools import lru_cache

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.audio import cqt as module
from speechtok.audio.cqt import C1, CQT, cqt, frequencies
from speechtok.encoders.cqt import CqtConfig, CqtEncoder
from speechtok.errors import InputError
from speechtok.frames import WindowRule
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

RATE = 24000
LAYOUTS = [(84, 12), (252, 36), (336, 48)]
HOPS = [256, 320, 512]
SMALL = {"fmin": 220.0, "bins": 30, "bins_per_octave": 12}


@lru_cache(maxsize=1)
def librosa_wavelets(bins: int, per_octave: int, fmin: float, norm: float, filter_scale: float):
    """Complex128 [bins, size], and lengths [bins, 1]."""
    found = librosa.cqt_frequencies(n_bins=bins, fmin=fmin, bins_per_octave=per_octave)
    wavelets, lengths = librosa.filters.wavelet(
        freqs=found, sr=RATE, dtype=np.complex128, norm=norm, filter_scale=filter_scale
    )
    return wavelets, lengths[:, None]


def direct_products(wave, hop, bins, per_octave, frames, fmin=C1, norm=1, filter_scale=1.0) -> np.ndarray:
    """The definition at chosen frames: products with librosa's wavelets at the full rate, complex128 [bins, frames]."""
    wavelets, lengths = librosa_wavelets(bins, per_octave, fmin, norm, filter_scale)
    size = wavelets.shape[1]
    padded = np.pad(np.asarray(wave, np.float64), size // 2)
    pieces = np.stack([padded[frame * hop : frame * hop + size] for frame in frames], 1)
    return np.sqrt(lengths) * (wavelets @ pieces).conj()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * np.float32(0.1)


def tones(samples: int) -> np.ndarray:
    """Steady tones, none at the centre of a bin."""
    at = np.arange(samples) / RATE
    hertz = (41.3, 110.7, 277.2, 447.0, 903.0, 1700.7, 3520.0)
    return sum(0.1 * np.sin(2 * np.pi * f * at + f) for f in hertz).astype(np.float32)


def sweep(samples: int) -> np.ndarray:
    """From 30 to 4000 Hz."""
    at = np.linspace(0, 1, samples)
    phase = 30 * (4000 / 30) ** at / math.log(4000 / 30) * samples / RATE
    return (0.3 * np.sin(2 * np.pi * phase)).astype(np.float32)


def of_maximum(got, expected) -> np.ndarray:
    """Largest error of each frame, in parts of the frame's largest expected magnitude."""
    return np.abs(np.asarray(got) - expected).max(0) / np.abs(expected).max(0)


def run(transform: CQT, wave: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return transform(torch.from_numpy(wave)[None])[0].numpy()


@pytest.fixture(scope="module")
def notes(shared) -> list[np.ndarray]:
    """Piano notes of the eval split, the first five seconds."""
    from speechtok.audio.decode import load

    folder = shared / "music" / "notes"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    chosen = [row["path"] for row in rows if row["split"] == "test" and row["path"].startswith("notes_pitched")]
    return [load(folder / path, RATE)[: 5 * RATE] for path in chosen[:: max(1, len(chosen) // 6)]]


# ---------------------------------------------------------------------------------------------------------------------
# against the definition, librosa and nnAudio


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.parametrize(("bins", "per_octave"), LAYOUTS)
def test_both_methods_are_products_with_wavelets_at_the_full_rate(bins, per_octave, hop):
    total = 1 + 3 * RATE // hop
    layout = {"hop": hop, "bins": bins, "bins_per_octave": per_octave, "output": "complex"}
    transforms = [CQT(RATE, method=method, **layout) for method in ("direct", "multirate")]
    frames = [0, 1, *range(9, total - 2, 31), total - 1]
    for wave in (noise(3 * RATE), sweep(3 * RATE), noise(3 * RATE) ** 3):
        expected = direct_products(wave, hop, bins, per_octave, frames)
        for transform in transforms:
            got = run(transform, wave)
            assert got.shape == (bins, total)
            assert of_maximum(got[:, frames], expected).max() <= 2e-5


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.parametrize(("bins", "per_octave"), LAYOUTS)
def test_librosa_on_steady_tones(bins, per_octave, hop):
    """But for the seconds at which the low wavelets meet the ends of the sound: librosa's are coarse there."""
    wave, edge = tones(6 * RATE), 2 * RATE // hop
    expected = librosa.cqt(
        wave, sr=RATE, hop_length=hop, fmin=C1, n_bins=bins, bins_per_octave=per_octave, sparsity=0
    )  # fmt: skip
    for method in ("direct", "multirate"):
        got = run(CQT(RATE, hop=hop, bins=bins, bins_per_octave=per_octave, method=method), wave)
        assert got.shape == expected.shape
        assert of_maximum(got, np.abs(expected))[edge:-edge].max() <= 1e-2
        assert np.abs(got - np.abs(expected)).max() <= 5e-2 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [True, False])
def test_librosa_on_noise_where_it_does_not_decimate(scale):
    """With an odd hop librosa leaves the rate alone. It applies its wavelets backwards: ours do so to a reversed sound.

    At low rates its wavelets are rounded to whole samples of these and lie half such a sample beside the centre, so on
    noise it is 3 % away from products with its own wavelets at the full rate.
    """
    hop = 321
    wave = noise(1 + 150 * hop)  # the same frames from either end
    settings = {"fmin": 110.0, "bins_per_octave": 24, "scale": scale}
    expected = np.abs(librosa.cqt(wave, sr=RATE, hop_length=hop, n_bins=120, sparsity=0, **settings))
    for method in ("direct", "multirate"):
        transform = CQT(RATE, hop=hop, bins=120, method=method, **settings)
        assert of_maximum(run(transform, wave[::-1].copy())[:, ::-1], expected).max() <= 1e-4
        assert of_maximum(run(transform, wave), expected).max() <= 3e-2


def test_librosa_on_recorded_notes(notes):
    assert len(notes) >= 5
    transform = CQT(RATE, hop=320, bins=336, bins_per_octave=48)
    for wave in notes:
        got = run(transform, wave)
        expected = np.abs(
            librosa.cqt(wave, sr=RATE, hop_length=320, fmin=C1, n_bins=336, bins_per_octave=48, sparsity=0)
        )
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-2 * expected.max()
        exact = np.abs(direct_products(wave, 320, 336, 48, range(0, got.shape[1], 40)))
        loud = exact.max(0) > 1e-2 * exact.max()
        assert of_maximum(got[:, ::40], exact)[loud].max() <= 1e-4


def test_nnaudio_gives_the_target_of_mert():
    """Its wavelets are a little shorter than librosa's; with hops that divide its padding its lengths are right."""
    features = pytest.importorskip("nnAudio.features.cqt", reason="nnAudio is not installed")
    theirs = features.CQT1992v2(
        RATE, 320, fmin=32.7, n_bins=336, bins_per_octave=48, pad_mode="constant", verbose=False
    )  # fmt: skip
    wave = torch.from_numpy(np.stack([noise(5 * RATE), tones(5 * RATE), sweep(5 * RATE)]))
    expected = theirs(wave).numpy()
    for method in ("direct", "multirate"):
        ours = CQT(RATE, hop=320, fmin=32.7, bins=336, bins_per_octave=48, wavelets="nnaudio", method=method)
        got = ours(wave).numpy()
        assert got.shape == expected.shape == (3, 336, 376)
        for row in range(3):
            assert of_maximum(got[row], expected[row]).max() <= 1e-4


def test_440_hz_is_bin_180():
    at = torch.arange(5 * RATE) / RATE
    transform = CQT(RATE, hop=320, fmin=32.7, bins=336, bins_per_octave=48, wavelets="nnaudio")
    got = transform(torch.sin(2 * math.pi * 440 * at)[None])
    assert got.shape == (1, 336, 376)
    inner = got[0, :, 100:-100]
    assert (inner.argmax(0) == 180).all()
    assert inner.max() == pytest.approx(30.6, abs=0.1)
    assert frequencies(336, 48, 32.7)[180] == pytest.approx(440, rel=1e-2)
    assert torch.allclose(transform(3 * torch.sin(2 * math.pi * 440 * at)[None]), 3 * got, rtol=0, atol=1e-5 * 90)


def test_linearity():
    transform = CQT(RATE, hop=64, output="complex", dtype=torch.float64, **SMALL)
    one, two = (torch.from_numpy(noise(5000, seed)).double()[None] for seed in (1, 2))
    assert torch.allclose(transform(2 * one - 3 * two), 2 * transform(one) - 3 * transform(two), rtol=0, atol=1e-12)


def test_multirate_is_as_near_to_direct_as_it_says():
    """The wavelets that multirate really applies, by their gradient, beside the true ones, at every frequency."""
    hop, samples = 320, 320 * 240
    layout = {"hop": hop, "bins": 336, "bins_per_octave": 48, "output": "complex", "dtype": torch.float64}
    transforms = [CQT(RATE, method=method, **layout) for method in ("direct", "multirate")]
    wave = torch.zeros(1, samples, dtype=torch.float64, requires_grad=True)
    pairs = []
    for transform in transforms:
        middle = transform._frames(wave, 120, 121)[0, :, 0]
        parts = []
        for bin_ in (0, 37, 100, 166, 215, 263, 290, 311, 335):
            real, imaginary = (
                torch.autograd.grad(part, wave, retain_graph=True)[0][0]
                for part in (middle[bin_].real, middle[bin_].imag)
            )
            parts.append(torch.complex(real, imaginary))
        pairs.append(torch.stack(parts))
    true, applied = pairs
    spectra = torch.fft.fft(true).abs().amax(1, keepdim=True)
    assert (torch.fft.fft(applied - true).abs() / spectra).max() <= 1e-6
    assert ((applied - true).norm(dim=1) / true.norm(dim=1)).max() <= 3e-6
    assert not torch.equal(applied, true)


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("filter_scale", [0.5, 1.7])
def test_norm_and_filter_scale_are_librosas(norm, filter_scale):
    wave, frames = noise(RATE), range(0, 90, 7)
    expected = direct_products(wave, 256, 30, 12, frames, fmin=220.0, norm=norm, filter_scale=filter_scale)
    settings = {**SMALL, "norm": norm, "filter_scale": filter_scale, "output": "complex"}
    for method in ("direct", "multirate"):
        got = run(CQT(RATE, hop=256, method=method, **settings), wave)
        assert of_maximum(got[:, frames], expected).max() <= 2e-5


def test_without_norm_wavelets_are_bare_windowed_tones():
    wave = noise(RATE)
    bare, normed = (run(CQT(RATE, hop=256, norm=norm, **SMALL), wave) for norm in (None, math.inf))
    assert np.allclose(bare, normed, rtol=1e-2)  # a Hann window reaches 1 but for its sampling


def test_float64_and_its_magnitude():
    wave = noise(RATE).astype(np.float64)
    frames = range(0, 90, 9)
    expected = direct_products(wave, 256, 30, 12, frames, fmin=220.0)
    got = cqt(torch.from_numpy(wave), RATE, hop=256, method="direct", output="complex", **SMALL)
    assert got.dtype == torch.complex128
    assert of_maximum(got[:, frames], expected).max() <= 1e-12
    size = cqt(torch.from_numpy(wave), RATE, hop=256, method="direct", **SMALL)
    assert size.dtype == torch.float64
    assert torch.allclose(size, got.abs(), rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# lengths, rows, chunks


@pytest.mark.parametrize("method", ["direct", "multirate"])
@pytest.mark.parametrize("hop", [1, 7, 64, 160, 321, 500])
def test_number_of_frames_at_any_hop_and_of_tiny_sounds(hop, method):
    """Most of the filters are longer than these sounds."""
    transform = CQT(RATE, hop=hop, method=method, output="complex", **SMALL)
    for samples in sorted({0, 1, hop - 1, hop, hop + 1, 3 * hop + 2}):
        wave = noise(samples)
        got = run(transform, wave)
        assert got.shape == (30, 1 + samples // hop) == (30, transform.num_frames(samples))
        expected = direct_products(wave, hop, 30, 12, range(got.shape[1]), fmin=220.0)
        assert np.abs(got - expected).max() <= 2e-5 * max(np.abs(expected).max(), 0.1)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    hop=st.sampled_from([64, 75, 96]),
    method=st.sampled_from(["direct", "multirate"]),
    seed=st.integers(0, 1000),
)
def test_a_row_is_the_same_alone_and_in_a_batch(lengths, hop, method, seed):
    transform = CQT(RATE, hop=hop, method=method, **SMALL)
    batch = torch.full((len(lengths), 3000), 9.0)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.from_numpy(noise(length, seed + row))
    got = transform(batch, torch.tensor(lengths))
    counts = transform.frame_lengths(torch.tensor(lengths)).tolist()
    assert got.shape == (len(lengths), 30, transform.num_frames(3000))
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        alone = transform(batch[row : row + 1, :length])[0]
        assert alone.shape[1] == count
        assert torch.allclose(got[row, :, :count], alone, rtol=0, atol=1e-5)
        assert got[row, :, count:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["direct", "multirate"])
def test_chunks_do_not_show_and_bound_the_memory(method, dtype, monkeypatch):
    transform = CQT(RATE, hop=96, method=method, dtype=dtype, **SMALL)
    wave = torch.from_numpy(noise(80_000)).reshape(2, -1)
    whole = transform(wave)
    widths, laid_out = [], []
    products = module._products

    def watched(signal, kernel, hop):
        widths.append(signal.shape[1])
        return products(signal, kernel, hop)

    monkeypatch.setattr(module, "_products", watched)
    monkeypatch.setattr(module, "_CHUNK", 100)
    monkeypatch.setattr(module, "_TILE", 5000)
    reach = sum(transform.reach)
    for part in (wave, wave.repeat(1, 3)):
        widths.clear()
        got = transform(part)
        laid_out.append(max(widths))
        assert len(widths) > 20
        assert max(widths) <= 3 * reach + 96 + 500
    assert laid_out[0] == laid_out[1], "three times as long takes no more at a time"
    assert torch.allclose(transform(wave), whole, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)
    assert got.shape[2] == 1 + 120_000 // 96


def test_a_frame_depends_on_its_reach_only():
    transform = CQT(RATE, hop=64, **SMALL)
    before, behind = transform.reach
    wave = torch.from_numpy(noise(20_000))[None]
    other = torch.from_numpy(noise(20_000, 1))[None]
    centre = 150 * 64
    other[:, centre - before : centre + behind + 1] = wave[:, centre - before : centre + behind + 1]
    assert torch.allclose(transform(wave)[..., 150], transform(other)[..., 150], rtol=0, atol=1e-6)


def test_an_empty_batch():
    for output, dtype in (("magnitude", torch.float32), ("complex", torch.complex64)):
        got = CQT(RATE, hop=64, output=output, **SMALL)(torch.zeros(0, 640))
        assert got.shape == (0, 30, 11)
        assert got.dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# as a module


@pytest.mark.parametrize("method", ["direct", "multirate"])
@pytest.mark.parametrize("output", ["magnitude", "complex"])
def test_gradients(method, output):
    transform = CQT(
        RATE, hop=64, fmin=900.0, bins=6, bins_per_octave=3, method=method, output=output, dtype=torch.float64
    )  # fmt: skip
    wave = torch.from_numpy(noise(2 * 150)).double().reshape(2, 150).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transform(x, torch.tensor([150, 90])), wave)


def test_gradients_of_float32_are_those_of_float64_and_silence_has_none():
    wave = torch.from_numpy(noise(4000))[None]
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = wave.to(dtype, copy=True).requires_grad_()
        CQT(RATE, hop=96, dtype=dtype, **SMALL)(leaf).square().sum().backward()
        found.append(leaf.grad.double())
    assert torch.allclose(*found, rtol=0, atol=1e-4 * float(found[1].abs().max()))
    silence = torch.zeros(1, 4000, requires_grad=True)
    CQT(RATE, hop=96, **SMALL)(silence).sum().backward()
    assert torch.equal(silence.grad, torch.zeros(1, 4000))


def test_filters_are_neither_saved_nor_trained_and_move_along():
    transform = CQT(RATE, hop=320, **SMALL)
    assert not transform.state_dict()
    assert not list(transform.parameters())
    assert len(list(transform.buffers())) > 1
    assert all(buffer.device.type == "meta" for buffer in CQT(RATE, hop=320, **SMALL).to("meta").buffers())


def test_autocast_does_not_reach_the_filters():
    transform, wave = CQT(RATE, hop=96, **SMALL), torch.from_numpy(noise(4000))[None]
    with torch.autocast("cpu", torch.bfloat16):
        got = transform(wave)
    assert torch.equal(got, transform(wave))
    assert torch.allclose(transform(wave.bfloat16()), got, rtol=0, atol=0.02)


def test_the_function_builds_filters_once():
    wave = torch.from_numpy(noise(4000))
    module._shared.cache_clear()
    first = cqt(wave, RATE, hop=96, **SMALL)
    second = cqt(wave[None], RATE, hop=96, **SMALL)
    assert module._shared.cache_info().misses == 1
    assert torch.equal(first, second[0])
    assert torch.equal(first, CQT(RATE, hop=96, **SMALL)(wave[None])[0])
    with torch.inference_mode():
        cqt(wave, RATE, hop=75, **SMALL)
    leaf = wave.clone().requires_grad_()
    cqt(leaf, RATE, hop=75, **SMALL).sum().backward()
    assert leaf.grad.abs().sum() > 0
    rows = cqt(wave.repeat(2, 1), RATE, hop=96, lengths=torch.tensor([4000, 100]), **SMALL)
    assert rows[1, :, 2:].abs().sum() == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bins": 110}, "fewer bins"),
        ({"fmin": 12000.0, "bins": 1}, "fewer bins"),
        ({"hop": 0}, "positive hop"),
        ({"hop": 12.5}, "whole number"),
        ({"bins": 0}, "positive bins"),
        ({"bins_per_octave": -1}, "positive bins_per_octave"),
        ({"fmin": 0.0}, "positive fmin"),
        ({"fmin": math.nan}, "positive fmin"),
        ({"filter_scale": 0.0}, "positive filter_scale"),
        ({"norm": 0.0}, "math.inf"),
        ({"method": "fast"}, "direct"),
        ({"wavelets": "morlet"}, "nnaudio"),
        ({"output": "phase"}, "complex"),
        ({"dtype": torch.float16}, "float64"),
    ],
)
def test_wrong_settings_say_what_to_do(settings, said):
    with pytest.raises(InputError, match=said):
        CQT(RATE, **settings)


def test_wrong_waves_say_what_to_do():
    transform = CQT(RATE, hop=96, **SMALL)
    for wave in (torch.zeros(100), torch.zeros(1, 1, 100), torch.zeros(1, 100, dtype=torch.int16)):
        with pytest.raises(InputError, match=r"float \[batch, samples\]"):
            transform(wave)
    with pytest.raises(InputError, match="lengths"):
        transform(torch.zeros(1, 100), torch.tensor([100, 100]))
    with pytest.raises(InputError, match="float32"):
        transform.half()(torch.zeros(1, 100))
    with pytest.raises(InputError, match="the dtype is that of the wave"):
        cqt(torch.zeros(1, 100), RATE, dtype=torch.float64, **SMALL)
    with pytest.raises(InputError, match="lengths are of the rows"):
        cqt(torch.zeros(100), RATE, lengths=torch.tensor([100]), **SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# the encoder


SETTINGS = CqtConfig(16000, hop=160, bins=48, bins_per_octave=12, fmin=110.0)


@pytest.fixture(scope="module")
def encoder() -> CqtEncoder:
    return CqtEncoder(SETTINGS)


def test_facts_of_the_encoder(encoder):
    assert (encoder.type, encoder.dim, encoder.layer) == ("cqt", 48, None)
    assert (encoder.sample_rate, encoder.hop, encoder.receptive_field) == (16000, 160, 1)
    assert encoder.exact_stream
    assert not encoder.state_dict()
    assert encoder.grid.centre_seconds(0) == 0
    assert encoder.grid.centre_seconds(7) == pytest.approx(0.07)
    whole = CqtEncoder()
    assert (whole.sample_rate, whole.hop, whole.dim) == (24000, 320, 336)
    assert whole.config_dict()["bins_per_octave"] == 48
    assert 1.0 < whole.look_ahead / whole.sample_rate < 1.3
    with pytest.raises(InputError, match="no layers"):
        CqtEncoder(layer=3)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 1), (160, 1), (161, 2), (320, 2), (1600, 10), (1601, 11)])
def test_frame_counts_of_the_encoder(encoder, samples, frames):
    out = encoder(torch.from_numpy(noise(samples))[None])
    assert out.features.shape == (1, frames, 48)
    assert out.lengths.tolist() == [frames] == [encoder.grid.num_frames(samples)]


def test_frames_are_those_of_the_transform_at_their_times(encoder, clip_wave):
    frames = encoder(torch.from_numpy(clip_wave)[None]).features[0]
    full = cqt(torch.from_numpy(clip_wave), 16000, hop=160, bins=48, bins_per_octave=12, fmin=110.0)
    assert torch.allclose(frames, full.mT.log1p()[: len(frames)], rtol=0, atol=1e-5)
    click = torch.zeros(1, 16000)
    click[0, 8000] = 1
    loudest = int(encoder(click).features[0, :, -1].argmax())
    assert encoder.grid.centre_seconds(loudest) == pytest.approx(0.5, abs=0.005)


def test_rows_of_the_encoder(encoder):
    lengths = [16000, 9999, 1000, 160, 1, 0]
    batch = torch.full((len(lengths), 16000), 9.0)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.from_numpy(noise(length, row))
    out = encoder(batch, torch.tensor(lengths))
    assert out.lengths.tolist() == [100, 63, 7, 1, 1, 0]
    for row, length in enumerate(lengths):
        alone = encoder(batch[row : row + 1, :length]).features[0]
        assert torch.allclose(out.features[row, : len(alone)], alone, rtol=0, atol=1e-5)
        assert out.features[row, len(alone) :].abs().sum() == 0


def test_windows_with_context_give_the_frames_of_the_whole(encoder):
    total, core, context, grid = 300, 37, encoder.context, encoder.grid
    wave = torch.from_numpy(noise(grid.num_samples(total)))[None]
    whole = encoder(wave).features[0]
    pieces = []
    for first in range(0, total, core):
        begin, end = max(0, first - context.left), min(total, first + core + context.right)
        window = wave[:, begin * grid.hop : (end - 1) * grid.hop + grid.receptive_field]
        pieces.append(encoder(window).features[0, first - begin : first - begin + core])
    error = (torch.cat(pieces) - whole).norm(dim=1) / whole.norm(dim=1)
    assert error.max() <= encoder.rounding


def test_streams_of_the_encoder_give_the_offline_units(encoder, clip_wave):
    with torch.inference_mode():
        frames = encoder(torch.from_numpy(clip_wave)[None]).features[0]
    tokenizer = Tokenizer(encoder, KMeans(frames[::5][:50].numpy()), name="cqt", window=WindowRule(2.0, 0.3))
    offline = tokenizer.encode(clip_wave, 16000)
    assert len(offline) == encoder.grid.num_frames(len(clip_wave))
    with tokenizer.stream(16000) as stream:
        parts = [stream.push(clip_wave[begin : begin + 3777]) for begin in range(0, len(clip_wave), 3777)]
        streamed = Units.concatenate([*parts, stream.flush()])
    assert streamed == offline
