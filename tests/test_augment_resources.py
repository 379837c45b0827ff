"""Noises and rooms that augmentation draws from: splits, folders, what is shipped."""

import json
import math

import numpy as np
import pytest
import soundfile

from speechtok.audio.augment import (
    AugmentResources,
    augment,
    augment_with_report,
)
from speechtok.audio.clips import FileClips, clips_of_split
from speechtok.audio.decode import load
from speechtok.audio.rooms import SimulatedRooms
from speechtok.errors import AudioError, InputError
from tests.conftest import ROOT
from tests.toy_augment import RATE

# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture
def folder(tmp_path):
    """Six noises in two splits, four responses of two rooms, none of them for validation."""
    rng = np.random.default_rng(0)
    for kind, count in (("noise", 6), ("rir", 4)):
        (tmp_path / kind).mkdir()
        rows = []
        for index in range(count):
            wave = rng.uniform(-0.5, 0.5, 24000) * np.exp(-np.arange(24000) / (2000 if kind == "rir" else 1e6))
            soundfile.write(tmp_path / kind / f"{index}.flac", wave, 24000)
            split = "train" if kind == "rir" or index < 4 else "valid"
            rows.append({"path": f"{index}.flac", "split": split, "room": "hall" if index else "kitchen"})
        (tmp_path / kind / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_files_of_a_split(folder, clip_wave):
    resources = AugmentResources.from_folder(folder, "train")
    drawn = {augment_with_report(clip_wave, RATE, "noise", str(i), resources=resources)[1]["clip"] for i in range(40)}
    assert drawn == {f"{i}.flac" for i in range(4)}
    valid = AugmentResources.from_folder(folder, "valid")
    drawn = {augment_with_report(clip_wave, RATE, "noise", str(i), resources=valid)[1]["clip"] for i in range(20)}
    assert drawn == {"4.flac", "5.flac"}
    with pytest.raises(AudioError, match="reverb needs"):
        augment(clip_wave, RATE, "reverb", "a", resources=valid)


def test_every_room_counts_once(folder):
    rooms = clips_of_split(folder / "rir", "train", "room")
    generator = np.random.default_rng(0)
    drawn = [rooms.draw(generator, RATE)[1]["clip"] for _ in range(400)]
    assert 0.4 < drawn.count("0.flac") / 400 < 0.6  # the only response of its room
    flat = clips_of_split(folder / "rir", "train")
    drawn = [flat.draw(generator, RATE)[1]["clip"] for _ in range(400)]
    assert 0.18 < drawn.count("0.flac") / 400 < 0.32


def test_order_of_the_listing_does_not_matter(folder, clip_wave):
    before = augment(clip_wave, RATE, "noise", "a", resources=AugmentResources.from_folder(folder, "train"))
    listing = folder / "noise" / "metadata.jsonl"
    listing.write_text("\n".join(reversed(listing.read_text().splitlines())))
    after = augment(clip_wave, RATE, "noise", "a", resources=AugmentResources.from_folder(folder, "train"))
    assert np.array_equal(before, after)


def test_clips_come_at_the_rate_asked_for_and_are_kept(folder):
    noises = clips_of_split(folder / "noise", "train")
    first, _ = noises.draw(np.random.default_rng(0), RATE)
    assert len(first) == 16000 and first.dtype == np.float32
    assert noises.draw(np.random.default_rng(0), RATE)[0] is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0
    assert len(noises.draw(np.random.default_rng(0), 24000)[0]) == 24000


def test_damaged_folders_are_refused(folder):
    with pytest.raises(InputError, match="one of train"):
        AugmentResources.from_folder(folder, "dev")
    with pytest.raises(InputError, match="neither noise nor room"):
        AugmentResources.from_folder(folder, "test")
    with pytest.raises(InputError, match="cannot be read"):
        AugmentResources.from_folder(folder / "nowhere", "train")
    listing = folder / "noise" / "metadata.jsonl"
    for line, message in (
        ("{", "no object"),
        ("[1]", "no object"),
        ('{"path": "a.wav"}', "no object"),
        ('{"path": "../a.wav", "split": "train"}', "leads out"),
        ('{"path": "/a.wav", "split": "train"}', "leads out"),
    ):
        listing.write_text(line + "\n")
        with pytest.raises(InputError, match=message):
            AugmentResources.from_folder(folder, "train")
    for paths, groups in (([], None), (["a"], [])):
        with pytest.raises(InputError, match="at least one file"):
            FileClips(folder, paths, groups)


def test_real_noises_and_rooms(shared, clip_wave):
    resources = AugmentResources.from_folder(shared, "test")
    for key in map(str, range(12)):
        out, report = augment_with_report(clip_wave, RATE, "noise", key, resources=resources)
        ratio = 20 * math.log10(np.linalg.norm(clip_wave) / np.linalg.norm(out - clip_wave))
        assert ratio == pytest.approx(report["snr_db"], abs=0.1)
        wet, report = augment_with_report(clip_wave, RATE, "reverb", key, resources=resources)
        assert np.linalg.norm(wet) == pytest.approx(np.linalg.norm(clip_wave), rel=1e-4)
        # A click stays where it is: hardly anything comes before it, and something of weight comes with it.
        click = np.eye(1, 64000, 1000, dtype=np.float32)[0]
        heard = np.abs(augment(click, RATE, "reverb", key, resources=resources))
        assert np.sum(heard[: 1000 - RATE // 200] ** 2) < 1e-2 * np.sum(heard**2)
        assert heard[1000] >= 0.3 * heard.max()
    with pytest.raises(AudioError, match="reverb needs"):
        augment(clip_wave, RATE, "reverb", "a", resources=AugmentResources.from_folder(shared, "valid"))


# ---------------------------------------------------------------------------------------------------------------------
# without a data folder, or with any


def test_defaults_need_no_folder(clip_wave):
    drawn = set()
    for key in map(str, range(60)):
        out, report = augment_with_report(clip_wave, RATE, "noise", key)
        assert out.shape == clip_wave.shape
        drawn.add(report["clip"])
    shipped = ROOT / "assets" / "noise"
    rows = [json.loads(line) for line in (shipped / "metadata.jsonl").read_text().splitlines()]
    assert drawn == {row["path"] for row in rows} == {path.name for path in shipped.glob("*.opus")}
    assert 8 <= len(rows) <= 12 and sum(path.stat().st_size for path in shipped.iterdir()) < 300_000
    for row in rows:
        assert row["licence"] == "CC0 1.0" and row["author"] and row["source_path"]
        clip = load(shipped / row["path"], 24000)
        assert len(clip) == 24000 * row["duration_s"] and 3 <= row["duration_s"] <= 5
        # No second of it is silent.
        assert min(np.std(clip[begin : begin + 24000]) for begin in range(0, len(clip), 24000)) > 1e-3
    report = augment_with_report(clip_wave, RATE, "reverb", "a")[1]
    assert 0.1 <= report["rt60"] <= 1.0
    assert AugmentResources.default().noises is AugmentResources.from_folders().noises  # decoded once


def test_folders_with_a_listing_give_a_split(folder, clip_wave):
    resources = AugmentResources.from_folders(folder / "noise", folder / "rir", "train")
    other = AugmentResources.from_folder(folder, "train")
    for family in ("noise", "reverb"):
        for key in "abc":
            assert np.array_equal(
                augment(clip_wave, RATE, family, key, resources=resources),
                augment(clip_wave, RATE, family, key, resources=other),
            )
    with pytest.raises(InputError, match=r"rir.metadata.jsonl names no file of split 'valid'"):
        AugmentResources.from_folders(rooms=folder / "rir", split="valid")
    with pytest.raises(InputError, match="one of train"):
        AugmentResources.from_folders(noise=folder / "noise", split="dev")


def test_folders_without_a_listing_are_searched(folder, tmp_path, clip_wave):
    bare = tmp_path / "bare"
    for name, source in (("b/2.FLAC", "noise/0.flac"), ("1.flac", "noise/1.flac"), ("a/b/3.flac", "noise/2.flac")):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_bytes((folder / source).read_bytes())
    (bare / "notes.txt").write_text("not a sound")
    resources = AugmentResources.from_folders(noise=bare)
    drawn = [augment_with_report(clip_wave, RATE, "noise", str(i), resources=resources)[1]["clip"] for i in range(30)]
    assert set(drawn) == {"1.flac", "a/b/3.flac", "b/2.FLAC"}
    assert isinstance(resources.rooms, SimulatedRooms)
    (bare / "a" / "b" / "3.flac").write_bytes(b"no sound at all")
    broken = AugmentResources.from_folders(noise=bare)
    with pytest.raises(AudioError, match=r"3\.flac: cannot be decoded"):
        augment(clip_wave, RATE, "noise", str(drawn.index("a/b/3.flac")), resources=broken)


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "empty holds no sound file"), ("nowhere", "nowhere is no folder")):
        with pytest.raises(InputError, match=message):
            AugmentResources.from_folders(noise=tmp_path / name)
        with pytest.raises(InputError, match=message):
            AugmentResources.from_folders(rooms=tmp_path / name)


def test_only_so_much_is_kept(folder, monkeypatch):
    monkeypatch.setattr("speechtok.audio.clips._KEPT_SAMPLES", 16000)
    noises = clips_of_split(folder / "noise", "train")
    drawn = [noises.draw(np.random.default_rng(seed), RATE) for seed in range(20)]
    kept = {facts["clip"] for clip, facts in drawn if clip is noises._cache.get((facts["clip"], RATE))}
    assert len(kept) == 1 and len({facts["clip"] for _, facts in drawn}) > 1
