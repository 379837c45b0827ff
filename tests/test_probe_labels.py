"""Labels and groups of probes: manifests, the tasks made for music, and what is wrong with them."""

import json
from collections import Counter, defaultdict

import pytest

from speechtok.errors import InputError
from speechtok.evaluation.probe_labels import (
    TASKS,
    apply,
    by_column,
    column,
    read,
    source_instrument,
    with_field,
)


@pytest.fixture
def manifest(tmp_path):
    """Writes rows as a manifest beside empty files of their names, and reads it."""

    def write(rows, name="metadata.jsonl"):
        for row in rows:
            if isinstance(row, dict) and "path" in row and not row.pop("missing", False):
                (tmp_path / row["path"]).write_bytes(b"sound")
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read(tmp_path if name == "metadata.jsonl" else tmp_path / name)

    return write


def label_of(task, **row):
    return TASKS[task].label(row, TASKS[task].field)


@pytest.mark.parametrize(
    ("midi", "pitch_class", "octave"),
    [(60, "C", "4"), (21, "A", "0"), (0, "C", "-1"), (127, "G", "9"), (58, "A#", "3")],
)
def test_midi_numbers(midi, pitch_class, octave):
    assert label_of("pitch_class", pitch_midi=midi) == pitch_class
    assert label_of("octave", pitch_midi=midi, pitch_verified=True) == octave


def test_doubtful_pitches_have_no_label():
    assert label_of("pitch_class", pitch_midi=60, pitch_verified=False) is None
    assert label_of("octave", pitch_midi=60, pitch_verified=False) is None


@pytest.mark.parametrize("value", ["C4", 60.0, True, -1, 128])
def test_a_pitch_must_be_a_midi_number(value):
    with pytest.raises(InputError, match="no MIDI note number; 60 is C4"):
        label_of("pitch_class", pitch_midi=value)


@pytest.mark.parametrize(
    ("row", "piece"),
    [
        ({"instrument": "PearlSnare2Edge", "label": "drum"}, "snare"),
        ({"instrument": "SideStick", "label": "drum"}, "rim"),
        ({"instrument": "tr505-rim", "label": "drum_machine"}, "rim"),
        ({"instrument": "tr505-timbal", "label": "drum_machine"}, "hand drum"),
        ({"instrument": "SabianRockHatSwish", "label": "drum"}, "hi-hat"),
        ({"instrument": "ZildjianA24RideBell", "label": "drum"}, "cymbal"),
        ({"instrument": "cymball-long", "label": "drum_machine"}, "cymbal"),
        ({"instrument": "Cowbell", "label": "drum"}, "cowbell"),
        ({"instrument": "guiro-long", "label": "drum_machine"}, "guiro"),
        ({"instrument": "drum", "label": "drum", "path": "set/drum_cymbal_pedal.opus"}, "hi-hat"),
        ({"instrument": "drum", "label": "drum", "path": "set/drum_cymbal_soft.opus"}, "cymbal"),
        ({"instrument": "drum", "label": "drum", "path": "set/drum_bass_soft.opus"}, "kick"),
        ({"instrument": "drum", "label": "drum", "path": "set/drum_roll.opus"}, None),
        ({"instrument": "bd", "label": "bd", "path": "set/bd_808.opus"}, "kick"),
        ({"instrument": "hat", "label": "hat", "path": "set/hat_snap.opus"}, "hi-hat"),
        ({"instrument": "sn", "label": "sn", "path": "set/sn_dub.opus"}, "snare"),
        ({"instrument": "elec", "label": "elec", "path": "set/elec_fuzz_tom.opus"}, "tom"),
        ({"instrument": "elec", "label": "elec", "path": "set/elec_ping.opus"}, None),
        ({"instrument": "loop", "label": "loop", "path": "set/loop_tabla.opus"}, None),
        ({"instrument": "bass", "label": "bass", "path": "set/bass_drop_c.opus"}, None),
        ({"instrument": "sitar", "label": "sitar", "path": "a/sitar.opus"}, None),
    ],
)
def test_drum_pieces(row, piece):
    assert label_of("drum_piece", **row) == piece


@pytest.mark.parametrize(
    ("row", "family", "excitation"),
    [
        ({"instrument": "upright_piano", "label": "upright_piano"}, "keyboard", "keyboard"),
        ({"instrument": "tamb", "label": "drum_machine"}, "percussion", "percussion"),
        ({"instrument": "Maraca", "label": "drum"}, "percussion", "percussion"),
        ({"instrument": "tabla"}, "percussion", "percussion"),
        ({"instrument": "bass"}, "bass", None),
        ({"instrument": "pizzicato_strings"}, "string", "plucked"),
        ({"instrument": "tremolo_strings"}, "string", "sustained"),
        ({"instrument": "loop", "label": "loop"}, None, None),
    ],
)
def test_families(row, family, excitation):
    assert label_of("instrument_family", **row) == family
    assert label_of("excitation", **row) == excitation


def test_genres_put_near_names_together():
    names = ["symphonic wind band", "symphonic wind band and choir", "chiptune/synth", "synth", "classical", "jazz"]
    assert [label_of("genre", genre=name) for name in names] == [
        "wind band", "wind band", "synth", "synth", "classical", "jazz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"instrument": "PearlSnare2Edge"}, {"instrument": "PearlSnare"}, True),
        ({"instrument": "SabianRockHatSemiOpen"}, {"instrument": "SabianRockHatPedal"}, True),
        ({"instrument": "SideStick"}, {"instrument": "Sidestick"}, True),
        ({"instrument": "RotoTomHi"}, {"instrument": "RotoTomLo"}, True),
        ({"instrument": "crash-01"}, {"instrument": "crash-02"}, True),
        ({"instrument": "Ludwig16FloorTom"}, {"instrument": "Ludwig18FloorTomEdge"}, False),
        ({"instrument": "Pearl12Tom"}, {"instrument": "Pearl13Tom"}, False),
        ({"instrument": "kick", "label": "drum_machine"}, {"instrument": "hihat", "label": "drum_machine"}, True),
        ({"instrument": "sitar"}, {"instrument": "shanai"}, False),
        ({"instrument": "kick", "artist": "other"}, {"instrument": "kick"}, False),
    ],
)
def test_one_source_one_group(one, other, same):
    one, other = {"artist": "maker"} | one, {"artist": "maker"} | other
    assert (source_instrument(one) == source_instrument(other)) is same


def test_a_source_needs_an_instrument():
    assert source_instrument({"instrument": "Flute"}) == "flute"
    with pytest.raises(InputError, match="name another field with --group"):
        source_instrument({"artist": "maker"})


def test_any_column_is_a_task(manifest):
    rows = [{"path": f"{i}.wav", "room": i % 2, "speaker": f"s{i}"} for i in range(4)]
    found = manifest([*rows, {"path": "none.wav"}], "rooms.jsonl")
    labelled = apply(found, column("room"))
    assert labelled.labels == {"0.wav": "0", "1.wav": "1", "2.wav": "0", "3.wav": "1"}
    assert labelled.groups == {path: path for path in labelled.labels}  # each sound its own
    assert labelled.unlabelled == 1
    assert apply(found, by_column(column("room"), "speaker")).groups["2.wav"] == "s2"


def test_a_task_reads_another_column(manifest):
    found = manifest([{"path": "a.wav", "note": 61, "piano": "x"}, {"path": "b.wav", "note": 62, "piano": "y"}])
    task = by_column(with_field(TASKS["pitch_class"], "note"), "piano")
    assert apply(found, task).labels == {"a.wav": "C#", "b.wav": "D"}
    with pytest.raises(InputError, match="a.wav: has no 'instrument' to be grouped by"):
        apply(found, with_field(TASKS["pitch_class"], "note"))


def test_a_missing_column_names_those_there_are(manifest):
    found = manifest([{"path": "a.wav", "room": 1}, {"path": "b.wav", "speaker": "x"}])
    with pytest.raises(InputError, match=r"no field 'pitch_midi'.*--label.*path, room, speaker"):
        apply(found, TASKS["octave"])
    with pytest.raises(InputError, match=r"a.wav: has no 'speaker' to be grouped by"):
        apply(found, by_column(column("room"), "speaker"))


def test_a_label_is_no_list(manifest):
    with pytest.raises(InputError, match=r"a.wav: its 'tags' is \['x'\]; a label is text"):
        apply(manifest([{"path": "a.wav", "tags": ["x"]}]), column("tags"))


def test_rows_that_name_no_sound_are_told(manifest):
    rows = [
        {"path": "a.wav", "room": 1},
        {"path": "gone.wav", "room": 2, "missing": True},
        "no json",
        {"path": "a.wav", "room": 3},
        {"path": "line\u2028end.wav", "room": 4},
        "",
    ]
    found = manifest(rows, "some.jsonl")
    assert found.name == "some.jsonl"
    assert [(sound.path, row["room"]) for sound, row in found.items] == [("a.wav", 1), ("line\u2028end.wav", 4)]
    assert "no such file" in found.failed["gone.wav"]
    assert any("repeats the key" in reason for reason in found.failed.values())
    assert len(found.failed) == 3


def test_what_is_no_manifest(tmp_path, manifest):
    (tmp_path / "names.txt").write_text("a")
    for path in (tmp_path, tmp_path / "names.txt", tmp_path / "gone.jsonl"):
        with pytest.raises(InputError, match="reads labels from a .jsonl manifest"):
            read(path)
    with pytest.raises(InputError, match="names no sound that can be used .*gone.wav.*no such file"):
        manifest([{"path": "gone.wav", "missing": True}])


# Sounds and groups of each class, counted over all 752 notes.
NOTES = {
    "pitch_class": {"C": (54, 8), "F#": (34, 3), "A#": (2, 2), "D#": (10, 2)},
    "octave": {"0": (1, 1), "4": (53, 10), "7": (7, 3)},
    "instrument_family": {
        "bass": (54, 2), "guitar": (64, 3), "keyboard": (93, 4), "percussion": (395, 41), "reed": (22, 1),
        "string": (31, 2),
    },
    "excitation": {"keyboard": (93, 4), "percussion": (395, 41), "plucked": (125, 5), "sustained": (37, 2)},
    "drum_piece": {"kick": (36, 10), "snare": (51, 10), "tom": (89, 13), "cymbal": (84, 17), "tabla": (24, 1)},
}  # fmt: skip


@pytest.mark.parametrize("task", NOTES)
def test_the_shared_notes(shared, task):
    labelled = apply(read(shared / "music" / "notes"), TASKS[task])
    sounds, groups = Counter(labelled.labels.values()), defaultdict(set)
    for path, label in labelled.labels.items():
        groups[label].add(labelled.groups[path])
    assert len(labelled.labels) + labelled.unlabelled == 752
    found = {label: (sounds[label], len(groups[label])) for label in NOTES[task]}
    assert found == NOTES[task]
