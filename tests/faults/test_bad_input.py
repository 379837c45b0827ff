"""Whatever stands in a folder: units or a clear reason, and the other files are unaffected."""

import errno
import json
import os
import struct
from functools import partial

import numpy as np
import pytest
import soundfile

from speechtok.corpus import ledger as ledger_module
from speechtok.corpus.engine import rank_and_world
from speechtok.corpus.engine import tokenize as run_job
from speechtok.corpus.rows import read_parts
from speechtok.errors import InputError, OutputError, SpeechtokError

tokenize = partial(run_job, tokenizer="mfcc-k100")


def rows_and_errors(out):
    errors = out / "errors.jsonl"
    reasons = {e["key"]: e["reason"] for e in map(json.loads, errors.open(encoding="utf-8"))} if errors.exists() else {}
    return {row.key: row for row in read_parts(out)}, reasons


@pytest.fixture
def zoo(tmp_path, clip_wave, tokenizer):
    """A folder of many kinds of files, and for each what must become of it: a reason, or None for units."""
    root = tmp_path / "zoo"
    root.mkdir()
    expected = {}
    wave = clip_wave[:24000]

    def sound(name, data=wave, rate=16000, reason=None, **more):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, data, rate, **more)
        expected[name.rsplit(".", 1)[0]] = reason
        return path

    def raw(name, data, reason):
        (root / name).write_bytes(data)
        expected[name.rsplit(".", 1)[0]] = reason

    sound("good.wav")
    sound("deep/er/good.flac")
    sound("stereo.wav", np.stack([wave, -wave * 0.5], 1))
    sound("eight.wav", np.stack([wave] * 8, 1))
    sound("slow.wav", wave, 4000)
    sound("fast.wav", np.repeat(wave, 12), 192000)
    sound("odd_rate.wav", wave, 12345)
    sound("bits24.wav", subtype="PCM_24")
    sound("float64.wav", subtype="DOUBLE")
    sound("silent.wav", np.zeros(16000))
    sound("loud.wav", np.clip(wave * 100, -1, 1))
    sound("offset.wav", wave * 0.1 + 0.9)
    sound("opus.ogg", format="OGG", subtype="OPUS")
    sound("vorbis.ogg", format="OGG", subtype="VORBIS")
    sound("layer3.mp3")
    sound("apple.aiff")
    sound("with space.wav")
    sound("ünïcödé 語.wav")
    sound("new\nline.wav")
    sound("tab\tbed.wav")
    sound("UPPER.WAV", format="WAV")
    sound("folder.wav/inside.wav")
    sound("mislabelled.mp3", format="WAV")
    sound("one.wav", wave[:1], reason="too short")
    sound("nearly.wav", wave[:399], reason="too short")
    sound("nan.wav", np.array([0.0, np.nan] * 500), subtype="FLOAT", reason="NaN")
    sound("infinite.wav", np.array([0.0, np.inf] * 500), subtype="FLOAT", reason="infinite")
    sound("huge.wav", np.array([0.0, 1e30] * 500), subtype="FLOAT", reason="amplitudes")
    sound("none.wav", wave[:0], reason="no samples")
    raw("empty.wav", b"", "empty")
    raw("random.wav", np.random.default_rng(0).bytes(4000), "cannot be decoded")
    raw("text.flac", b"just words " * 100, "cannot be decoded")
    whole = (root / "good.wav").read_bytes()
    raw("truncated.wav", whole[: len(whole) // 2], "truncated")
    raw("header.wav", whole[:44], "truncated")
    flac = (root / "deep/er/good.flac").read_bytes()
    raw("cut.flac", flac[: len(flac) // 2], "truncated|damaged|decod")
    sound("twice.wav")
    sound("twice.flac")
    expected["twice.wav"] = expected["twice.flac"] = None
    del expected["twice"]
    os.symlink(root / "good.wav", root / "link.wav")
    expected["link"] = None
    os.symlink(root, root / "loop")
    os.symlink(root / "nowhere.wav", root / "dangling.wav")
    expected["dangling"] = "link|exist|file"
    os.mkfifo(root / "pipe.wav")
    expected["pipe"] = "regular|FIFO|pipe"
    (root / "notes.txt").write_text("not audio")
    return root, expected


def test_the_zoo(tmp_path, zoo, tokenizer):
    root, expected = zoo
    out = tmp_path / "out"
    summary = tokenize(root, out, shard_seconds=5.0)
    rows, reasons = rows_and_errors(out)
    import re

    assert len(expected) >= 40
    for key, reason in expected.items():
        if reason is None:
            assert key in rows, f"{key!r}: {reasons.get(key)}"
            assert rows[key].durations.sum() > 0
        else:
            assert key in reasons, f"{key!r} has units or no trace"
            assert re.search(reason, reasons[key]), (key, reasons[key])
    assert set(rows).isdisjoint(reasons)
    assert summary.files == len(rows)
    assert summary.failed == len(reasons)
    assert summary.ignored >= 1
    # The good file among them has the units it has alone.
    assert np.array_equal(rows["good"].ids, tokenizer.encode(root / "good.wav").ids)
    assert np.array_equal(rows["link"].ids, rows["good"].ids)
    assert (rows["fast"].sample_rate, rows["fast"].num_samples) == (192000, 24000 * 12)
    assert rows["eight"].num_samples == 24000


@pytest.mark.parametrize("output_format", ["km", "textless", "kaldi", "slamkit", "jsonl", "npy", "webdataset"])
def test_names_a_format_cannot_hold_are_errors_not_crashes(tmp_path, zoo, output_format):
    root, _ = zoo
    out = tmp_path / "out"
    summary = tokenize(root, out, output_format=output_format)
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in (out / "errors.jsonl").open()}
    assert summary.files + summary.failed > 40
    if output_format in {"km", "textless", "kaldi"}:
        assert "new\nline" in reasons
    assert json.loads((out / "tokenizer.json").read_text())["job"]["files"] == summary.files
    assert not (out / ".work").exists()
    before = sorted(out.rglob("*"))
    assert tokenize(root, out, output_format=output_format).complete
    assert sorted(out.rglob("*")) == before


def test_manifests_cannot_reach_out(tmp_path, clip):
    (tmp_path / "in").mkdir()
    inside = tmp_path / "in" / "a.flac"
    inside.write_bytes(clip.read_bytes())
    (tmp_path / "outside.flac").write_bytes(clip.read_bytes())
    manifest = tmp_path / "in" / "list.jsonl"
    lines = [
        {"path": "a.flac"},
        {"path": "../outside.flac"},
        {"path": "a.flac", "key": "../../evil"},
        {"path": "a.flac", "key": "a"},
        {"path": "gone.flac"},
        {"file": "no path"},
    ]
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "deep" / "out"
    tokenize(manifest, out, output_format="npy")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.npy")}
    assert "deep/out/a.npy" in written
    assert all(name.startswith("deep/out/") and ".." not in name for name in written)
    assert len((out / "errors.jsonl").read_text().splitlines()) >= 4


def test_missing_columns_and_inputs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "x.tsv").write_text("not a folder\nx\n")
    (tmp_path / "x.jsonl").write_text("[]\n")
    (tmp_path / "empty").mkdir()
    for source in ("x.parquet", "x.tsv", "x.jsonl", "empty", "missing"):
        with pytest.raises(InputError):
            tokenize(tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_rubbish_finishes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(b"x")
    summary = tokenize(tmp_path / "in", tmp_path / "out")
    assert (summary.files, summary.failed, summary.complete) == (0, 1, True)


def test_disk_full(tmp_path, clips, monkeypatch):
    """The disk fills up on the second shard: the first stays, and the job goes on when there is room."""
    real, calls = ledger_module.write_part, []

    def full(path, rows, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, rows, metadata)

    monkeypatch.setattr(ledger_module, "write_part", full)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="No space left"):
        tokenize(clips, out, shard_seconds=3.0)
    assert not (out / "tokenizer.json").exists()
    assert not list(out.glob("*.parquet"))
    monkeypatch.setattr(ledger_module, "write_part", real)
    summary = tokenize(clips, out, shard_seconds=3.0)
    assert summary.complete
    assert summary.resumed == 1


def test_really_full_disk(tmp_path, clips):
    """A file system of 64 kB, where this machine lets us mount one."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OutputError, match="No space left"):
            tokenize(clips, small / "out", shard_seconds=1.0)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_read_only_output(tmp_path, clips, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        tokenize(clips, tmp_path / "out")


def test_a_dead_worker_is_reported(tmp_path, clips, tokenizer):
    """A worker that is killed ends the job with advice, and the job can be resumed."""
    import threading
    import time

    import psutil

    out = tmp_path / "out"

    def kill():
        for _ in range(600):
            time.sleep(0.05)
            if any((out / ".work").glob("*/*.part")):
                for child in psutil.Process().children(recursive=True):
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                return

    source = tmp_path / "many.jsonl"
    lines = [
        json.dumps({"path": str(path), "key": f"{i}/{path.stem}"})
        for i in range(60)
        for path in sorted(clips.iterdir())
    ]
    source.write_text("\n".join(lines))
    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SpeechtokError, match="worker process died"):
        tokenize(source, out, workers=2, shard_seconds=10.0)
    thread.join()
    assert tokenize(source, out, shard_seconds=10.0).complete


def test_options_are_checked(tmp_path, clips, monkeypatch):
    for bad in ({"output_format": "zip"}, {"workers": 0}, {"batch_seconds": 0}, {"shard_seconds": -1}, {"rank": 0}):
        with pytest.raises(InputError):
            tokenize(clips, tmp_path / "out", **bad)
    assert rank_and_world(1, 3) == (1, 3)
    with pytest.raises(InputError, match="ranks go from"):
        rank_and_world(3, 3)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert rank_and_world() == (1, 4)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert rank_and_world() == (0, 1), "a batch script is not a task"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert rank_and_world() == (1, 2)
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_and_world() == (6, 8)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "many")
    with pytest.raises(InputError, match="malformed"):
        rank_and_world()


def test_a_lying_header_does_not_allocate(tmp_path):
    """A header that promises two gigabytes is refused, quickly."""
    body = (
        b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16) + b"data" + struct.pack("<I", 0x70000000)
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "big.wav").write_bytes(b"RIFF" + struct.pack("<I", 0x70000000) + body + bytes(1000))
    assert tokenize(tmp_path / "in", tmp_path / "out").failed == 1
