"""Sound of a corpus on disk, and the loop on it."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from speechtok.audio.decode import load
from speechtok.errors import FormatError, InputError
from speechtok.training.loop import train
from speechtok.training.recipe import DataConfig, OptimizerConfig, Recipe, RunConfig
from speechtok.training.sampler import Crop
from speechtok.training.waves import Waves, identity_of

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "assets" / "clips"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A short sound, one of 61.5 s, one too short for a hop, one that is damaged, all at 24 kHz."""
    folder, rng = tmp_path / "corpus", np.random.default_rng(0)
    folder.mkdir()
    for name, count in {"a": 2 * 320 + 319, "b": round(61.5 * 24000), "c": 319}.items():
        soundfile.write(folder / f"{name}.wav", rng.integers(-32768, 32768, count).astype(np.int16), 24000)
    (folder / "d.wav").write_bytes(b"nothing")
    return folder


def test_samples_are_kept_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    waves = Waves.build(corpus, tmp_path / "waves")
    assert (waves.sample_rate, waves.hop, waves.rate) == (24000, 320, 75.0)
    assert waves.lengths.tolist() == [2, 4500, 112]  # whole hops; the long file in pieces of a minute
    assert waves.starts.tolist() == [0, 2, 4502]
    assert waves.hours == pytest.approx((2 + 4612) / 75 / 3600)
    short, long = (soundfile.read(corpus / f"{name}.wav", dtype="float32")[0] for name in "ab")
    assert np.array_equal(waves.cut(0, 0, 2), short[:640])
    assert np.array_equal(np.concatenate([waves.cut(1, 0, 4500), waves.cut(2, 0, 112)]), long[: 4612 * 320])
    assert waves.cut(1, 7, 3).dtype == np.float32
    assert np.array_equal(waves.cut(1, 7, 3), long[7 * 320 : 10 * 320])
    assert np.array_equal(waves.cut(0, 1, 50), short[320:640])  # fewer at the end of an item, never another item's
    assert len(waves.failed) == 2 and any("too short" in reason for reason in waves.failed)


def test_a_file_that_fails_late_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(-9000, 9000, 150 * 24000).astype(np.int16)
    soundfile.write(corpus / "c.flac", noise, 24000)
    whole = (corpus / "c.flac").read_bytes()
    (corpus / "c.flac").write_bytes(whole[: len(whole) * 2 // 3])  # its first minute can be decoded
    waves = Waves.build(corpus, tmp_path / "waves")
    assert waves.lengths.tolist() == [2, 4500, 112]
    assert any("c.flac" in reason for reason in waves.failed)
    long = soundfile.read(corpus / "b.wav", dtype="float32")[0]
    assert np.array_equal(waves.cut(2, 0, 112), long[4500 * 320 : 4612 * 320])


def test_rates_are_converted_and_loud_samples_clipped(tmp_path: Path) -> None:
    folder = tmp_path / "loud"
    folder.mkdir()
    time = np.arange(16000) / 16000
    soundfile.write(folder / "a.wav", (1.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), 16000, subtype="FLOAT")
    waves = Waves.build(folder, tmp_path / "waves", sample_rate=48000, hop=480)
    assert (waves.rate, waves.lengths.tolist()) == (100.0, [100])
    wanted = load(folder / "a.wav", 48000)
    given = waves.cut(0, 0, 100)
    assert np.abs(given - wanted.clip(-1, 1 - 2**-15)).max() <= 2**-16 + 1e-7
    assert (given.min(), given.max()) == (-1.0, 1 - 2**-15)


def test_what_was_read_is_kept(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "waves"
    first = Waves.build(corpus, folder)
    written, name = (folder / "samples.i16").stat().st_mtime_ns, identity_of(folder)
    second = Waves.build(corpus, folder)
    assert (folder / "samples.i16").stat().st_mtime_ns == written
    assert np.array_equal(first.frames, second.frames) and first.failed == second.failed
    third = Waves.build(corpus, folder, hop=640)  # another hop is made anew
    assert third.lengths.tolist() == [1, 2250, 56]
    assert identity_of(folder) != name


def test_a_manifest_names_the_sound(corpus: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "some.jsonl"
    manifest.write_text(json.dumps({"path": str(corpus / "a.wav")}) + "\n")
    assert Waves.build(manifest, tmp_path / "waves").lengths.tolist() == [2]


def test_errors_name_the_mend(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hop 0"):
        Waves.build(corpus, tmp_path / "waves", hop=0)
    (corpus / "a.wav").unlink()
    (corpus / "b.wav").unlink()
    with pytest.raises(InputError, match="no usable sound"):
        Waves.build(corpus, tmp_path / "waves")
    folder = tmp_path / "clips"
    Waves.build(CLIPS, folder)
    content = (folder / "samples.i16").read_bytes()
    (folder / "samples.i16").write_bytes(content[:-2])
    with pytest.raises(FormatError, match="delete"):
        Waves.build(CLIPS, folder)
    for content in ("{", "{}", "[]", '{"identity": 1, "failed": [], "items": [[1, "a"]]}'):
        (folder / "index.json").write_text(content)
        with pytest.raises(FormatError, match="damaged"):
            Waves.build(CLIPS, folder)


class Level(nn.Module):
    """Learns the mean power of the sound: the smallest objective that the loop accepts."""

    perturb_config = None

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))

    def collate(self, crops: list[Crop], sound: Waves, noises: None, *, training: bool) -> dict[str, torch.Tensor]:
        assert isinstance(sound, Waves) and noises is None
        pieces = [sound.cut(crop.item, crop.start, crop.length) for crop in crops]
        assert all(len(piece) == crop.length * sound.hop for piece, crop in zip(pieces, crops, strict=True))
        return {"wave": torch.from_numpy(np.stack(pieces))}

    def compiled(self) -> Iterable[nn.Module]:
        return []

    def weight_of(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["wave"])

    def forward(self, batch: dict, weight: float, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (self.level - batch["wave"].square().mean(1)).square().sum() / weight
        return loss, {"rows": torch.tensor(float(len(batch["wave"])))}

    def summary(self, figures: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"loss": float(figures["loss"]) / float(figures["rows"]), "rows": float(figures["rows"])}

    def alarms(self, summary: dict[str, float]) -> list[str]:
        return []


def test_the_loop_trains_on_waves(tmp_path: Path) -> None:
    waves = Waves.build(CLIPS, tmp_path / "waves")
    config = RunConfig(steps=4, precision="float32", compile=True, log_every=1, evaluate_every=4, checkpoint_every=4)
    data, optimizer = DataConfig(crop_seconds=(0.64,), batch_seconds=2.56), OptimizerConfig(learning_rate=1e-3)
    recipe = Recipe("level", {}, {}, config, data, optimizer)
    run = train(Level(), recipe, waves, tmp_path / "run", held_out=waves)
    lines = [line for line in run.history if line["split"] == "train"]
    assert [line["rows"] for line in lines] == [4.0] * 4  # 2.56 s of crops of 0.64 s: seconds, not filter bank frames
    assert [line["hours"] for line in lines] == pytest.approx([2.56 * step / 3600 for step in (1, 2, 3, 4)])
    assert run.history[-1]["split"] == "held out"
