"""Decoding: many formats are right, broken ones are refused with a reason."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.audio.decode import AudioFile, as_mono, load
from speechtok.audio.wav import pcm_blocks, read_header
from speechtok.errors import AudioError

RATE = 16000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)

FORMATS = [
    ("wav", "PCM_16", 2e-4), ("wav", "PCM_24", 1e-6), ("wav", "PCM_32", 1e-6), ("wav", "PCM_U8", 2e-2),
    ("wav", "FLOAT", 1e-7), ("wav", "DOUBLE", 1e-7), ("wav", "ULAW", 3e-2),
    ("flac", "PCM_16", 2e-4), ("flac", "PCM_24", 1e-6),
    ("aiff", "PCM_16", 2e-4), ("au", "PCM_16", 2e-4), ("w64", "PCM_16", 2e-4), ("caf", "PCM_16", 2e-4),
    ("ogg", "VORBIS", 5e-2), ("ogg", "OPUS", 5e-2), ("mp3", "MPEG_LAYER_III", 5e-2),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype", "tolerance"), FORMATS)
def test_formats(tmp_path, kind, subtype, tolerance):
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, TONE, RATE, subtype=subtype, format=kind.upper())
    with AudioFile(path) as file:
        assert (file.sample_rate, file.channels) == (RATE, 1)
        wave = np.concatenate(list(file.blocks()))
        assert file.num_samples == len(wave)
    # MP3 pads its ends by its block length.
    assert abs(len(wave) - RATE) <= (2400 if kind == "mp3" else 0)
    middle = slice(4000, 12000)
    if kind == "mp3":  # the delay of the codec is not compensated by every decoder: compare spectra
        wave = wave[middle]
        assert np.argmax(np.abs(np.fft.rfft(wave))) * RATE / len(wave) == pytest.approx(440, abs=2)
    else:
        assert np.abs(wave - TONE)[middle].max() < tolerance


def test_channels_are_averaged(tmp_path):
    rng = np.random.default_rng(0)
    sound = rng.uniform(-0.5, 0.5, (2000, 8)).astype(np.float32)
    soundfile.write(tmp_path / "eight.wav", sound, 48000, subtype="FLOAT")
    with AudioFile(tmp_path / "eight.wav") as file:
        assert file.channels == 8
        np.testing.assert_allclose(np.concatenate(list(file.blocks())), sound.mean(1), atol=1e-7)
    assert len(load(tmp_path / "eight.wav", 16000)) == 667


def test_blocks_join_to_the_whole(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 600_000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", sound, 16000, subtype="FLOAT")
    with AudioFile(tmp_path / "long.wav") as file:
        blocks = list(file.blocks())
    assert len(blocks) > 2
    assert np.array_equal(np.concatenate(blocks), sound)


def test_streams_work_like_paths(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, TONE, RATE)
    assert np.array_equal(load(io.BytesIO(path.read_bytes()), RATE), load(path, RATE))


def wav(data=b"", rate=RATE, channels=1, bits=16, declared=None, tag=1):
    width = channels * bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, channels, rate, rate * width, width, bits)
    body = b"WAVE" + head + struct.pack("<4sI", b"data", len(data) if declared is None else declared) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


BROKEN = {
    "empty": (b"", "empty"),
    "header only": (wav(), "no samples"),
    "half a header": (wav()[:20], "cannot be decoded"),
    "truncated": (wav(TONE.tobytes()[:2000], declared=40_000), "truncated"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "cannot be decoded"),
    "text": (b"this is no sound at all, but a sentence\n" * 40, "cannot be decoded"),
    "zero rate": (wav(b"\0\0" * 100, rate=0), "cannot be decoded|outside"),
    "absurd rate": (wav(b"\0\0" * 100, rate=4_000_000), "cannot be decoded|outside"),
    "nan": (wav(np.array([0.1, np.nan, 0.2], "<f4").tobytes(), bits=32, tag=3), "NaN or infinite value at sample 1"),
    "infinite": (
        wav(np.array([0.1, 0.2, np.inf], "<f4").tobytes(), bits=32, tag=3),
        "NaN or infinite value at sample 2",
    ),
    "huge": (wav(np.array([0.1, 3e38], "<f4").tobytes(), bits=32, tag=3), "amplitudes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_a_reason(tmp_path, name):
    data, reason = BROKEN[name]
    path = tmp_path / "broken.wav"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=reason) as caught:
        load(path, RATE)
    assert "broken.wav" in str(caught.value)


def test_truncated_flac_is_refused(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60_000)
    soundfile.write(tmp_path / "a.flac", noise, RATE)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"truncated|damaged|decoded"):
        load(tmp_path / "cut.flac", RATE)


def test_missing_and_folder(tmp_path):
    with pytest.raises(AudioError, match="No such file"):
        load(tmp_path / "none.wav", RATE)
    with pytest.raises(AudioError, match="folder"):
        load(tmp_path, RATE)


def test_unknown_length_in_the_header_is_fine(tmp_path):
    """Writers to pipes leave 0xFFFFFFFF as the size of the samples."""
    samples = (TONE * 32767).astype("<i2").tobytes()
    path = tmp_path / "pipe.wav"
    path.write_bytes(wav(samples, declared=0xFFFFFFFF))
    assert len(load(path, RATE)) == RATE


@pytest.mark.parametrize("rate", [4000, 8000, 192000])
def test_rates(tmp_path, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "a.wav", tone, rate, subtype="FLOAT")
    assert (
        np.abs(
            load(tmp_path / "a.wav", RATE)[800:-800] - np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)[800:-800]
        ).max()
        < 1e-4
    )


def test_arrays():
    assert as_mono(np.array([[1, 3], [2, 4]], np.float64)).tolist() == [2, 3]
    assert as_mono(np.array([16384], np.int16)).tolist() == [0.5]
    for bad, reason in [
        (np.zeros(3, np.int64), "dtype"),
        (np.zeros((2, 3, 4)), "shape"),
        (np.zeros((2, 300)), "shape"),
        (np.array([np.nan]), "NaN"),
    ]:
        with pytest.raises(AudioError, match=reason):
            as_mono(bad)


PCM = [
    ("u8", "PCM_U8"),
    ("s16le", "PCM_16"),
    ("s24le", "PCM_24"),
    ("s32le", "PCM_32"),
    ("f32le", "FLOAT"),
    ("f64le", "DOUBLE"),
]


@pytest.mark.parametrize(("encoding", "subtype"), PCM)
def test_wav_through_a_pipe_equals_the_file(tmp_path, encoding, subtype):
    sound = np.random.default_rng(0).uniform(-0.9, 0.9, (3001, 2)).astype(np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(path, sound, 22050, subtype=subtype)
    with path.open("rb") as file:
        header = read_header(file, "pipe")
        assert (header.encoding, header.channels, header.sample_rate) == (encoding, 2, 22050)
        blocks = list(pcm_blocks(file, encoding, 2, 100, header.data_bytes))
    assert all(len(block) <= 100 for block in blocks)
    np.testing.assert_allclose(np.concatenate(blocks), soundfile.read(path, dtype="float32")[0], atol=1e-7)


def test_pipes_that_break_off():
    with pytest.raises(AudioError, match="no RIFF|not a RIFF"):
        read_header(io.BytesIO(b"OggS" + bytes(100)), "pipe")
    with pytest.raises(AudioError, match="header"):
        read_header(io.BytesIO(wav()[:30]), "pipe")
    with pytest.raises(AudioError, match="format chunk"):
        read_header(io.BytesIO(b"RIFF\0\0\0\0WAVEdata\0\0\0\0"), "pipe")
    with pytest.raises(AudioError, match="inside a sample"):
        list(pcm_blocks(io.BytesIO(b"abc"), "s16le", 1, 10))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=3000), st.builds(lambda a, b: wav(a) + b, st.binary(max_size=500), st.binary(max_size=50))
    )
)
def test_random_bytes_never_surprise(tmp_path, data):
    path = tmp_path / "x.wav"
    path.write_bytes(data)
    try:
        wave = load(path, RATE)
    except AudioError as error:
        assert "x.wav" in str(error)
    else:
        assert np.isfinite(wave).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["wav", "flac", "ogg", "mp3", "aiff"]), seed=st.integers(0, 10**6))
def test_damaged_files_never_surprise(tmp_path, kind, seed):
    """Flip bytes of a valid file: it decodes to something finite, or is refused by name."""
    path = tmp_path / f"x.{kind}"
    soundfile.write(path, TONE[:8000], RATE)
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for position in rng.integers(0, len(data), rng.integers(1, 30)):
        data[position] = rng.integers(256)
    path.write_bytes(data)
    try:
        wave = load(path, RATE)
    except AudioError as error:
        assert f"x.{kind}" in str(error)
    else:
        assert np.isfinite(wave).all()
