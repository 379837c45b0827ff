"""The benchmark of units under augmentation: rows, groups, what is kept, changes against the baseline, tables."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speechtok.benchmarks import invariance

import speechtok
from speechtok.audio.decode import load
from speechtok.errors import InputError

CLIPS = Path(__file__).resolve().parents[1] / "assets" / "clips"
PHONES = ("SIL", "AH", "B", "IY", "AH", "B", "IY", "SIL")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Aligned pieces of clips by two speakers in each of two corpora, a noise and a room."""
    speech = tmp_path / "data" / "speech" / "eval"
    listing, alignments = [], []
    phones = [[name, 0.1 * place, 0.1 * (place + 1)] for place, name in enumerate(PHONES)]
    clips = sorted(CLIPS.glob("librispeech-*.[fo]*"))
    for corpus in ("librispeech", "speechocean762"):
        for speaker in range(2):
            path = f"{corpus}/{speaker}.flac"
            (speech / corpus).mkdir(parents=True, exist_ok=True)
            soundfile.write(speech / path, load(clips[speaker], 16000)[16000:29600], 16000)
            listing.append({"path": path, "speaker": f"{corpus} {speaker}"})
            alignments.append({"path": path, "words": [], "phones": phones})
    generator = np.random.default_rng(0)
    for kind, sound in (("noise", generator.normal(0, 0.1, 24000)), ("rir", np.eye(1, 2000, 20)[0])):
        (tmp_path / "data" / kind).mkdir()
        soundfile.write(tmp_path / "data" / kind / "one.flac", sound, 24000)
        row = {"path": "one.flac", "split": "test", "room": "hall"}
        (tmp_path / "data" / kind / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    for name, rows in (("metadata", listing), ("alignments", alignments)):
        (speech / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def run(monkeypatch, capsys, data: Path, *rows: str, baseline: str) -> tuple[dict, str]:
    target = data / "table.json"
    options = ["--data", data, "--work", data / "work", "--json", target, "--baseline", baseline]
    options += ["--complexity-files", 0, *(part for row in rows for part in ("--tokenizer", row))]
    monkeypatch.setattr(sys, "argv", ["invariance", *map(str, options)])
    invariance.main()
    return json.loads(target.read_text()), capsys.readouterr().out


def test_rows_are_held_against_the_baseline(data: Path, monkeypatch, capsys) -> None:
    other = shutil.copytree(Path(str(speechtok.load("mfcc-k100").save(data / "saved"))), data / "copied")
    found, told = run(monkeypatch, capsys, data, "mfcc-k500", f"same={other}", "mfcc-k100", baseline="mfcc-k100")
    assert list(found["rows"]) == ["mfcc-k500", "same", "mfcc-k100"]
    groups = found["rows"]["mfcc-k100"]["groups"]
    assert {name: group["utterances"] for name, group in groups.items()} == {"native": 2, "accented": 2, "pooled": 4}
    # One tokenizer under two labels: nothing is changed.
    assert {value for by in found["relative"]["same"].values() for value in by.values()} == {0.0}
    for group, changes in found["relative"]["mfcc-k500"].items():
        ours, base = found["rows"]["mfcc-k500"]["groups"][group], groups[group]
        for family in ("stretch", "pitch", "reverb", "noise"):
            assert changes[family] == pytest.approx(ours["ued"][family] / base["ued"][family] - 1)
        assert changes["pnmi"] == pytest.approx(ours["pnmi"]["with"] / base["pnmi"]["with"] - 1)
    assert "| mfcc-k500 | native |" in told and f"{groups['pooled']['ued']['noise']:.1f} [" in told
    assert "1 files of noise, split test" in found["conventions"]["noise"]


def test_rows_that_are_known_are_read_back(data: Path, monkeypatch, capsys) -> None:
    first, _ = run(monkeypatch, capsys, data, "mfcc-k100", baseline="mfcc-k100")
    monkeypatch.setattr(invariance, "measure", lambda *args: pytest.fail("it was measured already"))
    again, _ = run(monkeypatch, capsys, data, "label=mfcc-k100", baseline="label")
    assert again["rows"]["label"] == first["rows"]["mfcc-k100"]
    with pytest.raises(InputError, match="none of the rows"):
        run(monkeypatch, capsys, data, "mfcc-k100", baseline="another")
