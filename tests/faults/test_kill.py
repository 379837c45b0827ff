"""Killed and resumed equals one pass, byte for byte, with one and two workers and across ranks."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechtok.corpus import engine
from speechtok.corpus.rows import read_parts
from speechtok.errors import OutputError
from speechtok.frames import WindowRule
from speechtok.tokenizer import Tokenizer

from ..conftest import segmented

JOB = """
import json, sys
from speechtok.corpus.engine import tokenize
if __name__ == "__main__":
    print("ready", flush=True)
    tokenize(**{"tokenizer": "mfcc-k100"} | json.loads(sys.argv[1]))
"""
KILLS = 20
# What is killed does not matter here: the quickest tokenizer leaves time for many kills.
tokenize = partial(engine.tokenize, tokenizer="mfcc-k100")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, clips, clip_wave):
    """120 cuts of the clips in subfolders, with three broken files among them."""
    root = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    for i in range(120):
        path = root / f"speaker{i % 7}" / f"utt{i:03d}.wav"
        path.parent.mkdir(exist_ok=True)
        begin, length = chance.randrange(0, 30_000), chance.randrange(3000, 40_000)
        soundfile.write(path, clip_wave[begin : begin + length], 16000)
    (root / "speaker0" / "empty.wav").write_bytes(b"")
    (root / "speaker3" / "noise.wav").write_bytes(b"RIFFxxxx" + bytes(range(256)))
    soundfile.write(root / "speaker5" / "short.wav", clip_wave[:100], 16000)
    return root


def start(script, job, **more):
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(job | more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(tmp_path, corpus, workers):
    _kill_and_compare(tmp_path, corpus, KILLS, workers)


@pytest.mark.parametrize("encoder", ["mfcc", "chunked"])
def test_segments_after_kills(tmp_path, corpus, bases, clip_wave, encoder):
    """Segment tokenizers: files of one window and of several, killed with two workers, resumed."""
    window = WindowRule(1.6, 0.2) if encoder == "mfcc" else None
    folder = segmented(bases[encoder], clip_wave, window=window).save(tmp_path / "bundle")
    out = _kill_and_compare(tmp_path, corpus, 2, 2, tokenizer=str(folder))
    tokenize(corpus, tmp_path / "other", shard_seconds=6.0, batch_seconds=1.0, decode_threads=1, tokenizer=folder)
    assert contents(out) == contents(tmp_path / "other")
    tokenizer = Tokenizer.load(folder)
    rows = {row.key: row for row in read_parts(out)}
    assert len(rows) == 120
    for key in sorted(rows)[::9]:
        units = tokenizer.encode(corpus / f"{key}.wav")
        assert np.array_equal(rows[key].ids, units.ids)
        assert np.array_equal(rows[key].starts, units.starts_seconds)
        assert np.array_equal(rows[key].ends, units.ends_seconds)


def _kill_and_compare(tmp_path, corpus, kills, workers, **more):
    """Kill a job again and again; its output in the end, which is that of a job nobody disturbed."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    job = {"source": str(corpus), "shard_seconds": 6.0, "workers": workers} | more
    once = tmp_path / "once"
    process = start(script, job, out=str(once))
    process.stdout.readline()  # the imports are done
    begin = time.perf_counter()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    length = time.perf_counter() - begin
    expected = contents(once)
    assert sum(name.endswith(".parquet") for name in expected) > 15

    chance = random.Random(workers)
    out, killed = tmp_path / "killed", 0
    while killed < kills:
        process = start(script, job, out=str(out))
        process.stdout.readline()
        # Mostly short lives, so that the job is hit in many states: planning, running, renaming.
        try:
            process.communicate(timeout=chance.uniform(0, 1) ** 2 * length)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        else:  # it came to its end between two kills: compare and begin anew
            assert process.returncode == 0
            assert contents(out) == expected
            shutil.rmtree(out)
    process = start(script, job, out=str(out))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert contents(out) == expected
    return out


def test_worker_count_and_batches_do_not_matter(tmp_path, corpus):
    base = tokenize(corpus, tmp_path / "a", shard_seconds=20.0)
    tokenize(corpus, tmp_path / "b", shard_seconds=20.0, workers=2)
    tokenize(corpus, tmp_path / "c", shard_seconds=20.0, batch_seconds=1.0, decode_threads=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert (base.files, base.failed) == (120, 3)
    assert not (tmp_path / "a" / ".work").exists()
    keys = [row.key for row in read_parts(tmp_path / "a")]
    assert keys == sorted(keys)
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in (tmp_path / "a" / "errors.jsonl").open()}
    assert set(reasons) == {"speaker0/empty", "speaker3/noise", "speaker5/short"}
    assert "too short" in reasons["speaker5/short"]


def test_ranks_share_one_folder(tmp_path, corpus, monkeypatch):
    tokenize(corpus, tmp_path / "one", shard_seconds=20.0)
    out = tmp_path / "ranks"
    summaries = []
    for rank in (2, 0, 1):  # in any order
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        summaries.append(tokenize(corpus, out, shard_seconds=20.0))
    assert [summary.complete for summary in summaries] == [False, False, True]
    assert contents(out) == contents(tmp_path / "one")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")
    assert tokenize(corpus, out, shard_seconds=20.0).complete


def test_damaged_work_is_done_again(tmp_path, corpus):
    tokenize(corpus, tmp_path / "one", shard_seconds=20.0)
    out = tmp_path / "two"
    tokenize(corpus, out, shard_seconds=20.0, rank=0, world=2)
    (work,) = (out / ".work").iterdir()
    parts = sorted(work.glob("*.part"))
    parts[0].write_bytes(b"damaged")
    parts[1].unlink()
    (work / f"{parts[2].stem}.json").write_text("{")
    (work / "seconds.npy").write_bytes(b"")
    assert tokenize(corpus, out, shard_seconds=20.0).complete
    assert contents(out) == contents(tmp_path / "one")


def test_another_jobs_folder_is_left_alone(tmp_path, corpus):
    out = tmp_path / "out"
    tokenize(corpus / "speaker1", out)
    before = contents(out)
    with pytest.raises(OutputError, match="another job"):
        tokenize(corpus / "speaker2", out)
    assert contents(out) == before
    tokenize(corpus / "speaker2", out, overwrite=True)
    assert contents(out) != before
    partly = tmp_path / "partly"
    tokenize(corpus, partly, shard_seconds=20.0, rank=0, world=2)
    with pytest.raises(OutputError, match="another job"):
        tokenize(corpus / "speaker2", partly)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        tokenize(corpus, tmp_path / "file")
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "part-00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(OutputError, match="no job of this tool"):
        tokenize(corpus, stray)
    (stray / "tokenizer.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="no job wrote"):
            tokenize(corpus, stray, overwrite=overwrite)
    assert (stray / "part-00000.parquet").read_bytes() == b"somebody's"


def test_overwriting(tmp_path, corpus):
    """Another format's files go, a tree of arrays stays, a finished job is done anew, deleted parts are noticed."""
    out = tmp_path / "out"
    tokenize(corpus / "speaker1", out, output_format="km")
    (out / "mine.txt").write_text("keep")
    tokenize(corpus / "speaker1", out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"part-00000.parquet", "tokenizer.json", "mine.txt"}
    before = contents(out)
    assert tokenize(corpus / "speaker1", out, overwrite=True).audio_seconds > 0
    assert contents(out) == before
    (out / "part-00000.parquet").unlink()
    assert tokenize(corpus / "speaker1", out).complete
    assert contents(out) == before
    tokenize(corpus / "speaker1", tmp_path / "tree", output_format="npy")
    for output_format in ("parquet", "npy"):
        with pytest.raises(OutputError, match="by hand"):
            tokenize(corpus / "speaker1", tmp_path / "tree", output_format=output_format, overwrite=True)


def test_one_job_never_takes_anothers_shards(tmp_path, corpus):
    """Job A goes on after B replaced it: A fails, and B's output is B's."""
    from speechtok.corpus.ledger import Ledger

    out = tmp_path / "out"
    first, second = Ledger(out, "a" * 32, "parquet"), Ledger(out, "b" * 32, "parquet")
    first.open()
    second.open(overwrite=True)
    with pytest.raises(OSError):
        first.commit(0, [], [], 0.0, {})
    assert second.marker(0) is None
    with pytest.raises(OutputError, match="another job"):
        first.open()


def test_two_processes_with_the_same_job(tmp_path, corpus):
    """Started twice by mistake: both end well, with one output."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    tokenize(corpus, tmp_path / "one", shard_seconds=6.0)
    for output_format in ("parquet", "km"):
        job = {"source": str(corpus), "shard_seconds": 6.0, "out": str(tmp_path / output_format)}
        both = [start(script, job, output_format=output_format) for _ in range(2)]
        for process in both:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        assert not (tmp_path / output_format / ".work").exists()
    assert contents(tmp_path / "parquet") == contents(tmp_path / "one")


def test_an_output_inside_the_input_is_not_input(tmp_path, corpus):
    folder = shutil.copytree(corpus / "speaker1", tmp_path / "in")
    first = tokenize(folder, folder / "units")
    again = tokenize(f"{tmp_path}/x/../in", folder / "units")
    assert again.complete
    assert (again.files, again.audio_seconds) == (first.files, 0)


def test_repeating_a_finished_job_changes_nothing(tmp_path, corpus):
    tokenize(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = tokenize(corpus, tmp_path / "out")
    assert (again.files, again.failed, again.complete, again.audio_seconds) == (120, 3, True, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
