"""Codecs measured by their sound, a stand-in whose answers are known and a random one, through the command too."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from speechtok.cli import app
from typer.testing import CliRunner

import speechtok
from speechtok.audio.decode import load
from speechtok.audio.lossy import packet_sizes, through_opus
from speechtok.codecs.lipcot import LipcotWaves
from speechtok.codecs.seanet import SeanetWaves
from speechtok.encoders.lipcot import LipcotConfig, LipcotEncoder
from speechtok.encoders.seanet import SeanetFrames
from speechtok.errors import FormatError, InputError, OutputError
from speechtok.evaluation.codec import evaluate
from speechtok.evaluation.spectrograms import draw_spectrograms
from speechtok.frames import FrameGrid
from speechtok.nn.seanet import SeanetConfig
from speechtok.quantizers.kmeans import KMeans
from speechtok.quantizers.residual import ResidualQuantizer
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

pytest.importorskip("pesq", reason="pesq is not installed: it needs a C compiler")

RATE = 24000


@dataclass
class Bits:
    """A codec of one sample a frame: each codebook adds two bits to a sample, so each is worth 12 dB."""

    codebooks: int = 4
    delay: int = 0
    name: str = "bits"
    vocab_size: int = 4
    sample_rate: int = RATE
    fingerprint: str = "0" * 32

    @property
    def encoder(self) -> SimpleNamespace:
        return SimpleNamespace(grid=FrameGrid(RATE, 1, 1), hop=1)

    def with_codebooks(self, count: int) -> "Bits":
        if not 1 <= count <= self.codebooks:
            raise InputError(f"{count} codebooks")
        return Bits(count, self.delay)

    def encode(self, wave: np.ndarray, sample_rate: int) -> Units:
        assert sample_rate == RATE and wave.dtype == np.float32
        levels = np.clip(np.floor((wave.astype(float) + 1) / 2 * 256), 0, 255).astype(int)
        ids = np.stack([levels >> (6 - 2 * book) & 3 for book in range(self.codebooks)])
        places = np.arange(len(wave))
        return Units(ids, places, places + 1, RATE, 4, self.fingerprint)

    def decode(self, units: Units) -> np.ndarray:
        count = units.ids.shape[0]
        steps = sum(units.ids[book] * 4.0 ** (count - 1 - book) for book in range(count))
        wave = (2 * (steps + 0.5) / 4.0**count - 1).astype(np.float32)
        return np.concatenate([np.zeros(self.delay, np.float32), wave])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips) -> Path:
    """Noise that uses all values alike, silence, real speech, and a damaged file."""
    root, rng = tmp_path_factory.mktemp("held out"), np.random.default_rng(0)
    soundfile.write(root / "a.wav", rng.uniform(-1, 1, 2 * RATE).astype(np.float32), RATE, subtype="FLOAT")
    soundfile.write(root / "b.wav", np.zeros(RATE), RATE)
    speech = load(next(clips.glob("librispeech*")), RATE)[: 3 * RATE]
    soundfile.write(root / "c.wav", 0.9 * speech / np.abs(speech).max(), RATE, subtype="FLOAT")
    (root / "d.wav").write_bytes(b"nothing")
    return root


def only(folder: Path, name: str, to: Path) -> Path:
    """A manifest of one file."""
    manifest = to / f"{name}.jsonl"
    manifest.write_text(json.dumps({"path": str(folder / f"{name}.wav")}) + "\n")
    return manifest


def test_figures_of_a_known_codec(folder: Path, tmp_path: Path) -> None:
    told = []
    found = evaluate(
        only(folder, "a", tmp_path), Bits(), (4, 1, 2), speech=False, opus=(), on_event=lambda event: told.append(event)
    )
    assert [row["codebooks"] for row in found["rows"]] == [1, 2, 4]
    for row in found["rows"]:
        # Uniform noise through b bits: 6.02 dB a bit; the last step's error is a part of the power for one codebook.
        bits = 2 * row["codebooks"]
        assert row["figures"]["si_sdr"]["mean"] == pytest.approx(10 * math.log10(4.0**bits - 1), abs=0.1)
        assert row["figures"]["si_sdr"]["files"] == 1 and row["figures"]["si_sdr"]["standard_error"] is None
        assert row["bitrate"] == bits * RATE
        assert row["entropy_bitrate"] == pytest.approx(bits * RATE, rel=1e-3)
        assert row["encode_speed"] > 0 and row["decode_speed"] > 0
        assert set(row["figures"]) == {"mel_distance", "multi_scale_mel_distance", "si_sdr"}
    for name in ("mel_distance", "multi_scale_mel_distance"):
        means = [row["figures"][name]["mean"] for row in found["rows"]]
        assert means[0] > means[1] > means[2] > 0
    assert len(found["codebooks"]) == 4
    for use in found["codebooks"]:
        assert use["perplexity"] == pytest.approx(4.0, abs=0.01) and use["entropy_share"] == pytest.approx(
            1.0, abs=0.01
        )
        assert (use["units_used"], use["dead_codes"]) == (4, 0)
    assert found["seconds"] == pytest.approx(2.0)
    assert [event.done for event in told] == [1]


def test_all_files_speech_metrics_and_opus(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "picture.png"
    found = evaluate(folder, Bits(), (1, 4), opus=(6000, 12000), picture=picture, picture_of="c", picture_seconds=1.0)
    assert [row["system"] for row in found["rows"]] == [
        "bits, 1 of 4", "bits, 4 of 4", "Opus 6 kbit/s", "Opus 12 kbit/s",
    ]  # fmt: skip
    one, four, six, twelve = ({k: v["mean"] for k, v in row["figures"].items()} for row in found["rows"])
    assert set(one) == {"mel_distance", "multi_scale_mel_distance", "si_sdr", "stoi", "pesq"}
    for name in ("stoi", "pesq", "si_sdr"):
        assert one[name] < four[name] and six[name] < twelve[name]
    for row, asked in zip(found["rows"][2:], (6000, 12000), strict=True):
        assert row["asked_bitrate"] == asked and row["entropy_bitrate"] is None and row["encode_speed"] is None
        assert 0.3 * asked < row["bitrate"] < 1.3 * asked  # variable: silence costs next to nothing
    assert found["files"] == 3
    assert list(found["failed"]) == [next(path for path in found["failed"] if "d.wav" in path)]
    # Silence has no ratio, no speech and no intelligibility in any of the rows.
    assert found["unmeasured"]["si_sdr"] == {"the reference is silent: no ratio to it is defined": 4}
    assert sum(found["unmeasured"]["stoi"].values()) == 4
    assert found["rows"][0]["figures"]["stoi"]["files"] == 2
    assert found["rows"][0]["figures"]["stoi"]["standard_error"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_comes_back_exactly_has_no_ratio(folder: Path, tmp_path: Path) -> None:
    class Copy(Bits):
        def with_codebooks(self, count: int) -> "Copy":
            return self

        def encode(self, wave: np.ndarray, sample_rate: int) -> Units:
            self.wave = wave
            return super().encode(wave, sample_rate)

        def decode(self, units: Units) -> np.ndarray:
            return self.wave

    found = evaluate(only(folder, "a", tmp_path), Copy(1), (1,), speech=False, opus=())
    (reason,) = found["unmeasured"]["si_sdr"]
    assert "inf" in reason and "si_sdr" not in found["rows"][0]["figures"]
    assert found["rows"][0]["figures"]["mel_distance"]["mean"] == 0.0
    json.dumps(found, allow_nan=False)


def test_frames_that_end_early_are_filled_up(folder: Path, tmp_path: Path) -> None:
    config = LipcotConfig(sample_rate=RATE, window=700, hop=100, order=4)  # the last 699 samples may have no frame
    centroids = np.random.default_rng(0).normal(size=(8, config.dim))
    whispering = Tokenizer(LipcotEncoder(config), KMeans(centroids), decoder=LipcotWaves(config), name="whispering")
    wave = load(folder / "c.wav", RATE)
    soundfile.write(tmp_path / "a.wav", wave[: 700 + 20 * 100 + 99], RATE, subtype="FLOAT")
    (row,) = evaluate(tmp_path / "a.wav", whispering, (1,), speech=False, opus=())["rows"]
    assert row["figures"]["si_sdr"]["files"] == 1 and row["bitrate"] == 240 * 3


def test_limits_and_mistakes(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, Bits(), (1,), speech=False, opus=(), limit_files=2)["files"] == 2  # a and c of four
    for wrong, words in (
        ({"codebooks": ()}, "at least one"),
        ({"limit_files": 0}, "limit is 0"),
        ({"codebooks": (9,)}, "9 codebooks"),
        ({"picture": tmp_path / "a.png", "picture_of": "nothing"}, "none of the 4 files"),
        ({"picture": tmp_path / "a.txt"}, "pictures are written"),
        ({"opus": (600,)}, "6000 to 256000"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(folder, Bits(), **({"codebooks": (1,), "speech": False, "opus": ()} | wrong))
    with pytest.raises(InputError, match="does not keep time"):
        evaluate(folder, Bits(delay=7), (1,), speech=False, opus=())
    with pytest.raises(InputError, match=r"no usable sound.*d\.wav"):
        evaluate(only(folder, "d", tmp_path), Bits(), (1,), speech=False, opus=())
    with pytest.raises(InputError, match="'d' of .* cannot be drawn: it could not be read"):
        evaluate(folder, Bits(), (1,), speech=False, opus=(), picture=tmp_path / "d.png", picture_of="d")
    with pytest.raises(FormatError, match="no decoder"):
        evaluate(folder, speechtok.load("mfcc-k100"), (1,), speech=False, opus=())


# ---- Opus


def test_opus_is_opus(folder: Path) -> None:
    wave = load(folder / "c.wav", RATE)
    found = {}
    for rate in (6000, 12000, 64000):
        decoded, bits = through_opus(wave, RATE, rate)
        assert decoded.shape == wave.shape and decoded.dtype == np.float32
        assert bits / (len(wave) / RATE) == pytest.approx(rate, rel=0.25)
        found[rate] = decoded
    # No delay is left: the best shift is none.
    centre = slice(2000, -2000)
    alike = [float(np.roll(found[64000], -shift)[centre] @ wave[centre]) for shift in range(-40, 41)]
    assert abs(int(np.argmax(alike)) - 40) <= 1
    # 6 kbit/s is narrow band: nothing is left above 5 kHz, at 64 kbit/s nearly all.
    above = {rate: np.square(np.abs(np.fft.rfft(x))[round(5000 * len(x) / RATE) :]).sum() for rate, x in found.items()}
    original = np.square(np.abs(np.fft.rfft(wave))[round(5000 * len(wave) / RATE) :]).sum()
    assert above[6000] < 0.01 * original and above[64000] > 0.5 * original
    for wrong in ((22050, 6000), (RATE, 5999), (RATE, 300000)):
        with pytest.raises(InputError, match="Opus at"):
            through_opus(wave, *wrong)


def test_packets_of_an_ogg_stream() -> None:
    def page(*lacing: int) -> bytes:
        return b"OggS" + bytes(22) + bytes([len(lacing), *lacing]) + bytes(sum(lacing))

    assert packet_sizes(page(19) + page(255, 45, 255, 0) + page(255) + page(255, 3, 7)) == [19, 300, 255, 513, 7]
    with pytest.raises(FormatError, match="byte 47"):
        packet_sizes(page(19) + b"nothing")
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(RATE), RATE, format="OGG", subtype="OPUS")
    sizes = packet_sizes(stream.getvalue())
    assert sizes[0] == 19 and len(sizes) - 2 == pytest.approx(50, abs=2)  # OpusHead; frames of 20 ms


def test_a_build_without_opus_is_told(monkeypatch) -> None:
    monkeypatch.setattr(soundfile, "check_format", lambda *_: False)
    with pytest.raises(InputError, match="no Opus encoder"):
        through_opus(np.zeros(RATE, np.float32), RATE, 6000)


def test_pictures_say_what_is_wrong(tmp_path: Path) -> None:
    wave = np.zeros(RATE, np.float32)
    with pytest.raises(InputError, match="no sound to draw"):
        draw_spectrograms({"a": wave[:0]}, RATE, tmp_path / "a.png", title="")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        draw_spectrograms({"a": wave}, RATE, tmp_path / "file" / "a.png", title="")


# ---- a real tokenizer


@pytest.fixture(scope="module")
def random_codec(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = SeanetConfig(num_filters=2, hidden_size=8, num_lstm_layers=0, pad_mode="constant")
    books = torch.randn(4, 16, 8).numpy() * 0.1
    codec = Tokenizer(SeanetFrames(config), ResidualQuantizer(books), name="random", decoder=SeanetWaves(config))
    return codec.save(tmp_path_factory.mktemp("codec") / "random")


def test_the_command(folder: Path, random_codec: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "found.json"
    arguments = ["evaluate", "codec", "-t", str(random_codec), "--codebooks", "2,4", "--log", "plain"]
    done = run.invoke(
        app,
        [
            *arguments, "--speech", str(only(folder, "c", tmp_path)), "--music", str(folder), "--opus", "6",
            "--pictures", str(tmp_path / "pictures"), "--json", str(out),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    speech, music = json.loads(out.read_text())
    assert speech["speech"] and "stoi" in speech["rows"][0]["figures"]
    assert not music["speech"] and "stoi" not in music["rows"][0]["figures"]
    assert [row["bitrate"] for row in speech["rows"][:2]] == [2 * 75 * 4, 4 * 75 * 4]  # 16 codes: 4 bits
    assert len(speech["codebooks"]) == 4
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0-c.jsonl.png", f"1-{folder.name}.png"]
    assert "random, 2 of 4" in done.output and "Opus 6 kbit/s" in done.output and "is left out" in done.output
    assert run.invoke(app, [*arguments, "--log", "quiet", "--speech", str(folder), "--opus", "x"]).exit_code == 1
    nothing = run.invoke(app, arguments)
    assert nothing.exit_code == 1 and "nothing to measure on" in str(nothing.exception)
