"""Front ends against transformers, kaldi-native-fbank, torchaudio and librosa."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from speechtok.audio.features import deltas, kaldi_fbank, log_mel, mel_bank, mfcc39, normalize_bins
from speechtok.errors import AudioError

SPEECH = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "speech" / "eval" / "librispeech"
RATE = 16000


def speech(seconds: float = 10.0) -> np.ndarray:
    """Read a real clip: the first one that is long enough."""
    soundfile = pytest.importorskip("soundfile")
    for path in sorted(SPEECH.glob("*/*.flac")):
        if soundfile.info(path).duration >= seconds:
            return soundfile.read(path, dtype="float32")[0][: int(seconds * RATE)]
    pytest.skip(f"no clip of {seconds} s under {SPEECH}")


def tone() -> np.ndarray:
    rng = np.random.default_rng(0)
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) + 0.01 * rng.standard_normal(RATE)
    return wave.astype(np.float32)


def clip(name: str) -> np.ndarray:
    match name:
        case "speech":
            return speech()
        case "speech, odd frames":
            return speech()[: 400 + 160 * 300]
        case "tone + noise":
            return tone()
        case "silence":
            return np.zeros(RATE, np.float32)
        case _:
            return tone()[:720]


CLIPS = ["speech", "speech, odd frames", "tone + noise", "silence", "720 samples"]


def rows(*waves: np.ndarray, junk: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch of waves; `junk` lies behind the ends."""
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.full((len(waves), int(lengths.max())), junk)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    return batch, lengths


@pytest.fixture(scope="module")
def torchaudio() -> types.ModuleType:
    pytest.importorskip("torchaudio.compliance.kaldi")
    return sys.modules["torchaudio"]


# ---- filter bank of w2v-BERT 2.0


@pytest.mark.parametrize("name", CLIPS)
def test_normalised_fbank_is_that_of_the_published_extractor(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    wave = clip(name)
    extracted = transformers.SeamlessM4TFeatureExtractor()(wave, sampling_rate=RATE, return_tensors="pt")
    mel, counts = kaldi_fbank(*rows(wave))
    ours = normalize_bins(mel, counts)[0]
    valid = int(extracted.attention_mask.sum())
    theirs = extracted.input_features[0, :valid].reshape(-1, 80)
    assert len(ours) // 2 == valid
    # Where a bin hardly moves (silence, a steady tone) the division by its deviation magnifies the last place of the
    # log mel values, 1.9e-6, and the rounding of the extractor's float32 mean: it gives 0.003 for silence, we give 0.
    deviation = (mel[0].var(0) + 1e-7).sqrt()
    error = (ours[: len(theirs)] - theirs).abs()
    assert (error * deviation).max() <= 6e-6
    assert error[:, deviation > 0.1].max() <= 2e-5 if (deviation > 0.1).any() else name == "silence"
    if name == "silence":
        assert ours.abs().max() <= 1e-6


@pytest.mark.parametrize("name", CLIPS)
def test_fbank_is_kaldis(name: str) -> None:
    native = pytest.importorskip("kaldi_native_fbank")
    options = native.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = 8000.0
    online = native.OnlineFbank(options)
    wave = clip(name)
    online.accept_waveform(RATE, (wave * 32768.0).tolist())
    online.input_finished()
    theirs = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
    ours, counts = kaldi_fbank(*rows(wave))
    assert counts.tolist() == [len(theirs)] == [ours.shape[1]]
    # Kaldi works in float32: in bands 50 dB below the loudest of a frame (emptied by a codec, in this speech) its own
    # rounding reaches 0.01, so the bound on single values holds above that, the bound on the mean everywhere.
    error = np.abs(ours[0].numpy() - theirs)
    assert error[theirs > theirs.max(1, keepdims=True) - 12].max() <= 5e-4
    assert error.mean() <= 2e-5


def test_single_frame_is_finite_and_zero_after_normalisation() -> None:
    # The published extractor gives NaN here: the unbiased variance of one frame is 0 / 0.
    for samples in (400, 559):
        mel, counts = kaldi_fbank(*rows(tone()[:samples]))
        assert counts.tolist() == [1]
        assert normalize_bins(mel, counts).abs().max() == 0


def test_normalisation_of_silence_and_of_empty_rows_is_finite() -> None:
    mel, counts = kaldi_fbank(torch.zeros(3, 4000), torch.tensor([0, 399, 4000]))
    assert counts.tolist() == [0, 0, 23]
    assert normalize_bins(mel, counts).abs().max() <= 1e-6


# ---- MFCC


@pytest.mark.parametrize("name", CLIPS)
def test_mfcc39_is_that_of_torchaudio(name: str, torchaudio: types.ModuleType) -> None:
    wave = torch.from_numpy(clip(name))[None].double()
    cepstra = torchaudio.compliance.kaldi.mfcc(wave, sample_frequency=RATE).T
    slope = torchaudio.functional.compute_deltas(cepstra)
    theirs = torch.cat([cepstra, slope, torchaudio.functional.compute_deltas(slope)]).T
    ours, counts = mfcc39(wave, torch.tensor([wave.shape[1]]))
    assert counts.tolist() == [len(theirs)] == [ours.shape[1]]
    # torchaudio's mel filters and cosine transform are float32 even for a double wave, cepstra reach 100 and the
    # lifter multiplies by up to 12. With a float32 wave torchaudio itself is off by 5e-3 on this speech.
    assert (ours[0] - theirs).abs().max() <= 5e-4


def test_deltas_of_short_rows_repeat_the_rows_own_ends(torchaudio: types.ModuleType) -> None:
    x = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 5, 3, 2, 1, 0])
    ours = deltas(x, lengths)
    for row, length in enumerate(lengths.tolist()[:-1]):
        theirs = torchaudio.functional.compute_deltas(x[row, :length].T).T
        assert (ours[row, :length] - theirs).abs().max() <= 1e-6
    assert ours.isfinite().all()


# ---- log mel


@pytest.mark.parametrize(("scale", "area_norm"), [("slaney", True), ("htk", False)])
def test_mel_bank_is_librosas(scale: str, area_norm: bool) -> None:
    librosa = pytest.importorskip("librosa")
    theirs = librosa.filters.mel(
        sr=22050, n_fft=1024, n_mels=80, fmin=20, fmax=8000, htk=scale == "htk", norm="slaney" if area_norm else None
    )
    ours = mel_bank(80, 1024, 22050, 20.0, 8000.0, scale, area_norm)
    assert np.abs(ours.T.numpy() - theirs).max() <= 1e-7 * max(1.0, np.abs(theirs).max() * 10)


@pytest.mark.parametrize("name", ["speech", "tone + noise", "silence"])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("win_length", [1024, 640])
def test_log_mel_is_librosas(name: str, power: float, win_length: int) -> None:
    librosa = pytest.importorskip("librosa")
    wave = clip(name)
    theirs = librosa.feature.melspectrogram(
        y=wave, sr=RATE, n_fft=1024, win_length=win_length, hop_length=256, n_mels=80, power=power
    )
    ours, counts = log_mel(*rows(wave), power=power, win_length=win_length)
    assert counts.tolist() == [theirs.shape[1]] == [ours.shape[1]]
    # Both transforms are float32: bands far below the loudest of a frame carry its rounding.
    theirs = np.log(np.maximum(theirs, 1e-5))
    error = np.abs(ours[0].T.numpy() - theirs)
    assert error.max() <= 4e-3 * power
    assert error[theirs > theirs.max(0, keepdims=True) - 6 * power].max() <= 1e-4


def test_log_mel_reflects_each_row_at_its_own_ends() -> None:
    librosa = pytest.importorskip("librosa")
    waves = [tone(), tone()[:5000], tone()[:700]]
    ours, counts = log_mel(*rows(*waves, junk=9.0), padding=384, pad_mode="reflect")
    for row, wave in enumerate(waves):
        theirs = librosa.feature.melspectrogram(
            y=np.pad(wave, 384, mode="reflect"), sr=RATE, n_fft=1024, hop_length=256, n_mels=80, power=1, center=False
        )
        assert counts[row] == theirs.shape[1] == len(wave) // 256
        assert np.abs(ours[row, : counts[row]].T.numpy() - np.log(np.maximum(theirs, 1e-5))).max() <= 1e-4


def test_log_mel_of_silence_has_finite_gradients() -> None:
    wave = torch.zeros(1, 4000, requires_grad=True)
    log_mel(wave, torch.tensor([4000]))[0].sum().backward()
    assert wave.grad is not None and wave.grad.isfinite().all()


def test_filters_made_in_inference_mode_serve_training() -> None:
    bins = 37  # not used elsewhere, so that nothing is cached
    with torch.inference_mode():
        log_mel(torch.zeros(1, 4000), torch.tensor([4000]), bins=bins)
    wave = torch.randn(1, 4000, requires_grad=True)
    log_mel(wave, torch.tensor([4000]), bins=bins)[0].sum().backward()


# ---- all of them


@pytest.mark.parametrize("front", [kaldi_fbank, mfcc39, log_mel])
def test_a_row_is_the_same_alone_and_in_a_batch(front) -> None:
    waves = [tone(), tone()[:5000], tone()[:720], tone()[:400], tone()[:399], tone()[:0]]
    batch, counts = front(*rows(*waves, junk=9.0))
    for row, wave in enumerate(waves):
        alone, count = front(*rows(wave))
        assert count.item() == counts[row]
        if count:
            assert (batch[row, : counts[row]] - alone[0]).abs().max() <= 1e-5
        assert batch[row, counts[row] :].abs().sum() == 0


def test_normalisation_is_the_same_alone_and_in_a_batch() -> None:
    waves = [tone(), tone()[:5000], tone()[:720]]
    mel, counts = kaldi_fbank(*rows(*waves, junk=9.0))
    batch = normalize_bins(mel, counts)
    for row, wave in enumerate(waves):
        alone = normalize_bins(*kaldi_fbank(*rows(wave)))
        assert (batch[row, : counts[row]] - alone[0]).abs().max() <= 1e-5
        assert batch[row, counts[row] :].abs().sum() == 0


@pytest.mark.parametrize("front", [kaldi_fbank, mfcc39, log_mel])
def test_wrong_shapes_are_named(front) -> None:
    with pytest.raises(AudioError, match="lengths"):
        front(torch.zeros(4000), torch.tensor([4000]))
    with pytest.raises(AudioError, match="lengths"):
        front(torch.zeros(2, 4000), torch.tensor([4000]))


def test_wrong_settings_are_named() -> None:
    wave = torch.zeros(1, 4000), torch.tensor([4000])
    with pytest.raises(AudioError, match="16000 Hz"):
        log_mel(*wave, high=9000.0)
    with pytest.raises(AudioError, match="win_length"):
        log_mel(*wave, win_length=2048)
