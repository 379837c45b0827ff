"""The command line: each command on real files, its exit status, and what it says when things are wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from speechtok.cli import app, main
from typer.testing import CliRunner

import speechtok
from speechtok.corpus.rows import read_parts
from speechtok.registry import DEFAULT
from speechtok.tokenizer import Tokenizer

from .conftest import segmented


@pytest.fixture(scope="module")
def tokenizer():
    """What the commands use where nothing is said."""
    return speechtok.load(DEFAULT)


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


def failing(monkeypatch, capsys, *arguments):
    """Exit status and standard error of the entry point."""
    monkeypatch.setattr(sys, "argv", ["speechtok", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def mixed(tmp_path, clips):
    """Two good clips and a broken one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(clips.iterdir())[:2]:
        shutil.copy(path, folder)
    (folder / "broken.wav").write_bytes(b"")
    return folder


def test_tokenize(tmp_path, clips, tokenizer):
    result = run("tokenize", clips, "-o", tmp_path / "out", "--json", tmp_path / "x" / "facts.json", "--log", "json")
    assert result.exit_code == 0
    facts = json.loads((tmp_path / "x" / "facts.json").read_text())
    assert facts["files"] == 6
    assert facts["failed"] == 0
    assert facts["audio_seconds_per_second"] > 0
    stages = [json.loads(line)["stage"] for line in result.stderr.splitlines() if line.startswith("{")]
    assert stages[0] == "scan"
    assert "run" in stages
    rows = list(read_parts(tmp_path / "out"))
    for row in rows:
        path = clips / row.path
        assert np.array_equal(row.ids, tokenizer.encode(path).ids)
        assert (row.sample_rate, row.num_samples) == (soundfile.info(path).samplerate, len(soundfile.read(path)[0]))
    description = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    for field in (
        "name",
        "fingerprint",
        "encoder",
        "layer",
        "vocab_size",
        "hop_seconds",
        "offset_seconds",
        "sample_rate",
    ):
        assert field in description
    names = pq.read_schema(tmp_path / "out" / "part-00000.parquet").names
    assert names == ["key", "path", "sample_rate", "num_samples", "units", "durations", "starts", "ends", "codebooks"]
    assert "nothing to do" in run("tokenize", clips, "-o", tmp_path / "out").stdout


def test_some_files_failed_is_status_3(tmp_path, mixed):
    result = run("tokenize", mixed, "-o", tmp_path / "out", "--log", "plain")
    assert result.exit_code == 3
    assert "errors.jsonl" in result.stdout
    assert run("tokenize", mixed, "-o", tmp_path / "quiet", "--log", "quiet").stdout == ""
    assert run("tokenize", mixed, "-o", tmp_path / "bar", "--log", "bar").exit_code == 3


def test_one_file_and_two_workers(tmp_path, clip, clips):
    assert run("tokenize", clip, "-o", tmp_path / "one").exit_code == 0
    run("tokenize", clips, "-o", tmp_path / "two", "--workers", 2, "--shard-seconds", 5)
    run("tokenize", clips, "-o", tmp_path / "three", "--shard-seconds", 5)
    for path in (tmp_path / "three").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_user_errors_are_status_1(tmp_path, clips, monkeypatch, capsys):
    for arguments, words in [
        (("tokenize", tmp_path / "nowhere", "-o", tmp_path / "o"), "nowhere"),
        (("tokenize", clips, "-o", tmp_path / "o", "-t", "no-such-name"), "mfcc-k100"),
        (("tokenize", clips, "-o", tmp_path / "o", "-f", "zip"), "parquet"),
        (("show", tmp_path / "nowhere.wav"), "No such file"),
        (("convert", clips, "-o", tmp_path / "o", "-f", "km"), "tokenizer.json"),
        (("fit", clips, "-o", tmp_path / "o", "--encoder", "no-such-encoder"), "no-such-encoder"),
        (("fit", clips, "-o", tmp_path / "o", "-k", 10**6), "fewer than"),
    ]:
        status, error = failing(monkeypatch, capsys, *arguments)
        assert status == 1
        message = error.splitlines()[-1]
        assert message.startswith("speechtok: ")
        assert words in message
        assert "Traceback" not in error


def test_usage_errors_are_status_2(tmp_path):
    assert run("tokenize").exit_code == 2
    assert run("tokenize", tmp_path, "-o", tmp_path / "o", "--workers", 0).exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("--help").exit_code == 0
    assert run("--version").stdout.startswith("speechtok ")
    for command in ("tokenize", "fit", "models", "show", "stream", "verify", "convert"):
        assert run(command, "--help").exit_code == 0


def test_fit_then_use(tmp_path, clips, clip, monkeypatch, capsys):
    arguments = ["fit", clips, "-k", 12, "--standardize", "--sample-frames", 1500, "--json", tmp_path / "fit.json"]
    result = run(*arguments, "-o", tmp_path / "mine")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "fit.json").read_text())
    assert report["frames sampled"] == 1500
    assert report["dead clusters"] == 0
    assert run("tokenize", clips, "-o", tmp_path / "out", "-t", tmp_path / "mine").exit_code == 0
    run(*arguments, "-o", tmp_path / "again" / "mine")
    same = [(tmp_path / x / "tokenizer.json").read_bytes() for x in ("mine", "again/mine")]
    assert same[0] == same[1], "a fit with the same seed gives the same tokenizer, to the bit"
    status, error = failing(monkeypatch, capsys, *arguments, "-o", tmp_path / "mine")
    assert status == 1
    assert "holds a tokenizer already" in error
    run(*arguments, "-o", tmp_path / "other", "--seed", 1)
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() != same[0]


def test_models(tmp_path):
    result = run("models", "--json", tmp_path / "models.json")
    assert "mfcc-k100" in result.stdout
    rows = json.loads((tmp_path / "models.json").read_text())
    assert {"name", "rate", "vocab_size", "bitrate", "megabytes", "licence", "status"} <= set(rows[0])


def test_show(tmp_path, clip, monkeypatch, capsys):
    result = run("show", clip, "-o", tmp_path / "a.png", "--start", 1, "--seconds", 2, "--json", tmp_path / "a.json")
    assert result.exit_code == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert runs[0]["end"] > 1
    assert runs[-1]["start"] < 3
    status, error = failing(monkeypatch, capsys, "show", clip, "-o", tmp_path / "b.png", "--start", 100)
    assert status == 1
    assert "behind its end" in error


def lines_of(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_stream_raw_and_wav(clip, tokenizer, clip_wave, monkeypatch, capsys):
    expected = tokenizer.encode(clip).ids.tolist()
    pcm = soundfile.read(clip, dtype="int16")[0].tobytes()
    result = run("stream", "--rate", 16000, stdin=pcm)
    assert [unit for line in lines_of(result) for unit in line["units"]] == expected
    wav = io.BytesIO()
    soundfile.write(wav, clip_wave, 16000, format="WAV", subtype="FLOAT")
    result = run("stream", stdin=wav.getvalue())
    assert [unit for line in lines_of(result) for unit in line["units"]] == expected
    starts = [line["start"] for line in lines_of(result)]
    assert starts == sorted(starts)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"not a wav stream at all")))
    status, error = failing(monkeypatch, capsys, "stream")
    assert status == 1
    assert "RIFF" in error


@pytest.fixture(scope="module")
def of_segments(tmp_path_factory, bases, clip_wave):
    """A bundle whose units are segments."""
    return segmented(bases["chunked"], clip_wave).save(tmp_path_factory.mktemp("segments") / "tiny")


def test_show_segments(tmp_path, clip, of_segments):
    """The table lists segments as they are; the picture is drawn with silence units in it."""
    result = run("show", clip, "-t", of_segments, "-o", tmp_path / "a.png", "--json", tmp_path / "a.json")
    assert result.exit_code == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    facts = json.loads((tmp_path / "a.json").read_text())
    tokenizer = Tokenizer.load(of_segments)
    units = tokenizer.encode(clip)
    silences = int((units.ids == tokenizer.silence_unit).sum())
    assert [segment["unit"] for segment in facts["segments"]] == units.ids.tolist()
    assert [segment["start"] for segment in facts["segments"]] == units.starts_seconds.round(4).tolist()
    assert [segment["frames"] for segment in facts["segments"]] == ((units.ends - units.starts) // 320).tolist()
    assert (facts["units"], facts["silence units"]) == (len(units), silences)
    assert silences > 0
    assert f"{len(units) - 20} more segments" in result.stdout


def test_stream_segments(clip, of_segments):
    units = Tokenizer.load(of_segments).encode(clip)
    lines = lines_of(
        run("stream", "-t", of_segments, "--rate", 16000, stdin=soundfile.read(clip, dtype="int16")[0].tobytes())
    )
    assert len(lines) > 5
    for name, expected in (("units", units.ids), ("starts", units.starts_seconds), ("ends", units.ends_seconds)):
        assert [value for line in lines for value in line[name]] == expected.round(6).tolist()
    assert all((line["start"], line["end"]) == (line["starts"][0], line["ends"][-1]) for line in lines)


def test_verify_segments(tmp_path, clips, of_segments):
    result = run("verify", clips, "-t", of_segments, "--json", tmp_path / "v.json")
    facts = json.loads((tmp_path / "v.json").read_text())
    assert result.exit_code == 0, result.stdout
    assert [check["files_identical_rate"] for check in facts["checks"]] == [1] * 6
    assert [check["frames_identical_rate"] for check in facts["checks"]] == [1] * 6


def test_streamed_lines_come_before_the_end(clip):
    """Units arrive while the other end of the pipe is still open."""
    pcm = soundfile.read(clip, dtype="int16")[0].tobytes()
    with subprocess.Popen(
        [sys.executable, "-c", "from speechtok.cli import main; main()", "stream", "--rate", "16000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdin.write(pcm[:64000])
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        assert first["start"] == 0.0075
        process.stdin.close()
        assert len(process.stdout.read().splitlines()) > 5


def test_verify(tmp_path, clips, bidirectional, mixed):
    soundfile.write(mixed / "short.wav", np.zeros(10), 16000)
    result = run("verify", mixed, "--json", tmp_path / "v.json")
    assert result.exit_code == 3, result.stdout
    facts = json.loads((tmp_path / "v.json").read_text())
    assert facts["holds"]
    assert facts["skipped"] == 2
    assert [check["files_identical_rate"] for check in facts["checks"]] == [1] * 6
    folder = bidirectional.save(tmp_path / "tiny")
    result = run(
        "verify", clips, "-t", folder, "--window-seconds", 1, "--context-seconds", 0.2, "--json", tmp_path / "t.json"
    )
    facts = json.loads((tmp_path / "t.json").read_text())
    assert result.exit_code == 0, result.stdout
    windowed = next(check for check in facts["checks"] if "windows of 1 s" in check["name"])
    assert 0 < windowed["frames_identical_rate"] < 1, "an approximation, reported as one"
    assert facts["max_feature_difference"] < 5e-6


@pytest.mark.parametrize(
    "output_format", ["parquet", "jsonl", "km", "textless", "slamkit", "npy", "webdataset", "kaldi"]
)
def test_convert_equals_the_direct_way(tmp_path, clips, output_format, monkeypatch, capsys):
    run("tokenize", clips, "-o", tmp_path / "parquet")
    run("tokenize", clips, "-o", tmp_path / "direct", "-f", output_format)
    result = run("convert", tmp_path / "parquet", "-o", tmp_path / "converted", "-f", output_format)
    assert result.exit_code == 0
    names = {p.relative_to(tmp_path / "direct") for p in (tmp_path / "direct").rglob("*") if p.is_file()}
    assert names == {p.relative_to(tmp_path / "converted") for p in (tmp_path / "converted").rglob("*") if p.is_file()}
    for name in names:
        if name.suffix == ".parquet":
            assert pq.read_table(tmp_path / "direct" / name).equals(pq.read_table(tmp_path / "converted" / name))
        elif name.name != "tokenizer.json":
            assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name
    if output_format == "km":  # what convert wrote is nobody's finished job
        status, error = failing(monkeypatch, capsys, "tokenize", clips, "-o", tmp_path / "converted")
        assert (status, "no job wrote" in error) == (1, True)
    status, error = failing(
        monkeypatch, capsys, "convert", tmp_path / "parquet", "-o", tmp_path / "converted", "-f", "km"
    )
    assert status == 1
    assert "not empty" in error


def test_interrupt_keeps_the_work(tmp_path, clips):
    """Ctrl-C: status 130, one line, no traceback; the same command then finishes."""
    manifest = tmp_path / "many.jsonl"
    files = sorted(clips.iterdir())
    manifest.write_text(
        "\n".join(json.dumps({"path": str(p), "key": f"{i}/{p.stem}"}) for i in range(150) for p in files)
    )
    command = [sys.executable, "-c", "from speechtok.cli import main; main()", "tokenize", str(manifest), "-o"]
    command += [str(tmp_path / "out"), "--shard-seconds", "30", "--log", "plain"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob(".work/*/*.part")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert run("tokenize", manifest, "-o", tmp_path / "out", "--shard-seconds", 30).exit_code == 0
    assert len(list(read_parts(tmp_path / "out"))) == 900
