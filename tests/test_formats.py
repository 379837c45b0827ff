"""Units written for other toolkits, read back by small readers made from those toolkits' own definitions."""

import errno
import io
import itertools
import json
import os
import re
import tarfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.corpus import writers
from speechtok.corpus.formats import FORMATS, check_name, read, write
from speechtok.corpus.rows import SCHEMA, Row
from speechtok.corpus.sources import scan
from speechtok.errors import FormatError, InputError, OutputError, SpeechtokError
from speechtok.units import Units

DESCRIPTION = {"name": "mfcc-100", "fingerprint": "f" * 16, "vocab_size": 100, "hop_seconds": 0.02}
LINE_FORMATS = [name for name, entry in FORMATS.items() if not entry.codebooks]
ARRAY_FORMATS = [name for name, entry in FORMATS.items() if entry.codebooks]


def frames(key, ids, path=None, samples=16000):
    ids = np.array(ids, np.int32)
    starts = np.arange(ids.shape[-1]) * 320
    units = Units(ids, starts, starts + 320, 16000, 100, "f" * 16)
    return Row.from_units(key, path or f"{key}.wav", 16000, samples, units)


def segments(key="seg", ids=(5, 5, 7), durations=(2, 4, 3)):
    starts, ends = np.array([0.0, 0.1, 0.3])[: len(ids)], np.array([0.1, 0.25, 1 / 3])[: len(ids)]
    return Row(key, f"{key}.wav", 16000, 16000, np.array(ids, np.int32), np.array(durations, np.int32), starts, ends)


ROWS = [
    frames("b/one", [3, 3, 3, 49, 7, 7]),
    frames("a", [99], samples=400),
    frames("empty", [], samples=1),
    frames("ünï/漢字", [0, 0, 1, 0], samples=12345),
]
WITH_UNITS = [row for row in ROWS if len(row.units)]
CODEBOOKS = [frames("k/t", [[1, 1, 2], [3, 4, 4]]), frames("k/empty", np.zeros((2, 0)))]


def fitting(name):
    """Rows that a format can hold."""
    return WITH_UNITS if name == "km" else ROWS


def same(left, right):
    for name in ("key", "path", "sample_rate", "num_samples", "codebooks"):
        assert getattr(left, name) == getattr(right, name)
    for name in ("units", "durations", "starts", "ends"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))
    return True


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_of_segments():
    """Neighbours of one id stay apart; spans become seconds and frames."""
    ids, starts, ends = [5, 5, 7], [40, 1000, 1640], [680, 1640, 1960]
    units = Units(ids, starts, ends, 16000, 100, "f" * 16)
    row = Row.from_units("a", "a.wav", 8000, 4000, units, 320)
    assert (row.units.tolist(), row.durations.tolist(), row.ids.tolist()) == (ids, [2, 2, 1], ids)
    assert (row.starts * 16000).tolist() == starts
    assert (row.ends * 16000).tolist() == ends
    assert row.durations.dtype == row.units.dtype == np.int32
    assert Row.from_units("a", "a.wav", 8000, 4000, units).units.tolist() == [5, 7], "the tokenizer says what they are"


# independent readers


def read_hubert(folder):
    """fairseq's HubertDataset: a manifest, labels line by line, and a dictionary."""
    with open(folder / "units.tsv", encoding="utf-8") as file:
        root = file.readline().strip()
        names, sizes = [], []
        for line in file:
            items = line.strip().split("\t")
            assert len(items) == 2
            names.append(items[0])
            sizes.append(int(items[1]))
    with open(folder / "units.km", encoding="utf-8") as file:
        labels = [line.rstrip() for line in file]
    assert len(labels) == len(names)
    with open(folder / "dict.km.txt", encoding="utf-8") as file:
        symbols = []
        for line in file:
            symbol, count = line.rstrip().rsplit(" ", 1)
            assert int(count) == 1
            symbols.append(symbol)
    assert len(set(symbols)) == len(symbols)
    for label in labels:
        assert set(label.split()) <= set(symbols)
    return root, names, sizes, [[int(unit) for unit in label.split()] for label in labels], symbols


def read_textless(path):
    found = {}
    for line in path.read_text("utf-8").split("\n")[:-1]:
        name, values = line.split("\t")
        found[name] = [int(value) for value in values.split(" ") if value]
    return found


def read_webdataset(path):
    """Samples as the webdataset package groups them: consecutive members up to the first dot of the base name."""
    samples = []
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name).groups()
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            assert extension not in samples[-1]
            samples[-1][extension] = tar.extractfile(member).read()
    return samples


# each format


def test_parquet(tmp_path):
    paths = write("parquet", iter([*ROWS, segments(), *CODEBOOKS]), tmp_path / "new/out", DESCRIPTION, "/data")
    assert [path.name for path in paths] == ["part-00000.parquet"]
    table = pq.read_table(paths[0])
    assert table.schema.remove_metadata() == SCHEMA
    assert table.schema.metadata == {
        b"speechtok.tokenizer": b"mfcc-100",
        b"speechtok.fingerprint": b"f" * 16,
        b"speechtok.root": b"/data",
    }
    assert table.column("units").to_pylist()[0] == [3, 49, 7]
    assert table.column("durations").to_pylist()[0] == [3, 1, 2]
    assert all(map(same, read(tmp_path / "new/out"), [*ROWS, segments(), *CODEBOOKS]))


def test_parquet_with_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    write("parquet", ROWS, tmp_path / "out", DESCRIPTION, "/data")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/part-*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["key"][:] == [row.key for row in ROWS]
    assert loaded["units"][:] == [row.units.tolist() for row in ROWS]


def test_parquet_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ROWS_PER_PART", 3)
    rows = [frames(f"{n}", [n]) for n in range(7)]
    assert len(write("parquet", rows, tmp_path, DESCRIPTION, "")) == 3
    assert [row.key for row in read(tmp_path)] == [f"{n}" for n in range(7)]


def test_jsonl(tmp_path):
    odd = frames("new\nline/tab\t/\u2028/\x85", [1], path="new\nline.wav")
    rows = [*ROWS, segments(), segments("silent", (), ()), *CODEBOOKS, odd]
    (path,) = write("jsonl", rows, tmp_path, DESCRIPTION, "/data")
    text = path.read_text("utf-8")
    assert path.name == "units.jsonl"
    assert len(text.splitlines()) == len(rows) == text.count("\n")
    assert "漢字" in text
    first = json.loads(text.split("\n")[0])
    assert first == {
        "key": "b/one",
        "path": "b/one.wav",
        "sample_rate": 16000,
        "num_samples": 16000,
        "units": [3, 49, 7],
        "durations": [3, 1, 2],
    }
    assert all(map(same, read(tmp_path), rows))
    assert all(map(same, read(path), rows))


def test_jsonl_with_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    (path,) = write("jsonl", ROWS, tmp_path, DESCRIPTION, "/data")
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["units"][:] == [row.units.tolist() for row in ROWS]


def test_km(tmp_path):
    paths = write("km", WITH_UNITS, tmp_path, DESCRIPTION, "/data")
    assert [path.name for path in paths] == ["units.km", "dict.km.txt", "units.tsv"]
    root, names, sizes, labels, symbols = read_hubert(tmp_path)
    assert root == "/data"
    assert names == [row.path for row in WITH_UNITS]
    assert sizes == [row.num_samples for row in WITH_UNITS]
    assert labels == [row.ids.tolist() for row in WITH_UNITS]
    assert symbols == [str(unit) for unit in range(100)]


def test_km_manifest_can_be_scanned_again(tmp_path):
    for row in WITH_UNITS:
        (tmp_path / "data" / row.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / row.path).touch()
    write("km", WITH_UNITS, tmp_path, DESCRIPTION, str(tmp_path / "data"))
    assert [utterance.key for utterance in scan(tmp_path / "units.tsv").utterances] == [row.key for row in WITH_UNITS]


def test_km_of_segments_and_of_an_unknown_root(tmp_path):
    write("km", [segments()], tmp_path, DESCRIPTION, "")
    root, _, _, labels, _ = read_hubert(tmp_path)
    assert (root, labels) == (".", [[5, 5, 7]])


def test_km_refuses_what_it_cannot_say(tmp_path):
    with pytest.raises(FormatError, match="line end"):
        write("km", ROWS, tmp_path, DESCRIPTION, "/da\nta")
    for description in ({}, {"vocab_size": "100"}, {"vocab_size": 0}):
        with pytest.raises(FormatError, match="vocab_size"):
            write("km", ROWS, tmp_path, description, "/data")
    for row in (ROWS[2], segments(ids=(), durations=())):
        with pytest.raises(FormatError, match="no units"):
            write("km", [ROWS[0], row], tmp_path, DESCRIPTION, "/data")
    assert files(tmp_path) == {}


def test_textless(tmp_path):
    write("textless", [*ROWS, segments()], tmp_path, DESCRIPTION, "/data")
    units, durations = read_textless(tmp_path / "units.units"), read_textless(tmp_path / "units.durations")
    assert list(units) == list(durations) == [row.key for row in [*ROWS, segments()]]
    for row in ROWS:
        assert np.repeat(units[row.key], durations[row.key]).astype(int).tolist() == row.ids.tolist()
        assert all(a != b for a, b in itertools.pairwise(units[row.key]))
    assert (units["seg"], durations["seg"]) == ([5, 5, 7], [2, 4, 3])
    assert (tmp_path / "units.units").read_text("utf-8").startswith("b/one\t3 49 7\n")


def test_slamkit(tmp_path):
    write("slamkit", [*ROWS, segments()], tmp_path, DESCRIPTION, "/data")
    features = [json.loads(line) for line in (tmp_path / "features.jsonl").read_text("utf-8").splitlines()]
    tokens = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text("utf-8").splitlines()]
    assert features[0] == {"units": [3, 49, 7], "duration": [3, 1, 2], "file_name": "b/one.wav"}
    assert tokens[0] == {"file_name": "b/one.wav", "audio_repr": "<Un3><Un49><Un7>"}
    for feature, token in zip(features, tokens, strict=True):
        assert [int(unit) for unit in re.findall(r"<Un(\d+)>", token["audio_repr"])] == feature["units"]
        assert feature["file_name"] == token["file_name"]


def test_npy(tmp_path):
    paths = write("npy", [*ROWS, segments(), *CODEBOOKS], tmp_path, DESCRIPTION, "/data")
    for path, row in zip(paths, [*ROWS, segments(), *CODEBOOKS], strict=True):
        assert path == tmp_path / f"{row.key}.npy"
        ids = np.load(path, allow_pickle=False)
        assert ids.dtype == np.int32
        assert ids.shape == row.ids.shape
        assert np.array_equal(ids, row.ids)


def test_webdataset(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ROWS_PER_PART", 3)
    rows = [*ROWS, segments(), *CODEBOOKS, frames("d.ot/" + "n" * 120, [1]), frames("x" * 95 + "ü", [2])]
    paths = write("webdataset", rows, tmp_path, DESCRIPTION, "/data")
    assert [path.name for path in paths] == ["units-00000.tar", "units-00001.tar", "units-00002.tar"]
    samples = [sample for path in paths for sample in read_webdataset(path)]
    assert [sample["__key__"] for sample in samples] == [row.key for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        ids = np.load(io.BytesIO(sample["units.npy"]), allow_pickle=False)
        assert np.array_equal(ids, row.ids)
        facts = json.loads(sample["json"])
        assert facts["fingerprint"] == "f" * 16
        assert facts["tokenizer"] == "mfcc-100"
        assert (facts["path"], facts["num_samples"]) == (row.path, row.num_samples)
    assert json.loads(samples[4]["json"])["durations"] == [2, 4, 3]
    with tarfile.open(paths[0]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_kaldi(tmp_path):
    rows = [frames(key, [n, n, 2]) for n, key in enumerate(["b", "a-b", "a", "Z", "ü", "aa/b"])]
    write("kaldi", [*rows, frames("e", [])], tmp_path, DESCRIPTION, "/data")
    text = (tmp_path / "text").read_bytes().decode().split("\n")[:-1]
    found = {line.split(maxsplit=1)[0]: [int(unit) for unit in line.split()[1:]] for line in text}
    assert found == {"e": [], **{row.key: row.ids.tolist() for row in rows}}
    names = [line.split(" ")[0].encode() for line in text]
    assert names == sorted(names)  # LC_ALL=C
    seconds = [line.split(" ") for line in (tmp_path / "utt2dur").read_text("utf-8").splitlines()]
    assert [name.encode() for name, _ in seconds] == names
    assert all(float(value) == 1.0 for _, value in seconds)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows(tmp_path, name):
    paths = write(name, [], tmp_path, DESCRIPTION, "/data")
    assert bool(paths) == (name != "npy")
    if name in ("parquet", "jsonl"):
        assert list(read(tmp_path)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_same_rows_same_bytes(tmp_path, name):
    for folder in ("one", "two"):
        write(name, iter(fitting(name)), tmp_path / folder, DESCRIPTION, "/data")
    write(name, fitting(name), tmp_path / "two", DESCRIPTION, "/data")  # over what is there
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not [path for path in files(tmp_path) if path.endswith(".tmp")]


# several codebooks


@pytest.mark.parametrize("name", LINE_FORMATS)
def test_codebooks_that_do_not_fit(tmp_path, name):
    with pytest.raises(FormatError, match="parquet, jsonl, npy, webdataset"):
        write(name, [ROWS[0], *CODEBOOKS], tmp_path, DESCRIPTION, "/data")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("name", LINE_FORMATS)
def test_one_codebook_fits_everywhere(tmp_path, name):
    write(name, [replace(frames("b/one", [[3, 3, 3, 49, 7, 7]]))], tmp_path / "codec", DESCRIPTION, "/data")
    write(name, [ROWS[0]], tmp_path / "plain", DESCRIPTION, "/data")
    assert files(tmp_path / "codec") == files(tmp_path / "plain")


# names


@pytest.mark.parametrize(
    ("name", "key", "path", "word"),
    [
        ("km", "a", "a\tb.wav", "tab"),
        ("km", "a", "a\nb.wav", "line end"),
        ("km", "a", "a\rb.wav", "line end"),
        ("km", "a", " a.wav", "white space"),
        ("textless", "a\tb", "x", "tab"),
        ("textless", "a\nb", "x", "line end"),
        ("textless", " a", "x", "white space"),
        ("kaldi", "a b", "x", "white space"),
        ("kaldi", "a\u3000b", "x", "white space"),
        ("npy", "a.npy/b", "x", "npy"),
        ("npy", "n" * 252, "x", "longer"),
        ("npy", "ü" * 127, "x", "longer"),
        ("webdataset", "d/a.b", "x", "'.'"),
        ("webdataset", "a\nb", "x", "line end"),
        *((name, "../x", "x", "'..'") for name in FORMATS),
        *((name, "/x", "x", "empty") for name in FORMATS),
        *((name, "", "x", "empty") for name in FORMATS),
        *((name, "a\0b", "x", "NUL") for name in FORMATS),
        *((name, "a", "\udce9", "UTF-8") for name in FORMATS),
        *((name, "a", "", "empty path") for name in FORMATS),
    ],
)
def test_names_that_cannot_be_stored(tmp_path, name, key, path, word):
    reason = check_name(name, key, path)
    assert reason is not None
    assert word in reason
    with pytest.raises(FormatError):
        write(name, [ROWS[1], replace(ROWS[0], key=key, path=path)], tmp_path / "out", DESCRIPTION, "/data")
    assert set(files(tmp_path)) <= {"out/a.npy"}


@pytest.mark.parametrize(
    ("name", "key", "path"),
    [
        ("km", "a\tb", "a b.wav"),
        ("textless", "a b", "a\tb.wav"),
        ("slamkit", "a\n", "a\tb\n.wav"),
        ("jsonl", "a\n\u2028", "a\tb"),
        ("parquet", "a\n", "a\tb"),
        ("npy", "a b\n.c", "x"),
        ("webdataset", "d.e/a b", "x.y.wav"),
        ("kaldi", "a/b.c", "x y\n"),
        ("npy", "n" * 251, "x"),
    ],
)
def test_names_that_can(tmp_path, name, key, path):
    assert check_name(name, key, path) is None
    assert write(name, [replace(ROWS[0], key=key, path=path)], tmp_path, DESCRIPTION, "/data")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(min_size=1, max_size=6), st.text(min_size=1, max_size=6)), max_size=4))
def test_whatever_passes_the_name_check_comes_back(tmp_path_factory, names):
    for name in ("km", "textless", "kaldi", "webdataset"):
        rows, seen = [], set()
        for number, (key, path) in enumerate(names):
            if key not in seen and check_name(name, key, path) is None:
                seen.add(key)
                rows.append(replace(frames("x", [number, number, 1]), key=key, path=path))
        folder = tmp_path_factory.mktemp("names")
        write(name, rows, folder, DESCRIPTION, "/data")
        if name == "km":
            assert read_hubert(folder)[1] == [row.path for row in rows]
        elif name == "textless":
            assert read_textless(folder / "units.units") == {row.key: row.units.tolist() for row in rows}
        elif name == "kaldi":
            lines = (folder / "text").read_bytes().decode().split("\n")[:-1]
            assert {line.split(maxsplit=1)[0] for line in lines} == {row.key for row in rows}
        else:
            samples = read_webdataset(folder / "units-00000.tar")
            assert [sample["__key__"] for sample in samples] == [row.key for row in rows]


def test_unknown_format(tmp_path):
    with pytest.raises(FormatError, match="webdataset"):
        write("csv", [], tmp_path, DESCRIPTION, "")
    with pytest.raises(FormatError, match="webdataset"):
        check_name("csv", "a", "b")


@pytest.mark.parametrize("name", ["npy", "webdataset", "kaldi"])
def test_a_key_twice(tmp_path, name):
    with pytest.raises(FormatError, match="twice"):
        write(name, [ROWS[1], ROWS[1]], tmp_path, DESCRIPTION, "/data")


# rows that do not hold together


@pytest.mark.parametrize(
    "changes",
    [
        {"units": np.array([100], np.int32), "durations": np.array([1], np.int32)},
        {"units": np.array([-1], np.int32), "durations": np.array([1], np.int32)},
        {"durations": np.array([1, 2], np.int32)},
        {"durations": np.array([1, 0, 2], np.int32)},
        {"durations": np.array([1, 2**31 - 1, 2**31 - 1], np.int32)},
        {"durations": None, "codebooks": 2},
        {"durations": None, "codebooks": 0},
        {"codebooks": 1},
        {"starts": np.zeros(3)},
        {"starts": np.zeros(3), "ends": np.array([0, 1, np.nan])},
        {"sample_rate": 0},
        {"num_samples": -1},
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_do_not_fit_together(tmp_path, name, changes):
    with pytest.raises(FormatError, match="'b/one'"):
        write(name, [replace(ROWS[0], **changes)], tmp_path, DESCRIPTION, "/data")
    assert files(tmp_path) == {}


# failures while writing


@pytest.mark.parametrize("name", FORMATS)
def test_full_disk(tmp_path, monkeypatch, name):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out.*No space left"):
        write(name, fitting(name), tmp_path / "out", DESCRIPTION, "/data")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("name", FORMATS)
def test_output_in_the_way(tmp_path, name):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="out"):
        write(name, fitting(name), tmp_path / "out", DESCRIPTION, "/data")
    targets = write(name, fitting(name), tmp_path / "ok", DESCRIPTION, "/data")
    blocked = tmp_path / "dir" / targets[-1].relative_to(tmp_path / "ok")
    (blocked / "x").mkdir(parents=True)
    with pytest.raises(OutputError, match=re.escape(str(blocked))):
        write(name, fitting(name), tmp_path / "dir", DESCRIPTION, "/data")
    assert not [path for path in files(tmp_path / "dir") if path.endswith(".tmp")]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_half_written_when_the_rows_fail(tmp_path, name):
    def rows():
        yield ROWS[0]
        raise InputError("the input broke")

    with pytest.raises(InputError):
        write(name, rows(), tmp_path, DESCRIPTION, "/data")
    assert set(files(tmp_path)) <= {"b/one.npy"}  # whole arrays may stay


def test_files_are_hidden_until_they_are_whole(tmp_path):
    def rows():
        yield ROWS[0]
        assert all(path.startswith(".") for path in files(tmp_path))
        yield ROWS[1]

    write("km", rows(), tmp_path, DESCRIPTION, "/data")
    assert set(files(tmp_path)) == {"units.km", "dict.km.txt", "units.tsv"}


# reading


@pytest.mark.parametrize("start", ["parquet", "jsonl"])
@pytest.mark.parametrize("end", FORMATS)
def test_convert(tmp_path, start, end):
    rows = [*fitting(end), segments()]
    write(start, rows, tmp_path / "first", DESCRIPTION, "/data")
    write(end, read(tmp_path / "first"), tmp_path / "second", DESCRIPTION, "/data")
    write(end, rows, tmp_path / "direct", DESCRIPTION, "/data")
    assert files(tmp_path / "second") == files(tmp_path / "direct")


@pytest.mark.parametrize("name", ARRAY_FORMATS)
def test_convert_codebooks(tmp_path, name):
    write("jsonl", CODEBOOKS, tmp_path / "first", DESCRIPTION, "/data")
    write(name, read(tmp_path / "first"), tmp_path / "second", DESCRIPTION, "/data")
    write(name, CODEBOOKS, tmp_path / "direct", DESCRIPTION, "/data")
    assert files(tmp_path / "second") == files(tmp_path / "direct")


def test_sources_without_units(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "gone")
    with pytest.raises(InputError, match="neither"):
        read(tmp_path)
    (tmp_path / "units.km").write_text("1 2\n")
    with pytest.raises(InputError, match="neither"):
        list(read(tmp_path / "units.km"))


GOOD = {"key": "a", "path": "a.wav", "sample_rate": 16000, "num_samples": 1, "units": [1, 2], "durations": [1, 1]}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"units": None}, "lacks units"),
        ({"key": None, "path": None}, "lacks key, path"),
        ({"key": 3}, "key must be text"),
        ({"sample_rate": 16000.0}, "sample_rate must be"),
        ({"num_samples": True}, "num_samples must be"),
        ({"codebooks": "2"}, "codebooks must be"),
        ({"units": "1 2"}, "units must be"),
        ({"units": [1, 2.5]}, "units must be"),
        ({"units": [1, True]}, "units must be"),
        ({"units": [[1], [2]]}, "units must be"),
        ({"units": [1, 2**31]}, "out of range"),
        ({"units": [1, 10**400]}, "out of range"),
        ({"starts": [0, 10**400], "ends": [1, 2]}, "out of range"),
        ({"units": [1, -2]}, "below 0"),
        ({"durations": [1]}, "2 units but 1 durations"),
        ({"durations": {}}, "durations must be"),
        ({"starts": [0, "x"]}, "starts must be"),
        ({"starts": [0.0, 0.1]}, "starts without ends"),
        ({"starts": [0, float("nan")], "ends": [1, 2]}, "not finite"),
        ({"key": "../../etc/x"}, "'..'"),
        ({"key": "\ud800"}, "UTF-8"),
        ({"path": ""}, "empty name"),
        ({"codebooks": 3, "durations": None}, "codebooks"),
    ],
)
def test_malformed_json_lines(tmp_path, changes, word):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"key": "b"} | changes) + "\n")
    with pytest.raises(FormatError, match=re.escape(word)) as caught:
        list(read(path))
    assert re.search(rf"{path} (line 3|row 2)", str(caught.value))


@pytest.mark.parametrize("line", [b"{broken", b"\xff", b"[]", b"3", b"[" * 100_000, b"9" * 5000])
def test_lines_that_are_no_objects(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(FormatError, match="line 2"):
        list(read(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"units": None}, "lacks"),
        ({"key": [3]}, "column key"),
        ({"units": ["1 2"]}, "column units"),
        ({"units": [[0.5]]}, "column units"),
        ({"units": [["a"]]}, "column units"),
        ({"num_samples": ["1"]}, "column num_samples"),
        ({"starts": [[0, 1]]}, "column starts"),
        ({"key": [None]}, "column key"),
        ({"key": pa.array([None], pa.string())}, "empty cell"),
        ({"sample_rate": pa.array([None], pa.int32())}, "empty cell"),
        ({"units": pa.array([None], pa.list_(pa.int32()))}, "empty cell"),
        ({"key": ["../x"]}, "'..'"),
        ({"durations": [[1]]}, "2 units but 1 durations"),
    ],
)
def test_malformed_parquet(tmp_path, changes, word):
    columns = {name: [value] for name, value in GOOD.items()} | changes
    table = pa.table({name: value for name, value in columns.items() if value is not None})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(FormatError, match=re.escape(word)):
        list(read(tmp_path / "x.parquet"))


def test_hostile_parquet_cannot_write_outside(tmp_path):
    columns = {name: [value] for name, value in GOOD.items()} | {"key": ["../../evil"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    from speechtok.corpus.rows import read_part

    for name in FORMATS:
        with pytest.raises(FormatError, match="component"):
            write(name, read_part(tmp_path / "x.parquet"), tmp_path / "a/b", DESCRIPTION, "/data")
    assert set(files(tmp_path)) == {"x.parquet"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=500), st.sampled_from(["x.parquet", "x.jsonl"]))
def test_random_bytes(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    with suppress(SpeechtokError):
        list(read(tmp_path / name))


# the same damage every time: a crash of pyarrow's native code should not come and go
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_parquet(tmp_path, data):
    (path,) = write("parquet", ROWS, tmp_path, DESCRIPTION, "/data")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(FormatError):
        list(read(tmp_path))
