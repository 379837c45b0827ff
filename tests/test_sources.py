"""What is found in folders, globs, manifests and archives, and what is refused with which reason."""

import gzip
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.audio.extensions import AUDIO_EXTENSIONS
from speechtok.corpus.sources import assign_keys, key_problem, normalise, scan
from speechtok.errors import AudioError, InputError, SpeechtokError

SUFFIXES = [".tsv", ".scp", ".jsonl", ".parquet", ".tar"]


def put(path, data=b"sound"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def wav_bytes(samples=160):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(samples), 16000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def keys(listing):
    return [utterance.key for utterance in listing.utterances]


def reasons(listing):
    return {item.path: item.reason for item in listing.rejected}


def make_tar(path, members, **options):
    """Tar of (name, bytes) or TarInfo members."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


# folders


def test_folder(tmp_path):
    for name in ("b/2.flac", "b/1.WAV", "a.mp3", "b-c/x.ogg", "notes.txt", "b/README"):
        put(tmp_path / name)
    listing = scan(tmp_path)
    assert [u.path for u in listing.utterances] == ["a.mp3", "b-c/x.ogg", "b/1.WAV", "b/2.flac"]
    assert keys(listing) == ["a", "b-c/x", "b/1", "b/2"]
    assert listing.root == str(tmp_path)
    assert listing.ignored == 2
    assert listing.rejected == []
    first = listing.utterances[0]
    assert (first.file, first.size, first.container) == (str(tmp_path / "a.mp3"), 5, "")
    assert first.open() == first.file
    assert pickle.loads(pickle.dumps(first)) == first
    assert scan(str(tmp_path)) == listing


def test_every_extension_in_any_case(tmp_path):
    for number, extension in enumerate(sorted(AUDIO_EXTENSIONS)):
        put(tmp_path / f"{number}{extension.upper() if number % 2 else extension}")
    assert len(scan(tmp_path).utterances) == 14


def test_relative_source(tmp_path, monkeypatch):
    put(tmp_path / "d/a.wav")
    monkeypatch.chdir(tmp_path)
    assert scan("d").utterances[0].file == str(tmp_path / "d/a.wav")
    assert scan("d/a.wav").utterances[0].key == "a"
    assert keys(scan("d/*.wav")) == ["a"]


def test_colliding_names_keep_their_extension(tmp_path):
    for name in ("a.wav", "a.flac", "a.wav.mp3", "c.wav", "b/a.wav"):
        put(tmp_path / name)
    assert sorted(keys(scan(tmp_path))) == ["a.flac", "a.wav", "a.wav.mp3", "b/a", "c"]


def test_keys_do_not_depend_on_whether_a_file_is_usable(tmp_path):
    put(tmp_path / "a.flac")
    (tmp_path / "a.wav").symlink_to("nowhere.wav")
    listing = scan(tmp_path)
    assert keys(listing) == ["a.flac"]
    assert [(item.key, item.path) for item in listing.rejected] == [("a.wav", "a.wav")]
    (tmp_path / "a.wav").unlink()
    put(tmp_path / "a.wav")
    assert keys(scan(tmp_path)) == ["a.flac", "a.wav"]


@given(st.lists(st.sampled_from(["a", "a.wav", "a.flac", "a.wav.wav", "a.wav.flac", "b"]), unique=True))
def test_assigned_keys_are_unique(stems):
    names = [f"{stem}.{extension}" for stem in stems for extension in ("wav", "flac")]
    assigned, repeats = assign_keys([(name.rsplit(".", 1)[0], name) for name in names])
    assert len(set(assigned)) == len(names)
    assert not repeats


def test_assign_keys_is_linear_in_chains():
    names = [("a" + ".wav" * n, "a" + ".wav" * (n + 1)) for n in range(1, 2000)]
    start = time.perf_counter()
    assigned, _ = assign_keys([("a.wav", "x"), *names])
    assert len(set(assigned)) == 2000
    assert time.perf_counter() - start < 2


def test_odd_names(tmp_path):
    odd = ["with space.wav", "tab\there.wav", "line\nend.wav", "ünï 漢字.wav", ".hidden.wav", "a..b.wav", "-100%.wav"]
    for name in odd:
        put(tmp_path / name)
    for name in (".wav", "..wav", "....wav"):  # no name before the extension
        put(tmp_path / name)
    listing = scan(tmp_path)
    assert sorted(u.path for u in listing.utterances) == sorted(odd)
    assert listing.ignored == 3
    assert not any(key_problem(key) for key in keys(listing))


def test_names_that_are_not_utf8(tmp_path):
    put(tmp_path / "good.wav")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9")).mkdir()
    for name in (b"/caf\xe9.wav", b"/d\xe9/x.wav", b"/skip\xe9.txt"):
        with open(os.fsencode(tmp_path) + name, "wb") as file:
            file.write(b"x")
    listing = scan(tmp_path)
    assert keys(listing) == ["good"]
    assert [item.path for item in listing.rejected] == ["caf\\xe9.wav", "d\\xe9/x.wav"]
    assert all("UTF-8" in item.reason for item in listing.rejected)
    json.dumps([item.key for item in listing.rejected], ensure_ascii=False).encode()


def test_folder_named_like_audio(tmp_path):
    put(tmp_path / "x.wav/inner.flac")
    assert keys(scan(tmp_path)) == ["x.wav/inner"]
    assert keys(scan(tmp_path / "x.wav")) == ["inner"]


def test_links_are_followed(tmp_path):
    put(tmp_path / "elsewhere/deep/a.wav")
    put(tmp_path / "one.wav")
    root = tmp_path / "root"
    root.mkdir()
    (root / "folder").symlink_to("../elsewhere")
    (root / "file.wav").symlink_to("../one.wav")
    assert keys(scan(root)) == ["file", "folder/deep/a"]


def test_link_loops_end(tmp_path):
    put(tmp_path / "a/b/x.wav")
    (tmp_path / "a/b/up").symlink_to("..")
    (tmp_path / "a/top").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "self.wav").symlink_to("self.wav")
    listing = scan(tmp_path)
    assert keys(listing) == ["a/b/x"]
    assert sorted(reasons(listing)) == ["a/b/up", "a/top", "self", "self.wav"]
    assert "visited before as 'a'" in reasons(listing)["a/b/up"]
    assert "leads nowhere" in reasons(listing)["self"]


def test_folder_reached_twice_keeps_its_real_name(tmp_path):
    put(tmp_path / "m/x.wav")
    (tmp_path / "a").symlink_to("m")
    (tmp_path / "z").symlink_to("m")
    listing = scan(tmp_path)
    assert keys(listing) == ["m/x"]
    assert list(reasons(listing)) == ["a", "z"]


def test_links_to_overlapping_folders_outside(tmp_path):
    put(tmp_path / "out/sub/x.wav")
    put(tmp_path / "out/y.wav")
    root = tmp_path / "root"
    root.mkdir()
    (root / "k1").symlink_to(tmp_path / "out/sub")
    (root / "k2").symlink_to(tmp_path / "out")
    listing = scan(root)
    assert keys(listing) == ["k1/x", "k2/y"]
    assert list(reasons(listing)) == ["k2/sub"]


def test_broken_links(tmp_path):
    put(tmp_path / "good.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere")
    (tmp_path / "speaker").symlink_to("nowhere")  # may have been a folder of audio
    (tmp_path / "notes.txt").symlink_to("nowhere")
    listing = scan(tmp_path)
    assert sorted(reasons(listing)) == ["gone.wav", "speaker"]
    assert listing.ignored == 1


def test_special_files_are_never_opened(tmp_path):
    put(tmp_path / "good.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "linked.wav").symlink_to("pipe.wav")
    (tmp_path / "null.wav").symlink_to("/dev/null")
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    try:
        os.chdir(tmp_path)  # socket paths are short
        server.bind("sock.wav")
    finally:
        os.chdir(here)
        server.close()
    listing = scan(tmp_path)
    assert keys(listing) == ["good"]
    assert {path: reason.split(",")[0] for path, reason in reasons(listing).items()} == {
        "pipe.wav": "a named pipe",
        "linked.wav": "a named pipe",
        "null.wav": "a device",
        "sock.wav": "a socket",
    }
    with pytest.raises(InputError, match="named pipe"):
        scan(tmp_path / "pipe.wav")


def test_unreadable_folders(tmp_path, monkeypatch):
    put(tmp_path / "good.wav")
    put(tmp_path / "locked/x.wav")
    real = os.scandir

    def scandir(path):
        if path.rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = scan(tmp_path)
    assert keys(listing) == ["good"]
    assert "Permission denied" in reasons(listing)["locked"]
    with pytest.raises(InputError, match="cannot be read"):
        scan(tmp_path / "locked")


def test_very_deep_tree(tmp_path):
    put(tmp_path / "a.wav")
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(30):  # deeper than a path may be long
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    listing = scan(tmp_path)
    assert keys(listing) == ["a"]
    assert len(listing.rejected) == 1


@pytest.mark.parametrize("name", ["missing", "missing.wav", "missing.tsv", "missing/*.wav"])
def test_missing_input(tmp_path, name):
    with pytest.raises(InputError, match="check"):
        scan(tmp_path / name)


def test_useless_inputs(tmp_path):
    with pytest.raises(InputError, match="holds no audio"):
        scan(tmp_path)
    put(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"\.flac"):
        scan(tmp_path)
    with pytest.raises(InputError, match="holds no audio"):
        scan(tmp_path / "notes.txt")
    for bad in ("", "a\0b", "caf\udce9"):
        with pytest.raises(InputError, match="cannot be used"):
            scan(bad)


def test_single_file(tmp_path):
    listing = scan(put(tmp_path / "d/a.b.FLAC"))
    assert [(u.key, u.path, u.size) for u in listing.utterances] == [("a.b", "a.b.FLAC", 5)]
    assert listing.root == str(tmp_path / "d")


def test_plain_file_that_vanished(tmp_path):
    utterance = scan(put(tmp_path / "a.wav")).utterances[0]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(AudioError, match="no such file"):
        utterance.open()


def test_many_files_quickly(tmp_path):
    for folder in range(20):
        (tmp_path / f"{folder}").mkdir()
        for number in range(500):
            (tmp_path / f"{folder}/{number}.wav").touch()
    start = time.perf_counter()
    assert len(scan(tmp_path).utterances) == 10_000
    assert time.perf_counter() - start < 3  # usually 0.2 s


def test_imports_no_heavy_module(tmp_path):
    put(tmp_path / "a.wav")
    code = (
        "import sys; from speechtok.corpus.sources import scan; scan(sys.argv[1]);"
        "print([m for m in ('torch', 'soundfile', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# globs


def test_globs(tmp_path):
    for name in ("a/1.wav", "a/2.flac", "a/b/3.wav", "c/4.wav", "a/.h/5.wav", "a/.6.wav", "top.wav"):
        put(tmp_path / name)

    def found(pattern):
        return [u.path for u in scan(f"{tmp_path}/{pattern}").utterances]

    assert found("*.wav") == ["top.wav"]
    assert found("a/*.wav") == ["1.wav"]
    assert scan(f"{tmp_path}/a/*.wav").root == str(tmp_path / "a")
    assert found("*/*.wav") == ["a/1.wav", "c/4.wav"]
    assert found("**/*.wav") == ["a/1.wav", "a/b/3.wav", "c/4.wav", "top.wav"]
    assert found("[ab]/**/?.*") == ["a/1.wav", "a/2.flac", "a/b/3.wav"]
    assert found("a/**") == ["1.wav", "2.flac", "b/3.wav"]
    assert found("**/**/b/*") == ["a/b/3.wav"]
    assert found("a/.*.wav") == [".6.wav"]
    with pytest.raises(InputError, match="holds no audio"):
        found("*.ogg")


def test_glob_in_names_that_exist(tmp_path):
    put(tmp_path / "d[1]/a*.wav")
    assert keys(scan(tmp_path / "d[1]")) == ["a*"]
    assert keys(scan(tmp_path / "d[1]/a*.wav")) == ["a*"]


def test_glob_never_loops_and_leaves_others_alone(tmp_path):
    put(tmp_path / "a/x.wav")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/up2").symlink_to(tmp_path)
    (tmp_path / "other.wav").symlink_to("nowhere")
    assert keys(scan(f"{tmp_path}/**/x*.wav")) == ["a/x"]
    assert scan(f"{tmp_path}/a/x*.wav").rejected == []


# manifests


def test_tsv(tmp_path):
    put(tmp_path / "audio/a b.wav")
    put(tmp_path / "audio/s/c.flac", b"1234567")
    manifest = tmp_path / "m.tsv"
    manifest.write_text(f"{tmp_path}/audio\ns/c.flac\t7\na b.wav\t5\n\n./s/../s//c.flac\t7\n")
    listing = scan(manifest)
    assert [(u.key, u.path, u.size) for u in listing.utterances] == [("s/c.flac", "s/c.flac", 7), ("a b", "a b.wav", 5)]
    assert listing.root == str(tmp_path / "audio")
    assert listing.rejected[0].reason == "line 5: repeats the key 's/c.flac' of line 2"


def test_tsv_with_relative_root_bom_and_crlf(tmp_path):
    put(tmp_path / "audio/a.wav")
    (tmp_path / "m.tsv").write_bytes(b"\xef\xbb\xbfaudio\r\na.wav\t160\r\n")
    assert scan(tmp_path / "m.tsv").utterances[0].file == str(tmp_path / "audio/a.wav")


def test_tsv_bad_rows(tmp_path):
    put(tmp_path / "audio/a.wav")
    put(tmp_path / "secret.wav")
    (tmp_path / "audio/d.wav").mkdir()
    os.mkfifo(tmp_path / "audio/pipe.wav")
    rows = ["a.wav\t5", "gone.wav\t5", "../secret.wav\t5", "x/../../secret.wav\t1", f"{tmp_path}/secret.wav\t5"]
    rows += ["a.wav", "b.wav\tmany", "c.wav\t1\t2", "d.wav\t5", "pipe.wav\t5", "nul\0.wav\t5"]
    rows += ["x" * 5000 + ".wav\t5", ".\t4"]
    (tmp_path / "m.tsv").write_text("\n".join([str(tmp_path / "audio"), *rows]))
    listing = scan(tmp_path / "m.tsv")
    assert keys(listing) == ["a"]
    found = [item.reason for item in listing.rejected]
    expected = ["line 3: no such file", "line 4: leaves the root", "line 5: leaves the root", "line 6: leaves the root"]
    expected += ["line 7: is not relpath", "line 8: is not relpath", "line 9: is not relpath", "line 10: a folder"]
    expected += ["line 11: a named pipe", "line 12: name with a NUL", "line 13: cannot be looked up"]
    expected += ["line 14: names no file"]
    assert [reason[: len(start)] for reason, start in zip(found, expected, strict=True)] == expected


def test_absolute_tsv_rows_inside_the_root(tmp_path):
    put(tmp_path / "a.wav")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\n{tmp_path}/a.wav\t5\n")
    assert keys(scan(tmp_path / "m.tsv")) == ["a"]
    (tmp_path / "m.tsv").write_text(f"/\n{str(tmp_path)[1:]}/a.wav\t5\n")
    assert keys(scan(tmp_path / "m.tsv")) == [f"{str(tmp_path)[1:]}/a"]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"client_id\tpath\n1\ta.wav\n", b"\xff\xfe\x00", b"\0\n", b"x" * 9000])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_manifests_without_structure(tmp_path, data, suffix):
    path = put(tmp_path / f"m{suffix}", data)
    if suffix == ".scp" and data.startswith(b"client"):
        assert scan(path).rejected
        return
    with pytest.raises(InputError, match=str(path)):
        scan(path)


def test_tsv_with_rows_that_are_all_malformed(tmp_path):
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\na.wav\nb.wav\n")
    with pytest.raises(InputError, match="relpath<TAB>n_samples"):
        scan(tmp_path / "m.tsv")


def test_scp(tmp_path):
    put(tmp_path / "in/my file.wav")
    put(tmp_path / "b.wav")
    rows = ["utt1 in/my file.wav"]
    rows += [f"spk/utt2\t  {tmp_path}/b.wav  ", "utt3 sox in.wav -t wav - |", "utt4", "utt1 b.wav"]
    rows += ["../evil b.wav", f"/abs {tmp_path}/in/my file.wav", "up ../b.wav", "gone gone.wav"]
    (tmp_path / "wav.scp").write_text("\n".join(rows) + "\n")
    listing = scan(tmp_path / "wav.scp")
    assert [(u.key, u.path) for u in listing.utterances] == [
        ("utt1", "in/my file.wav"),
        ("spk/utt2", f"{tmp_path}/b.wav"),
        ("b", "b.wav"),  # an id that cannot be a key gives way to the path
        ("in/my file", f"{tmp_path}/in/my file.wav"),
    ]
    assert [item.reason.split(";")[0] for item in listing.rejected] == [
        "line 3: is a command pipe, which is never run",
        "line 4: is not an id, a space and a path",
        "line 5: repeats the key 'utt1' of line 1",
        "line 8: leaves the root",
        "line 9: no such file",
    ]


def test_absolute_path_outside_without_key(tmp_path):
    put(tmp_path / "far/a.wav")
    put(tmp_path / "near/b.wav")
    lines = [{"path": f"{tmp_path}/far/a.wav"}, {"path": f"{tmp_path}/near/b.wav"}]
    (tmp_path / "near/m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert keys(scan(tmp_path / "near/m.jsonl")) == [f"{str(tmp_path)[1:]}/far/a", "b"]


def test_jsonl(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav", "c.flac", "sép\u2028.wav"):
        put(tmp_path / name)
    lines = [
        {"audio_filepath": "a.wav", "duration": 1.0},
        {"audio": "b.wav", "id": 7},
        {"path": "c.wav", "key": "x/y"},
        {"path": "c.flac", "key": None},
        {"path": "sép\u2028.wav", "id": "é"},
        {"path": "c.wav", "key": "x/y"},
        {"path": "c.wav", "key": "a//b"},
        {"text": "hello"},
        {"path": 3},
        {"path": "c.wav", "key": [1]},
        {"path": "c.wav", "id": True},
        {"path": ""},
        {"path": "\ud800.wav"},
        {"path": "../up.wav"},
        [],
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=position != 4) for position, line in enumerate(lines))
    path = tmp_path / "m.jsonl"
    path.write_bytes(text.encode() + b"\n{broken\n" + b"[" * 100_000)
    listing = scan(path)
    assert keys(listing) == ["a", "7", "x/y", "c.flac", "é", "c.wav"]
    assert [int(item.reason.split(":")[0][5:]) for item in listing.rejected] == [6, *range(8, 18)]
    assert listing.rejected[0].reason == "line 6: repeats the key 'x/y' of line 3"
    json.dumps([[r.key, r.path, r.reason] for r in listing.rejected], ensure_ascii=False).encode()


def test_derived_keys_give_way_to_given_ones(tmp_path):
    put(tmp_path / "a.wav")
    put(tmp_path / "b.wav")
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav"}\n{"path": "b.wav", "id": "a"}\n')
    assert keys(scan(tmp_path / "m.jsonl")) == ["a.wav", "a"]


def test_gzipped_jsonl(tmp_path):
    put(tmp_path / "a.wav")
    data = gzip.compress(b'{"path": "a.wav"}\n')
    assert keys(scan(put(tmp_path / "m.jsonl.gz", data))) == ["a"]
    for damaged in (data[:-12], b"no gzip", data[:20] + b"xx" + data[22:]):
        with pytest.raises(InputError):
            scan(put(tmp_path / "m.jsonl.gz", damaged))


# lhotse


def recording(name, *sources, **fields):
    files = [{"type": kind, "channels": [0], "source": source} for kind, source in sources]
    shape = {"sampling_rate": 16000, "num_samples": 160, "duration": 0.01}
    return {"id": name, "sources": files, **shape, **fields}


def lhotse_manifest(folder):
    put(folder / "a.wav", wav_bytes())
    lines = [
        recording("rec/1", ("file", "a.wav")),
        recording("rec2", ("file", str(folder / "a.wav"))),
        recording("rec3", ("command", "sox a.wav -t wav -")),
        recording("rec4", ("file", "a.wav"), ("file", "a.wav")),
        recording("rec5", ("file", "gone.wav")),
        recording("rec6", ("file", "a.wav"), transforms=[{"name": "Speed", "kwargs": {"factor": 1.1}}]),
        {"id": "rec7", "sources": 5},
        {"id": "rec8", "sources": [], "unknown_field": 1},
    ]
    path = folder / "recordings.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return path


def check_lhotse(folder):
    listing = scan(lhotse_manifest(folder))
    assert [(u.key, u.file) for u in listing.utterances] == [(k, str(folder / "a.wav")) for k in ("rec/1", "rec2")]
    found = [item.reason.split(";")[0] for item in listing.rejected]
    assert found[:4] == [
        "line 3: has the sources command",
        "line 4: has the sources file, file",
        "line 5: no such file",
        "line 6: carries transforms, which would not be applied",
    ]
    assert all("is not a lhotse recording" in reason for reason in found[4:])
    assert len(found) == 6


def test_lhotse_recordings(tmp_path):
    pytest.importorskip("lhotse")
    check_lhotse(tmp_path)


def test_lhotse_recordings_as_lhotse_wrote_them(tmp_path):
    lhotse = pytest.importorskip("lhotse")
    file = put(tmp_path / "a.wav", wav_bytes())
    manifest = tmp_path / "recordings.jsonl.gz"
    lhotse.RecordingSet.from_recordings([lhotse.Recording.from_file(file, recording_id="x")]).to_file(manifest)
    listing = scan(manifest)
    assert [(u.key, u.file) for u in listing.utterances] == [("x", str(file))]


def test_lhotse_interface(tmp_path, monkeypatch):
    """The part of lhotse that is used, for environments without it."""
    from dataclasses import dataclass
    from types import ModuleType

    @dataclass
    class Source:
        type: str
        channels: list
        source: str

    @dataclass
    class Recording:
        id: str
        sources: list
        sampling_rate: int
        num_samples: int
        duration: float
        transforms: list | None = None

        @staticmethod
        def from_dict(data):
            return Recording(sources=[Source(**source) for source in data.pop("sources")], **data)

    module = ModuleType("lhotse")
    module.Recording = Recording
    monkeypatch.setitem(sys.modules, "lhotse", module)
    check_lhotse(tmp_path)


def test_without_lhotse(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(InputError, match=r"speechtok\[lhotse\]"):
        scan(lhotse_manifest(tmp_path))


# tar


def test_tar(tmp_path):
    path = make_tar(
        tmp_path / "s.tar",
        [
            ("b/2.flac", b"flac!"),
            ("b/2.json", b"{}"),
            ("a.wav", b"wave"),
            ("x.wav", b"1"),
            ("x.ogg", b"22"),
            ("./d/y.mp3", b"3"),
        ],
    )
    listing = scan(path)
    assert keys(listing) == ["b/2", "a", "x.wav", "x.ogg", "d/y"]
    assert [u.path for u in listing.utterances][:2] == ["s.tar/b/2.flac", "s.tar/a.wav"]
    assert [u.open().read() for u in listing.utterances] == [b"flac!", b"wave", b"1", b"22", b"3"]
    assert [u.size for u in listing.utterances] == [5, 4, 1, 2, 1]
    assert listing.ignored == 1
    assert listing.root == str(tmp_path)
    assert {u.container for u in listing.utterances} == {"tar"}


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_dialects(tmp_path, dialect):
    names = ["ü/漢字 \n.wav" if dialect != tarfile.USTAR_FORMAT else "u.wav", f"{'d' * 90}/{'n' * 90}.wav"]
    path = make_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names], format=dialect)
    listing = scan(path)
    assert keys(listing) == [name[:-4] for name in names]
    assert [u.open().read() for u in listing.utterances] == [name.encode() for name in names]


def test_hostile_tar_members(tmp_path):
    def special(name, kind, target=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    path = make_tar(
        tmp_path / "s.tar",
        [
            ("../../x.wav", b"1"),
            ("/etc/y.wav", b"2"),
            ("a/../../z.wav", b"3"),
            special("hard.wav", tarfile.LNKTYPE, "good.wav"),
            special("sym.wav", tarfile.SYMTYPE, "/etc/passwd"),
            special("dir.wav", tarfile.DIRTYPE),
            special("fifo.wav", tarfile.FIFOTYPE),
            special("dev.wav", tarfile.CHRTYPE),
            ("good.wav", b"good"),
            ("good.wav", b"again"),
            ("caf\udce9.wav", b"5"),
        ],
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
    )
    listing = scan(path)
    # a name that comes twice is kept once, under its full name
    assert [(u.key, u.open().read()) for u in listing.utterances] == [("good.wav", b"good")]
    found = {item.path.removeprefix("s.tar/"): item.reason for item in listing.rejected}
    for name in ("../../x.wav", "/etc/y.wav", "a/../../z.wav"):
        assert "leaves the root" in found[name]
    for name in ("hard.wav", "sym.wav", "fifo.wav", "dev.wav"):
        assert "link or special file" in found[name]
    assert "dir.wav" not in found
    assert "repeats the key 'good.wav' of s.tar/good.wav" in found["good.wav"]
    assert "UTF-8" in found["caf\\xe9.wav"]


def test_sparse_tar_member(tmp_path):
    sparse = put(tmp_path / "sparse.wav", b"")
    with sparse.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 4096)
    try:
        subprocess.run(["tar", "--sparse", "-cf", "s.tar", "sparse.wav"], cwd=tmp_path, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no GNU tar")
    listing = scan(tmp_path / "s.tar")
    assert [item.reason for item in listing.rejected] == ["is a sparse member; pack the archive without --sparse"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_compressed_tar(tmp_path, mode, name):
    with tarfile.open(tmp_path / name, mode) as tar:
        tar.add(put(tmp_path / "in/a.wav"), "a.wav")
    with pytest.raises(InputError, match="decompress"):
        scan(tmp_path / name)


def test_truncated_tar(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.wav", b"a" * 600), ("b.wav", b"b" * 2000), ("c.wav", b"c")])
    data = path.read_bytes()
    path.write_bytes(data[: 512 + 1024 + 512 + 700])  # inside b
    listing = scan(path)
    assert keys(listing) == ["a"]
    assert [item.path for item in listing.rejected] == ["s.tar/b.wav", "s.tar"]
    path.write_bytes(data)
    utterance = scan(path).utterances[1]
    path.write_bytes(data[:2600])
    with pytest.raises(AudioError, match="ends inside"):
        utterance.open()
    path.unlink()
    with pytest.raises(AudioError, match="cannot be read"):
        utterance.open()


def test_broken_header_in_the_middle_is_told(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.wav", b"a"), ("b.wav", b"b")])
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 0xFF  # checksum of the second header
    path.write_bytes(data)
    listing = scan(path)
    assert keys(listing) == ["a"]
    assert "damaged" in listing.rejected[0].reason


def test_tar_header_with_a_negative_size_ends(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.wav", b"a"), ("b.wav", b"b")])
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xf6\x00"  # base 256, below zero
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    path.write_bytes(data)
    listing = scan(path)
    assert keys(listing) == ["a"]
    assert "damaged" in listing.rejected[0].reason


def test_tar_with_a_forged_name_length(tmp_path):
    """A long-name header that claims a petabyte must not be read into memory."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 50
    path = put(tmp_path / "s.tar", info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048)
    with pytest.raises(InputError, match="claims"):
        scan(path)


def test_empty_tar_and_tar_without_audio(tmp_path):
    for members in ([], [("a.txt", b"x")]):
        with pytest.raises(InputError, match="holds no audio"):
            scan(make_tar(tmp_path / "s.tar", members))


def test_folder_of_tars(tmp_path):
    (tmp_path / "d").mkdir()
    make_tar(tmp_path / "d/s-1.tar", [("x.wav", b"3"), ("only.wav", b"4")])
    make_tar(tmp_path / "d/s-0.tar", [("x.wav", b"1"), ("x.txt", b"t"), ("y.wav", b"2")])
    put(tmp_path / "d/README.md")
    put(tmp_path / "d/s-2.tar", b"broken")
    put(tmp_path / "d/s-3.tar.gz", b"\x1f\x8b")
    listing = scan(tmp_path / "d")
    assert keys(listing) == ["s-0/x", "y", "s-1/x", "only"]
    assert [u.open().read() for u in listing.utterances] == [b"1", b"2", b"3", b"4"]
    assert listing.utterances[0].path == "s-0.tar/x.wav"
    assert [item.path for item in listing.rejected] == ["s-2.tar", "s-3.tar.gz"]
    assert listing.ignored == 2
    assert keys(scan(f"{tmp_path}/d/s-?.tar"))[:2] == ["s-0/x", "y"]
    put(tmp_path / "d/a.wav")  # now it is an audio folder
    assert keys(scan(tmp_path / "d")) == ["a"]
    assert scan(tmp_path / "d").ignored == 5


def test_folder_of_bad_shards(tmp_path):
    put(tmp_path / "s-2.tar", b"broken")
    with pytest.raises(InputError, match="not a readable tar"):
        scan(tmp_path)
    put(tmp_path / "p.parquet", b"broken")
    with pytest.raises(InputError, match="both tar and Parquet"):
        scan(tmp_path)


# Parquet


def write_audio(path, rows, row_group_size=2, **columns):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"audio": pa.array(rows, kind), **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_hugging_face_parquet(tmp_path):
    rows = [{"bytes": f"sound {n}".encode(), "path": f"d/{n}.flac"} for n in range(5)]
    path = write_audio(tmp_path / "p.parquet", rows, text=[str(n) for n in range(5)])
    listing = scan(path)
    assert keys(listing) == [f"d/{n}" for n in range(5)]
    assert listing.utterances[3].path == "p.parquet/d/3.flac"
    assert [(u.offset, u.row) for u in listing.utterances] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert {(u.container, u.column) for u in listing.utterances} == {("parquet", "audio.bytes")}
    assert [u.open().read() for u in reversed(listing.utterances)] == [f"sound {n}".encode() for n in range(4, -1, -1)]
    assert pickle.loads(pickle.dumps(listing.utterances[0])).open().read() == b"sound 0"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": ["x", "y", "x"]}, ["x", "y"]),
        ({"key": [5, None, 7]}, ["5", "a", "7"]),
        ({"file_name": ["q/1.wav", "q/1.mp3", "z"]}, ["q/1.wav", "q/1.mp3", "z"]),
        ({"id": ["../x", "/y", ""]}, ["a.wav", "a.flac", "2"]),
        ({"id": [1.5, 2.5, 3.5]}, ["a.wav", "a.flac", "2"]),
    ],
)
def test_parquet_keys(tmp_path, columns, expected):
    rows = [{"bytes": b"1", "path": "a.wav"}, {"bytes": b"2", "path": "a.flac"}, {"bytes": b"3", "path": None}]
    listing = scan(write_audio(tmp_path / "p.parquet", rows, **columns))
    assert keys(listing) == expected
    assert len(listing.rejected) == 3 - len(expected)
    assert all(item.reason == "row 2: repeats the key 'x' of row 0" for item in listing.rejected)


@pytest.mark.parametrize("name", ["audio", "bytes", "wav"])
def test_parquet_with_binary_column(tmp_path, name):
    pq.write_table(pa.table({name: [b"1", None, b"3"]}), tmp_path / "p.parquet")
    utterances = scan(tmp_path / "p.parquet").utterances
    assert [u.key for u in utterances] == ["0", "1", "2"]
    assert utterances[2].open().read() == b"3"
    with pytest.raises(AudioError, match="empty"):
        utterances[1].open()


def test_parquet_with_paths_only(tmp_path):
    put(tmp_path / "a.wav")
    table = pa.table({"path": ["a.wav", "gone.wav", "../x.wav", None], "id": ["k", "l", "m", "n"]})
    pq.write_table(table, tmp_path / "p.parquet")
    listing = scan(tmp_path / "p.parquet")
    assert [(u.key, u.file, u.container) for u in listing.utterances] == [("k", str(tmp_path / "a.wav"), "")]
    found = [item.reason.split(": ")[1] for item in listing.rejected]
    assert found == ["no such file", "leaves the root", "the column path is empty"]


def test_hugging_face_parquet_without_embedded_bytes(tmp_path):
    put(tmp_path / "a.wav")
    write_audio(tmp_path / "p.parquet", [{"bytes": None, "path": "a.wav"}])
    assert scan(tmp_path / "p.parquet").utterances[0].open() == str(tmp_path / "a.wav")


def test_parquet_written_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string")})
    data = wav_bytes()
    rows = {"audio": [{"bytes": data, "path": "a.wav"}], "text": ["hello"]}
    datasets.Dataset.from_dict(rows).cast(features).to_parquet(tmp_path / "p.parquet")
    (utterance,) = scan(tmp_path / "p.parquet").utterances
    assert utterance.key == "a"
    samples, rate = soundfile.read(utterance.open())
    assert (len(samples), rate) == (160, 16000)


def test_folder_of_parquet_files(tmp_path):
    write_audio(tmp_path / "train-1.parquet", [{"bytes": b"3", "path": None}])
    write_audio(tmp_path / "train-0.parquet", [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}])
    put(tmp_path / "bad.parquet")
    listing = scan(tmp_path)
    assert keys(listing) == ["train-0/0", "train-0/1", "train-1/0"]
    assert [u.open().read() for u in listing.utterances] == [b"1", b"2", b"3"]
    assert [item.path for item in listing.rejected] == ["bad.parquet"]


def test_parquet_without_audio(tmp_path):
    for table in ({"text": ["a"]}, {"audio": [[0.5]]}, {"audio": [1]}, {"audio": [{"sampling_rate": 3}]}):
        pq.write_table(pa.table(table), tmp_path / "p.parquet")
        with pytest.raises(InputError, match="column"):
            scan(tmp_path / "p.parquet")
    pq.write_table(pa.table({"bytes": pa.array([], pa.binary())}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="holds no audio"):
        scan(tmp_path / "p.parquet")


def test_own_output_is_not_audio(tmp_path):
    from speechtok.corpus.rows import write_part

    write_part(tmp_path / "part-00000.parquet", [], {"speechtok.tokenizer": "x"})
    with pytest.raises(InputError, match="holds units"):
        scan(tmp_path)


def test_parquet_that_changes_after_the_scan(tmp_path):
    path = write_audio(tmp_path / "p.parquet", [{"bytes": b"old", "path": "a.wav"}])
    (utterance,) = scan(path).utterances
    assert utterance.open().read() == b"old"
    path.write_bytes(b"PAR1 broken PAR1")
    with pytest.raises(AudioError, match="cannot be read"):
        utterance.open()
    path.unlink()
    with pytest.raises(AudioError, match="cannot be read"):
        utterance.open()


def test_text_that_is_not_utf8_in_parquet(tmp_path):
    column = pa.array([b"caf\xe9.wav"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"path": column}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="readable"):
        scan(tmp_path / "p.parquet")


# anything at all

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(path):
    try:
        listing = scan(path)
    except InputError:
        return
    found = keys(listing)
    assert len(set(found)) == len(found)
    assert not any(key_problem(key) for key in found)
    json.dumps([[r.key, r.path, r.reason] for r in listing.rejected], ensure_ascii=False).encode()
    for utterance in listing.utterances:
        with suppress(SpeechtokError):
            utterance.open()


@FUZZ
@given(st.binary(max_size=2000), st.sampled_from([*SUFFIXES, ".jsonl.gz", ".tar.gz", ".x"]))
def test_random_bytes(tmp_path, data, suffix):
    survives(put(tmp_path / f"m{suffix}", data))


@FUZZ
@given(st.text(max_size=300), st.sampled_from([".tsv", ".scp", ".jsonl"]))
def test_random_text(tmp_path, text, suffix):
    put(tmp_path / "a.wav")
    head = f"{tmp_path}\n" if suffix == ".tsv" else ""
    survives(put(tmp_path / f"m{suffix}", (head + text).encode("utf-8", "replace")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


FIELDS = st.sampled_from(["path", "audio", "key", "id", "audio_filepath"])


@FUZZ
@given(st.lists(st.dictionaries(FIELDS, JSON | st.just("a.wav"))))
def test_random_objects(tmp_path, items):
    put(tmp_path / "a.wav")
    survives(put(tmp_path / "m.jsonl", "\n".join(json.dumps(item) for item in items).encode()))


@FUZZ
@given(st.data())
def test_damaged_tar(tmp_path, data):
    members = [("a.wav", b"x" * 600), ("ü" * 80 + ".wav", b"y"), ("c.json", b"{}"), ("d.wav", b"z")]
    raw = bytearray(make_tar(tmp_path / "s.tar", members).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 5000))
        block = at // 512 * 512
        raw[at % len(raw)] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()) and block + 512 <= len(raw):  # a valid checksum lets the damage through
            raw[block + 148 : block + 156] = b" " * 8
            raw[block + 148 : block + 156] = b"%06o\0 " % sum(raw[block : block + 512])
    (tmp_path / "s.tar").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    survives(tmp_path / "s.tar")


@settings(FUZZ, derandomize=True)  # a crash of pyarrow's native code should not come and go
@given(st.data())
def test_damaged_parquet(tmp_path, data):
    rows = [{"bytes": b"1" * 50, "path": f"{n}.wav"} for n in range(6)]
    raw = bytearray(write_audio(tmp_path / "p.parquet", rows).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "p.parquet").write_bytes(raw)
    survives(tmp_path / "p.parquet")


@given(st.text(alphabet="a./", max_size=12))
def test_normalised_paths_stay_inside(path):
    inner = normalise(path)
    wanted = os.path.normpath("root/" + path)
    if inner is None:
        assert wanted == "root" or not wanted.startswith("root/") or ".." in path.split("/")
    else:
        assert wanted == f"root/{inner}"
        assert not key_problem(inner)
