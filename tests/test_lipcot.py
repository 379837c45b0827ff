"""LiPCoT: frames against librosa, silence, batches, streams, any rate; filters of units, whispered sound, fitting."""

import json
import random
from dataclasses import replace

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok import hub
from speechtok.audio.lpc import is_stable, lpc_to_reflection, power_spectrum
from speechtok.codecs.build import inverse
from speechtok.codecs.lipcot import LipcotWaves
from speechtok.encoders.lipcot import Feature, LipcotConfig, LipcotEncoder, features_of, filters_of
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.pretrained import from_pretrained
from speechtok.errors import AudioError, FormatError, InputError
from speechtok.evaluation.verify import in_batches, random_pieces, streamed_together
from speechtok.frames import Context, WindowRule
from speechtok.kernels.burg import burg
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

FEATURES = Feature.__args__
ALL = pytest.mark.parametrize("feature", FEATURES)


def noise(samples, seed=0):
    """Noise whose spectrum and level change every 50 ms, float32 [N]."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(samples // 800 + 1):
        pole = rng.uniform(0.5, 0.98) * np.exp(1j * rng.uniform(0, 3))
        piece = scipy.signal.lfilter([1.0], np.poly([pole, pole.conj()]).real, rng.standard_normal(800))
        pieces.append(piece * 10 ** rng.uniform(-3, -1.5))
    return np.concatenate(pieces)[:samples].astype(np.float32)


def frames_of(encoder, wave):
    with torch.inference_mode():
        return encoder(torch.from_numpy(wave)[None]).features[0]


def made(wave, config=None, clusters=60, **options):
    """A tokenizer with frames of a wave, silence among them, as centroids."""
    encoder = LipcotEncoder(config)
    frames = frames_of(encoder, np.concatenate([wave, np.zeros(encoder.receptive_field, np.float32)])).numpy()
    chosen = np.linspace(0, len(frames) - 1, clusters).astype(int)
    options = {"name": "lipcot", "window": WindowRule(2.0, 0.3), "decoder": LipcotWaves(encoder.config)} | options
    return Tokenizer(encoder, KMeans(frames[chosen]), **options)


@pytest.fixture(scope="module")
def tokenizer():
    return made(noise(64000))


# ---------------------------------------------------------------------------------------------------------------------
# frames


def test_facts():
    encoder = LipcotEncoder()
    assert (encoder.type, encoder.dim, encoder.layer, encoder.context) == ("lipcot", 13, None, Context(0, 0))
    assert (encoder.sample_rate, encoder.hop, encoder.receptive_field, encoder.look_ahead) == (16000, 320, 400, 0)
    assert encoder.exact_stream
    assert not encoder.state_dict()
    dims = {feature: LipcotEncoder(LipcotConfig(feature=feature, order=9)).dim for feature in FEATURES}
    assert dims == {"lpc": 10, "lar": 10, "lsf": 10, "cepstrum": 10, "poles": 19}
    assert LipcotEncoder(LipcotConfig(gain=0)).dim == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0), ("sample_rate", 16000.0), ("window", 12), ("hop", 0), ("order", 400), ("order", True),
        ("warp", 1), ("warp", "0.5"), ("warp", float("nan")), ("gain", -0.1), ("gain", float("inf")), ("floor", 0),
        ("feature", "mel"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=f"{field}"):
        LipcotConfig(**{field: value})


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="no layers"):
        LipcotEncoder(layer=2)
    with pytest.raises(InputError, match=r"no setting 'bins'; known are sample_rate, window, hop"):
        from_pretrained("lipcot", settings={"bins": 3})
    with pytest.raises(InputError, match=r"only cqt, lipcot, mfcc have settings"):
        from_pretrained("somebody/something", settings={"order": 3})
    assert from_pretrained("lipcot", settings={"order": 3}).config == LipcotConfig(order=3)


@pytest.mark.parametrize(("window", "hop"), [(400, 320), (50, 160), (7, 1)])
def test_frame_counts(window, hop):
    encoder = LipcotEncoder(LipcotConfig(window=window, hop=hop, order=4))
    edges = {0, 1, hop - 1, hop, hop + 1, window - 1, window, window + 1, window + hop - 1, window + hop}
    for samples in sorted(edges):
        out = encoder(torch.from_numpy(noise(samples))[None])
        expected = (samples - window) // hop + 1 if samples >= window else 0
        assert out.features.shape == (1, expected, 5)
        assert out.lengths.tolist() == [expected]
        assert out.features.dtype == torch.float32
    assert encoder(torch.zeros(0, 1000)).features.shape[::2] == (0, 5)


def test_lpc_frames_are_librosas():
    wave, config = noise(20000), LipcotConfig(feature="lpc", warp=0, order=12, gain=0.5)
    found = frames_of(LipcotEncoder(config), wave).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64), 400)[::320].copy()
    expected = librosa.lpc(windows, order=12)[:, 1:]
    assert np.abs(found[:, :-1] - expected).max() < 1e-6 * np.abs(expected).max()
    for frame, a, window in zip(found, expected, windows, strict=True):
        left = np.convolve(window, [1, *a], "valid")
        assert frame[-1] == pytest.approx(0.5 * np.log10(np.mean(left**2)), abs=0.05)


def test_cepstrum_frames_are_those_of_the_log_spectrum():
    wave, config = noise(20000), LipcotConfig(warp=0, order=10)
    windows = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64), 400)[::320].copy()
    filters = librosa.lpc(windows, order=10)
    cepstrum = np.fft.ifft(-2 * np.log(np.abs(np.fft.fft(filters, 8192)))).real[:, 1:11]
    found = frames_of(LipcotEncoder(config), wave).numpy()[:, :-1]
    assert np.abs(found - np.sqrt(np.arange(1, 11)) * cepstrum).max() < 1e-5


@ALL
@pytest.mark.parametrize("warp", [0.0, 0.58])
def test_frames_go_back_to_their_filters(feature, warp):
    config = LipcotConfig(feature=feature, warp=warp, order=16, gain=2.0)
    rows = torch.from_numpy(noise(30000)).double().unfold(0, 400, 320)
    lpc, variance, reflection = burg(rows, 16, warp)
    again, level = filters_of(features_of(reflection, variance, config), config)
    torch.testing.assert_close(level, variance, rtol=1e-9, atol=0)
    angles = torch.linspace(0, torch.pi, 200, dtype=torch.float64)
    expected = power_spectrum(lpc, variance, angles, warp)
    torch.testing.assert_close(power_spectrum(again, level, angles, warp), expected, rtol=1e-2, atol=0)


@ALL
def test_means_of_frames_are_stable_filters(feature):
    config = LipcotConfig(feature=feature)
    frames = frames_of(LipcotEncoder(config), noise(64000))
    shares = torch.rand(100, len(frames), generator=torch.Generator().manual_seed(0)) ** 40
    lpc, variance = filters_of((shares / shares.sum(1, keepdim=True)) @ frames, config)
    wild, _ = filters_of(30 * torch.randn(50, config.dim, generator=torch.Generator().manual_seed(1)), config)
    assert bool(is_stable(lpc).all())
    assert bool(is_stable(wild).all())
    assert bool((variance > 0).all())


@ALL
def test_gain_is_the_last_dimension(feature):
    wave = noise(20000)
    encoder = LipcotEncoder(LipcotConfig(feature=feature, gain=1.5))
    one, two = frames_of(encoder, wave), frames_of(encoder, 10 * wave)
    torch.testing.assert_close(two[:, :-1], one[:, :-1], rtol=0, atol=1e-3)
    torch.testing.assert_close(two[:, -1] - one[:, -1], torch.full((len(one),), 3.0), rtol=0, atol=1e-5)
    without = LipcotEncoder(LipcotConfig(feature=feature, gain=0))
    assert torch.equal(frames_of(without, wave), one[:, :-1])


@ALL
def test_silence_is_one_frame(feature):
    encoder = LipcotEncoder(LipcotConfig(feature=feature, warp=0.58))
    rng = np.random.default_rng(0)
    faint = [0 * rng.standard_normal(400), 1e-5 * rng.standard_normal(400), 2e-5 * np.sin(np.arange(400))]
    frames = torch.cat([frames_of(encoder, wave.astype(np.float32)) for wave in faint])
    assert bool(frames.isfinite().all())
    assert torch.equal(frames[0].expand_as(frames), frames)
    assert float(frames[0, -1]) == -9
    louder = frames_of(encoder, (1e-3 * rng.standard_normal(400)).astype(np.float32))
    assert float((louder[0] - frames[0]).norm()) > 1


@ALL
@pytest.mark.parametrize("warp", [0.0, 0.58])
def test_frames_of_odd_sounds_are_finite(feature, warp):
    at = np.arange(2000)
    impulse = (at == 500).astype(float)
    waves = [at >= 0, at % 2 - 0.5, impulse, np.sin(0.2 * at), np.sign(np.sin(0.1 * at)), (at > 700) / 32768, 1e5 * at]
    encoder = LipcotEncoder(LipcotConfig(feature=feature, warp=warp, order=16))
    for wave in waves:
        frames = frames_of(encoder, wave.astype(np.float32))
        lpc, variance = filters_of(frames, encoder.config)
        assert bool(frames.isfinite().all())
        assert bool(lpc.isfinite().all())
        assert bool((variance.isfinite() & is_stable(lpc)).all())


# ---------------------------------------------------------------------------------------------------------------------
# batches and streams


@ALL
def test_a_row_is_the_same_alone_and_in_a_batch(feature):
    lengths = [16000, 9999, 1000, 400, 399, 0]
    batch = torch.full((len(lengths), 16000), 9.0)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.from_numpy(noise(length, row))
    encoder = LipcotEncoder(LipcotConfig(feature=feature))
    out = encoder(batch, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = frames_of(encoder, noise(length, row))
        count = len(alone)
        assert out.lengths[row] == count
        error = (out.features[row, :count] - alone).norm(dim=-1) / alone.norm(dim=-1)
        assert not count or float(error.max()) < encoder.rounding / 10
        assert out.features[row, count:].abs().sum() == 0


def test_a_frame_depends_on_its_window_alone():
    encoder, wave = LipcotEncoder(), noise(8000)
    other = noise(8000, seed=1)
    other[10 * 320 : 10 * 320 + 400] = wave[10 * 320 : 10 * 320 + 400]
    changed = (frames_of(encoder, other) - frames_of(encoder, wave)).norm(dim=-1)
    assert (changed == 0).nonzero().tolist() == [[10]]


def test_batched_is_single_and_streamed_is_offline(tokenizer):
    waves = [noise(n, seed) for seed, n in enumerate([0, 399, 400, 719, 720, 16000, 32001, 70000])]
    waves.append(np.concatenate([noise(9000, 9), np.zeros(5000, np.float32), noise(700, 10)]))
    single = [tokenizer.encode(wave, 16000) for wave in waves]
    assert [len(units) for units in single[:5]] == [0, 0, 1, 1, 2]
    assert tokenizer.encode_batch(waves, 16000) == single
    for size in (2, 5):
        assert in_batches(tokenizer, [(wave, 16000) for wave in waves], size)[0] == single
    assert streamed_together(tokenizer, [(wave, 16000) for wave in waves], 4, random.Random(0))[0] == single
    for rate in (8000, 16000, 44100):
        chance = random.Random(rate)
        with tokenizer.stream(rate) as stream:
            parts = [stream.push(piece) for piece in random_pieces(waves[-1], rate, chance)]
            parts.append(stream.flush())
        assert Units.concatenate(parts) == tokenizer.encode(waves[-1], rate)


def test_a_stream_waits_for_one_window(tokenizer):
    with tokenizer.stream(16000) as stream:
        assert stream.latency_seconds == 400 / 16000
        assert len(stream.push(noise(399))) == 0
        assert len(stream.push(noise(1))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# any rate


@pytest.mark.parametrize("rate", [1, 500, 192_000])
def test_series_of_any_rate(rate):
    """Arrays at the tokenizer's own rate are not resampled, so no rate is too low for them."""
    config = LipcotConfig(sample_rate=rate, window=64, hop=32, order=8, warp=0.2, floor=1e-20)
    series = 1e-6 * noise(9000)  # volts
    tokenizer = made(series, config, window=WindowRule(3600, 0))
    units = tokenizer.encode(series, rate)
    assert len(units) == (9000 - 64) // 32 + 1
    assert len(np.unique(units.ids)) > 20
    assert units.starts_seconds[1] - units.starts_seconds[0] == pytest.approx(32 / rate)
    assert tokenizer.encode_batch([series, series[:200]], rate) == [units, tokenizer.encode(series[:200], rate)]
    with tokenizer.stream() as stream:
        parts = [*map(stream.push, np.array_split(series, 50)), stream.flush()]
    assert Units.concatenate(parts) == units
    wave = tokenizer.decode(units)
    assert len(wave) == 32 * len(units)
    assert np.sqrt(np.mean(wave**2)) == pytest.approx(np.sqrt(np.mean(series**2)), rel=0.3)
    if rate == 1:
        with pytest.raises(AudioError, match="outside"):
            tokenizer.encode(series, 2)


# ---------------------------------------------------------------------------------------------------------------------
# from units to spectra and sound


@pytest.mark.parametrize(("window", "hop"), [(400, 320), (400, 160), (401, 100), (100, 300), (7, 3), (64, 64)])
def test_powers_of_overlapping_windows_add_up(window, hop):
    waves = LipcotWaves(LipcotConfig(window=window, hop=hop, order=3))
    total = np.zeros(30 * hop + waves.size)
    for frame in range(30):
        total[frame * hop : frame * hop + waves.size] += waves.fade.numpy() ** 2
    assert np.abs(total[waves.size : 29 * hop] - 1).max() < 1e-12
    assert waves.fade.min() > 0


@pytest.mark.parametrize("warp", [0.0, 0.58])
def test_decoded_noise_has_the_spectrum_and_power_of_its_frames(warp):
    encoder = LipcotEncoder(LipcotConfig(order=6, warp=warp))
    rng, bottom = np.random.default_rng(0), np.poly([0.9 * np.exp(0.5j), 0.9 * np.exp(-0.5j)]).real
    sound = scipy.signal.lfilter([0.02], bottom, rng.standard_normal(400 + 320 * 999)).astype(np.float32)
    waves = inverse(encoder)
    frames = frames_of(encoder, sound)
    mean = frames.mean(0, keepdim=True)
    decoded = waves(mean.expand(1, 1000, -1))[0].double()
    assert decoded.shape == (320_000,)
    at = torch.linspace(0.02, 3.1, 60, dtype=torch.float64)
    lpc, variance, _ = burg(decoded[None, 400:], 12)
    truth = 0.02**2 / np.abs(scipy.signal.freqz(bottom, 1, at.numpy())[1]) ** 2
    ratio = power_spectrum(lpc, variance, at)[0].numpy() / truth
    assert np.abs(10 * np.log10(ratio)).max() < 1.5
    spectrum = waves.spectrum(mean, 4001)[0]
    assert spectrum.shape == (4001,)
    assert float(decoded[400:].square().mean()) == pytest.approx(float(spectrum.mean()), rel=0.05)
    assert float(spectrum.mean()) == pytest.approx(float(np.mean(sound**2)), rel=0.1)


def test_without_gain_all_sounds_are_equally_loud():
    config = LipcotConfig(gain=0)
    wave = np.concatenate([noise(32000), np.zeros(8000, np.float32)])
    tokenizer = made(wave, config)
    units = tokenizer.encode(wave, 16000)
    assert tokenizer.encode(3 * wave, 16000) == units
    power = tokenizer.decode(units).reshape(-1, 320)[2:].astype(float) ** 2
    assert power.mean() == pytest.approx(0.01, rel=0.1)
    assert tokenizer.decoder.spectrum(frames_of(tokenizer.encoder, wave), 20001).mean(-1).std() < 1e-3


def test_decoded_sound_follows_the_units(tokenizer):
    wave = np.concatenate([noise(32000), np.zeros(16000, np.float32)])
    units = tokenizer.encode(wave, 16000)
    sound = tokenizer.decode(units)
    assert (sound.shape, sound.dtype) == ((320 * len(units),), np.float32)
    assert np.array_equal(sound, tokenizer.decode(units))
    assert np.abs(sound[33000:]).max() < 1e-3
    loud, heard = (np.log10(np.square(x[: 320 * 100]).reshape(100, 320).mean(1)) for x in (wave[40:], sound))
    assert np.corrcoef(loud, heard)[0, 1] > 0.7
    again = tokenizer.encode(sound, 16000)
    assert len(again) == len(units) - 1
    level = tokenizer.quantizer.centroids[:, -1].numpy()
    assert np.abs(level[again.ids] - level[units.ids[:-1]]).mean() < 0.25


def test_sound_is_the_same_however_units_come(tokenizer):
    units = tokenizer.encode(noise(50000), 16000)
    expected = tokenizer.decode(units)
    chance = random.Random(0)
    with tokenizer.decoder_stream() as stream:
        parts, at = [], 0
        while at < len(units):
            step = chance.randint(1, 20)
            parts.append(stream.push(part(units, at, step)))
            at += step
        parts.append(stream.flush())
    assert np.array_equal(np.concatenate(parts), expected)
    frames = tokenizer.quantizer.decode(torch.from_numpy(units.ids)[None, None])
    assert np.abs(tokenizer.decoder(frames)[0].numpy() - expected).max() < 1e-6
    pair = tokenizer.decoder(torch.cat([frames, frames.flip(1)]))
    torch.testing.assert_close(pair[0], tokenizer.decoder(frames)[0], rtol=0, atol=1e-7)
    assert not torch.equal(pair[0], pair[1])


def part(units, first, count):
    kept = slice(first, first + count)
    return replace(units, ids=units.ids[kept], starts=units.starts[kept], ends=units.ends[kept])


def test_noise_of_different_frames_has_nothing_in_common(tokenizer):
    frames = frames_of(tokenizer.encoder, noise(400)).expand(1, 200, -1)
    sound = tokenizer.decoder(frames)[0].double().view(200, 320)[1:]
    alike = torch.corrcoef(sound) - torch.eye(199)
    assert float(alike.abs().max()) < 0.6
    assert float(alike.mean().abs()) < 0.01


def test_frames_of_ids_are_centroids():
    rng = np.random.default_rng(0)
    centroids, mean, scale = rng.standard_normal((5, 3)), rng.standard_normal(3), rng.uniform(1, 2, 3)
    ids = torch.tensor([[[4, 0, 0]], [[1, 2, 3]]])
    plain, scaled = KMeans(centroids).decode(ids), KMeans(centroids, mean, scale).decode(ids)
    assert plain.shape == (2, 3, 3)
    np.testing.assert_allclose(plain[1, 2], centroids[3], rtol=1e-6)
    np.testing.assert_allclose(scaled[0, 0], centroids[4] * scale + mean, rtol=1e-5)
    for wrong in (ids[0], ids + 1, ids - 1, ids.expand(2, 2, 3)):
        with pytest.raises(FormatError, match="ids"):
            KMeans(centroids).decode(wrong)
    with pytest.raises(FormatError, match="direction"):
        KMeans(np.eye(3), spherical=True).decode(ids[:1])


# ---------------------------------------------------------------------------------------------------------------------
# folders and commands


@ALL
def test_a_bundle_holds_the_whole_tokenizer(feature, tmp_path):
    wave = noise(20000)
    tokenizer = made(wave, LipcotConfig(feature=feature, warp=0))
    tokenizer.save(tmp_path / "bundle")
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"tokenizer.json", "quantizer.safetensors"}
    again = hub.load(tmp_path / "bundle")
    units = again.encode(wave, 16000)
    assert units == tokenizer.encode(wave, 16000)
    assert np.array_equal(again.decode(units), tokenizer.decode(units))
    assert again.encoder.config == again.decoder.config == tokenizer.encoder.config
    assert again.decoder.device == torch.device("cpu")
    path = tmp_path / "bundle" / "tokenizer.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps(text | {"decoder_config": text["decoder_config"] | {"order": 0}}))
    with pytest.raises(FormatError, match="order 0"):
        hub.load(tmp_path / "bundle")


def test_whole_numbers_make_the_same_fingerprint():
    one, two = (made(noise(9000), LipcotConfig(warp=zero), 5) for zero in (0, 0.0))
    assert one.fingerprint == two.fingerprint


def test_from_a_folder_of_speech_to_whispering(clips, clip_wave, tmp_path):
    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output

    model = tmp_path / "whisper"
    fast = ["--iterations", 5, "--restarts", 1, "--log", "quiet"]
    run("fit", clips, "-o", model, "--encoder", "lipcot", "-k", 64, "--set", "order=10", "--set", "feature=lar", *fast)
    tokenizer = hub.load(model)
    assert tokenizer.encoder.config == LipcotConfig(order=10, feature="lar")
    run("tokenize", clips, "-o", tmp_path / "units", "-t", model, "--log", "quiet")
    run("synth", tmp_path / "units", "-o", tmp_path / "wavs", "-t", model, "--log", "quiet")
    assert len(list((tmp_path / "wavs").glob("*.wav"))) == len(list(clips.iterdir()))
    sound, rate = soundfile.read(tmp_path / "wavs" / "librispeech-1688-142285-0004.wav")
    assert rate == 16000
    assert len(sound) == len(clip_wave) // 320 * 320 - (0 if len(clip_wave) % 320 >= 80 else 320)
    heard, spoken = (librosa.feature.melspectrogram(y=x, sr=16000) for x in (sound, clip_wave[40 : 40 + len(sound)]))
    assert np.corrcoef(np.log(heard + 1e-4).ravel(), np.log(spoken + 1e-4).ravel())[0, 1] > 0.8


def test_fits_that_have_no_decoder(clips, tmp_path):
    from speechtok.training.kmeans import fit

    options = {"name": "x", "iterations": 1, "restarts": 1}
    assert fit(str(clips), LipcotEncoder(), 4, spherical=True, **options)[0].decoder is None
    assert fit(str(clips), MfccEncoder(), 4, **options)[0].decoder is None
    failed = CliRunner().invoke(app, ["fit", str(clips), "-o", str(tmp_path / "x"), "--set", "order"])
    assert "FIELD=VALUE" in failed.output + str(failed.exception)


def test_reflection_of_decoded_units_is_inside(tokenizer):
    lpc, _ = filters_of(tokenizer.quantizer.centroids, tokenizer.encoder.config)
    assert float(lpc_to_reflection(lpc).abs().max()) < 1


# ---------------------------------------------------------------------------------------------------------------------
# the shipped one


def test_the_shipped_tokenizer(clip_wave):
    tokenizer = hub.load("lipcot-k256")
    assert (tokenizer.vocab_size, tokenizer.encoder.config, tokenizer.rate) == (256, LipcotConfig(), 50)
    units = tokenizer.encode(clip_wave, 16000)
    assert len(np.unique(units.ids)) > 50
    with tokenizer.stream(16000) as stream:
        parts = [stream.push(piece) for piece in random_pieces(clip_wave, 16000, random.Random(0))]
        parts.append(stream.flush())
    assert Units.concatenate(parts) == units
    wave = tokenizer.decode(units)
    assert wave.shape == (len(units) * 320,)
    assert np.isfinite(wave).all()
    power, decoded = (np.log10((x[: len(wave)].reshape(-1, 320) ** 2).mean(1) + 1e-9) for x in (clip_wave, wave))
    assert np.corrcoef(power, decoded)[0, 1] > 0.7  # loud where the speech is loud
    silence = tokenizer.encode(np.zeros(16000, np.float32), 16000)
    assert len(silence) == 49
    assert len(np.unique(silence.ids)) == 1
    assert np.abs(tokenizer.decode(silence)).max() < 1e-2
