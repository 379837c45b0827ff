"""`synthesize` and ``speechtok synth``: units of a folder to wav files."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok import hub, registry
from speechtok.corpus import synthesis
from speechtok.corpus.convert import convert
from speechtok.corpus.engine import tokenize
from speechtok.corpus.formats import read, write
from speechtok.corpus.rows import Row
from speechtok.corpus.synthesis import pcm16, synthesize, units_of
from speechtok.errors import FingerprintError, FormatError, InputError, OutputError, UnknownNameError
from speechtok.evaluation.show import draw
from speechtok.evaluation.verify import verify

from .codecs import codec, noise

RATES = {"a": 24000, "b/c": 16000, "b/d e": 44100, "short": 8000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved codec and a corpus: several rates, a sound shorter than a frame."""
    root = tmp_path_factory.mktemp("synth")
    codec().save(root / "codec")
    for seed, (key, rate) in enumerate(RATES.items()):
        path = root / "sounds" / f"{key}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(50 if key == "short" else rate + 7 * seed, seed), rate, "FLOAT")
    return root


@pytest.fixture(scope="module")
def units(folder):
    tokenize(folder / "sounds", folder / "units", tokenizer=folder / "codec")
    return folder / "units"


@pytest.fixture(autouse=True)
def _named(folder, monkeypatch):
    """The name that ``tokenizer.json`` says leads to the codec, as a shipped one's does."""
    monkeypatch.setattr(registry, "shipped", lambda: {"tiny-codec": folder / "codec"})


def wavs(folder):
    return {str(path.relative_to(folder).with_suffix("")): path.read_bytes() for path in sorted(folder.rglob("*.wav"))}


def test_rows_are_books_by_frames(folder, units):
    loaded = hub.load(folder / "codec")
    rows = {row.key: row for row in read(units)}
    assert rows.keys() == RATES.keys()
    for key, row in rows.items():
        expected = loaded.encode(folder / "sounds" / f"{key}.wav")
        assert row.codebooks == 4
        assert np.array_equal(row.ids, expected.ids)
        assert units_of(row, loaded) == expected, "the last unit ends with the sound"
    description = json.loads((units / "tokenizer.json").read_text())
    assert (description["codebooks"], description["bitrate"]) == (4, 1500.0)


def test_one_wav_for_each_row(folder, units, tmp_path):
    summary = synthesize(units, tmp_path / "wavs")
    assert (summary.files, summary.failed, summary.resumed) == (4, 0, 0)
    loaded = hub.load(folder / "codec")
    for key, rate in RATES.items():
        wave, got_rate = soundfile.read(tmp_path / "wavs" / f"{key}.wav", dtype="int16")
        expected = loaded.decode(loaded.encode(folder / "sounds" / f"{key}.wav"))
        info = soundfile.info(folder / "sounds" / f"{key}.wav")
        assert got_rate == 24000
        assert len(wave) == len(expected) == -(-info.frames * 24000 // rate)
        assert np.abs(wave / 32768 - expected).max() <= 0.51 / 32768
    assert soundfile.info(tmp_path / "wavs" / "a.wav").subtype == "PCM_16"
    assert not (tmp_path / "wavs" / "errors.jsonl").exists()


def test_again_workers_formats_and_codebooks(folder, units, tmp_path):
    synthesize(units, tmp_path / "once")
    again = synthesize(units, tmp_path / "once")
    assert (again.files, again.audio_seconds) == (4, 0)
    synthesize(units, tmp_path / "two", workers=2, tokenizer=folder / "codec")
    assert wavs(tmp_path / "two") == wavs(tmp_path / "once")
    convert(units, tmp_path / "lines", "jsonl")
    synthesize(tmp_path / "lines", tmp_path / "from-lines")
    assert wavs(tmp_path / "from-lines") == wavs(tmp_path / "once")


@pytest.mark.parametrize("books", [1, 2])
def test_fewer_codebooks(folder, tmp_path, books):
    """What ``--codebooks`` made is decoded by the whole codec, found by its name; by two processes, too."""
    for workers, name in ((1, "one"), (2, "two")):
        tokenize(
            folder / "sounds", tmp_path / name, tokenizer=folder / "codec", codebooks=books, workers=workers,
            shard_seconds=1.0,
        )  # fmt: skip
        named = None if workers == 1 else folder / "codec"  # other processes do not know the name
        synthesize(tmp_path / name, tmp_path / f"{name}-wavs", tokenizer=named, workers=workers)
    assert [row.units.tolist() for row in read(tmp_path / "one")] == [
        row.units.tolist() for row in read(tmp_path / "two")
    ]
    assert wavs(tmp_path / "one-wavs") == wavs(tmp_path / "two-wavs")
    few = hub.load(folder / "codec").with_codebooks(books)
    expected = few.decode(few.encode(folder / "sounds" / "a.wav"))
    wave, _ = soundfile.read(tmp_path / "one-wavs" / "a.wav", dtype="int16")
    assert np.abs(wave / 32768 - expected).max() <= 0.51 / 32768


def test_killed_and_resumed(units, tmp_path, monkeypatch):
    synthesize(units, tmp_path / "once")
    written = synthesis._write
    left = [2]

    def interrupted(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        written(*args)

    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthesize(units, tmp_path / "killed")
    assert len(wavs(tmp_path / "killed")) == 2
    events = []
    summary = synthesize(units, tmp_path / "killed", on_event=events.append)
    assert (summary.files, summary.resumed) == (4, 2)
    assert 0 < summary.audio_seconds < 4
    assert wavs(tmp_path / "killed") == wavs(tmp_path / "once")
    assert (tmp_path / "killed" / "synth.json").read_bytes() == (tmp_path / "once" / "synth.json").read_bytes()
    assert {event.stage for event in events} == {"decode"}
    assert events[-1].done == pytest.approx(events[-1].total, abs=0.1)
    (tmp_path / "killed" / "b" / "c.wav").unlink()
    assert synthesize(units, tmp_path / "killed").resumed == 3


def test_another_jobs_folder(folder, units, tmp_path):
    synthesize(units, tmp_path / "wavs")
    tokenize(folder / "sounds" / "b", tmp_path / "part", tokenizer=folder / "codec")
    with pytest.raises(OutputError, match="another job"):
        synthesize(tmp_path / "part", tmp_path / "wavs")
    (tmp_path / "wavs" / "notes.txt").write_text("mine")
    synthesize(tmp_path / "part", tmp_path / "wavs", overwrite=True)
    assert set(wavs(tmp_path / "wavs")) == {"c", "d e"}
    assert (tmp_path / "wavs" / "notes.txt").exists()
    # What lies where a new job writes is none of its results.
    (tmp_path / "wavs" / "a.wav").write_text("mine")
    assert synthesize(units, tmp_path / "wavs", overwrite=True).resumed == 0
    assert soundfile.info(tmp_path / "wavs" / "a.wav").frames > 0
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "x").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="no synthesis wrote"):
            synthesize(units, tmp_path / "strange", overwrite=overwrite)
    (tmp_path / "strange" / "synth.json").write_text(json.dumps({"plan": "x", "keys": ["../../x"]}))
    with pytest.raises(OutputError, match="no synthesis wrote"):
        synthesize(units, tmp_path / "strange", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        synthesize(units, tmp_path / "strange" / "x")


def test_wrong_folders(folder, units, tmp_path, clips):
    with pytest.raises(FormatError, match="no tokenizer or output folder"):
        synthesize(folder / "sounds", tmp_path / "out")
    with pytest.raises(InputError, match="neither part"):
        synthesize(folder / "codec", tmp_path / "out")
    with pytest.raises(InputError, match="workers"):
        synthesize(units, tmp_path / "out", workers=0)
    other = codec(seed=1, name="other-codec")
    with pytest.raises(FingerprintError, match="other-codec is"):
        synthesize(units, tmp_path / "out", tokenizer=other)
    with pytest.raises(FormatError, match="no decoder"):
        synthesize(units, tmp_path / "out", tokenizer=codec(decoder=False))
    with pytest.raises(FormatError, match="no decoder"):
        synthesize(units, tmp_path / "out", tokenizer=clips.parent / "mfcc-k100")
    assert not (tmp_path / "out").exists()


def test_a_name_that_leads_nowhere(folder, tmp_path):
    renamed = codec(name="renamed")
    tokenize(folder / "sounds", tmp_path / "units", tokenizer=renamed)
    with pytest.raises(UnknownNameError, match="--tokenizer"):
        synthesize(tmp_path / "units", tmp_path / "wavs")
    assert synthesize(tmp_path / "units", tmp_path / "wavs", tokenizer=folder / "codec").files == 4


def changed(source, target, change):
    """A folder whose rows were changed by hand."""
    description = json.loads((source / "tokenizer.json").read_text())
    rows = [new for row in read(source) if (new := change(row)) is not None]
    write("parquet", rows, target, description, "/")
    (target / "tokenizer.json").write_text(json.dumps(description))
    return target


def test_rows_that_cannot_be_done(units, tmp_path):
    def change(row: Row) -> Row:
        if row.key == "a":
            return replace(row, codebooks=2)
        if row.key == "b/c":
            return replace(row, key="x" * 300)
        return replace(row, units=row.units[:0]) if row.key == "short" else row

    summary = synthesize(changed(units, tmp_path / "units", change), tmp_path / "wavs")
    assert (summary.files, summary.failed) == (1, 3)
    errors = [json.loads(line) for line in (tmp_path / "wavs" / "errors.jsonl").read_text().splitlines()]
    assert [error["key"] for error in errors] == ["a", "x" * 300, "short"]
    for error, reason in zip(errors, ("2 codebooks", "name too long", "no units"), strict=True):
        assert reason in error["reason"].lower()
    assert set(wavs(tmp_path / "wavs")) == {"b/d e"}
    again = synthesize(tmp_path / "units", tmp_path / "wavs")
    assert (again.files, again.failed, again.audio_seconds) == (1, 3, 0)


def test_units_of_another_length_are_whole_frames(folder, units):
    """Of rows that a model wrote, the number of samples may say anything."""
    loaded = hub.load(folder / "codec")
    row = next(read(units))
    for samples in (0, 1, 10**6):
        made = units_of(replace(row, num_samples=samples), loaded)
        assert made.ends[-1] == 320 * len(made)


def test_nothing_leaves_the_folder(units, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.wav").write_bytes(b"")
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "wavs" / "synth.json").write_text(json.dumps({"plan": "x", "keys": ["b/kept"]}))
    summary = synthesize(units, tmp_path / "wavs", overwrite=True)
    assert (summary.files, summary.failed) == (2, 2)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["kept.wav"]
    with pytest.raises(FormatError, match="'..' component"):
        synthesize(forged(units, tmp_path / "forged", "../x"), tmp_path / "out")
    with pytest.raises(FormatError, match="twice"):
        synthesize(changed(units, tmp_path / "twice", lambda row: replace(row, key="same")), tmp_path / "out")


def forged(source, target, key):
    """A key that the writers would refuse."""
    changed(source, target, lambda row: row if row.key == "a" else None)
    shutil.rmtree(target)
    target.mkdir()
    shutil.copy(source / "tokenizer.json", target)
    row = next(read(source))
    item = {"key": key, "path": row.path, "sample_rate": 24000, "num_samples": 1, "units": [0] * 4, "codebooks": 4}
    (target / "units.jsonl").write_text(json.dumps(item) + "\n")
    return target


def test_a_full_disk_ends_the_job(units, tmp_path, monkeypatch):
    def full(*_):
        raise OutputError("no space") from OSError(28, "No space left on device")

    monkeypatch.setattr(synthesis, "_write", full)
    with pytest.raises(OutputError, match="no space"):
        synthesize(units, tmp_path / "wavs")


def test_samples_are_rounded_and_clipped(tmp_path):
    samples = np.array([0, 0.5, -1, 1, 2, -3, 1.6 / 32768], np.float32)
    (tmp_path / "x.wav").write_bytes(pcm16(samples, 24000))
    values, rate = soundfile.read(tmp_path / "x.wav", dtype="int16")
    assert values.tolist() == [0, 16384, -32768, 32767, 32767, -32768, 2]
    assert rate == 24000


def test_formats_of_one_codebook_refuse_at_once(folder, tmp_path, units):
    for name in ("km", "textless", "slamkit", "kaldi"):
        with pytest.raises(InputError, match="4 codebooks; .* holds one: use parquet, jsonl, npy, webdataset"):
            tokenize(folder / "sounds", tmp_path / name, tokenizer=folder / "codec", output_format=name)
        with pytest.raises(InputError, match="4 codebooks; .* use parquet"):
            convert(units, tmp_path / name, name)
        assert not (tmp_path / name).exists()
        tokenize(folder / "sounds", tmp_path / name, tokenizer=folder / "codec", codebooks=1, output_format=name)


@pytest.mark.parametrize("name", ["jsonl", "npy", "webdataset"])
def test_formats_of_several_codebooks(folder, tmp_path, name):
    out = tmp_path / name
    assert tokenize(folder / "sounds", out, tokenizer=folder / "codec", output_format=name).files == 4
    if name == "npy":
        assert np.load(out / "b" / "c.npy").shape == (4, 76)


def test_commands(folder, units, tmp_path):
    run = CliRunner()
    made = run.invoke(
        app,
        [
            "tokenize",
            str(folder / "sounds"),
            "-o",
            str(tmp_path / "units"),
            "-t",
            str(folder / "codec"),
            "--codebooks",
            "2",
        ],
    )
    assert made.exit_code == 0, made.output
    facts = tmp_path / "facts.json"
    command = ["synth", str(tmp_path / "units"), "-o", str(tmp_path / "wavs"), "--json", str(facts), "--log", "plain"]
    done = run.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "decoding: " in done.stderr
    assert json.loads(facts.read_text())["files"] == 4
    broken = changed(units, tmp_path / "broken", lambda row: replace(row, codebooks=2) if row.key == "a" else row)
    failed = run.invoke(app, ["synth", str(broken), "-o", str(tmp_path / "some")])
    assert failed.exit_code == 3
    assert "errors.jsonl" in failed.output.replace("\n", "")


def test_show_draws_the_first_book(folder, tmp_path):
    facts, runs = draw(folder / "sounds" / "a.wav", hub.load(folder / "codec"), tmp_path / "a.png", seconds=0.5)
    assert facts["codebooks"].startswith("4")
    assert sum(run["frames"] for run in runs) >= 37


def test_verify_holds(folder, monkeypatch):
    monkeypatch.setattr("speechtok.evaluation.verify._KILLS", 1)
    result = verify(str(folder / "sounds"), hub.load(folder / "codec"))
    assert result["holds"], result


def test_stream_command(folder):
    sound = pcm16(noise(7000), 24000)
    done = CliRunner().invoke(app, ["stream", "-t", str(folder / "codec")], input=sound)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(len(line["units"][0]) for line in lines) == 22
    assert all(len(line["units"]) == 4 for line in lines)
    assert lines[-1]["end"] == round(7000 / 24000, 6)
