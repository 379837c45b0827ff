"""Alignments, and both evaluations on a tiny folder of tones whose answers are known, through library and commands."""

import json
import math
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from speechtok.cli import app, main
from typer.testing import CliRunner

from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import InputError
from speechtok.evaluation.abx import evaluate as evaluate_abx
from speechtok.evaluation.alignments import Span, frame_labels, group_of, items, read, triphones
from speechtok.evaluation.units import evaluate as evaluate_units
from speechtok.frames import FrameGrid
from speechtok.metrics.edit_distance import unit_edit_distance
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer

RATE = 16000
TONES = {"SIL": 0.0, "AA": 300.0, "B": 700.0, "K": 1500.0, "T": 3000.0, "S": 6000.0}
# Between B and K stand AA, T and S in turn, so that ABX has contexts to work with.
ORDER = ["SIL", *["B", "AA", "K", "B", "T", "K", "B", "S", "K"] * 3, "SIL"]
STEP = 0.1


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Many short files: a second thread helps little, and much hinders where the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sound(order, pitch, rng):
    time = np.arange(int(STEP * RATE)) / RATE
    tones = [0.3 * np.sin(2 * np.pi * TONES[name] * pitch * time) if TONES[name] else 0 * time for name in order]
    return (np.concatenate(tones) + rng.normal(0, 1e-3, len(order) * len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora, two speakers of either (who differ a little in pitch), two files each; and noises and rooms."""
    root, rng = tmp_path_factory.mktemp("aligned"), np.random.default_rng(0)
    facts, aligned = [], []
    for corpus in ("librispeech", "speechocean762"):
        for speaker, pitch in (("one", 1.0), ("two", 1.04)):
            for number in range(2):
                path = f"{corpus}/{speaker}-{number}.flac"
                order = ["SIL", *rng.permutation(np.array(ORDER[1:-1]).reshape(-1, 3)).ravel().tolist(), "SIL"]
                (root / corpus).mkdir(exist_ok=True)
                soundfile.write(root / path, sound(order, pitch, rng), RATE)
                phones = [[name, round(i * STEP, 2), round((i + 1) * STEP, 2)] for i, name in enumerate(order)]
                facts.append({"path": path, "speaker": f"{corpus}-{speaker}"})
                aligned.append({"path": path, "words": [["tones", 0.1, phones[-2][2]]], "phones": phones})
    for name, lines in (("metadata", facts), ("alignments", aligned)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    extra = root / "extra"
    response = np.zeros(1600)
    response[[0, 400, 900]] = 1, 0.5, 0.3
    for kind, samples in (("noise", rng.normal(0, 0.1, RATE)), ("rir", response)):
        (extra / kind).mkdir(parents=True)
        soundfile.write(extra / kind / "a.flac", samples, RATE)
        (extra / kind / "metadata.jsonl").write_text(
            json.dumps({"path": "a.flac", "split": "test", "room": "r"}) + "\n"
        )
    return root


@pytest.fixture(scope="module")
def toneful():
    """A tokenizer that knows the tones: MFCC means of each as centroids."""
    encoder = MfccEncoder()
    with torch.inference_mode():
        centroids = [
            encoder(torch.from_numpy(sound([name] * 5, 1.02, np.random.default_rng(1)))[None]).features[0].mean(0)
            for name in TONES
        ]
    return Tokenizer(encoder, KMeans(torch.stack(centroids).numpy()), name="tones")


# -- alignments -----------------------------------------------------------------------------------------------------


def test_read(folder):
    utterances = read(folder)
    assert len(utterances) == 8
    first = utterances[0]
    assert (first.path, first.speaker) == ("librispeech/one-0.flac", "librispeech-one")
    assert first.phones[0] == Span("SIL", 0.0, 0.1)
    assert first.words == (Span("tones", 0.1, 2.8),)
    assert [group_of(p) for p in ("librispeech/a", "librispeech_lossy/a", "speechocean762/a", "tedlium/a")] == [
        "native", "lossy", "accented", "tedlium",
    ]  # fmt: skip
    assert group_of("a.wav") == group_of("b.wav") == "files"


def test_labels_at_frame_centres():
    phones = [Span("A", 0.0, 0.1), Span("B", 0.1, 0.3), Span("C", 0.4, 0.5)]
    # A border belongs to what begins there; 0.1 + 0.2 is not 0.3 in floats, and still no B.
    centres = np.array([0.0, 0.099, 0.1, 0.299, 0.1 + 0.2, 0.35, 0.4, 0.5, -0.01])
    assert frame_labels(phones, centres).tolist() == ["A", "A", "B", "B", "", "", "C", "", ""]
    assert frame_labels([], centres[:2]).tolist() == ["", ""]


def test_triphones_stand_between_phones(folder):
    utterance = read(folder)[0]
    grid = FrameGrid(RATE, 160, 400)
    found = triphones(utterance, grid, 280)
    assert len(found) == len(utterance.phones) - 4  # neither silence nor its neighbours
    token = found[0]
    assert [token.previous, token.phone, token.following] == [phone.name for phone in utterance.phones[1:4]]
    inside = [i for i in range(280) if 0.2 <= grid.centre_seconds(i) <= 0.3]
    assert (token.start, token.stop) == (inside[0], inside[-1] + 1)
    dropped = triphones(utterance, grid, 280, slicing="librilight")
    assert sum(t.stop - t.start for t in dropped) < sum(t.stop - t.start for t in found)
    joined = items([(utterance, t) for t in found])
    assert joined.starts.tolist() == np.cumsum([0, *joined.lengths[:-1]]).tolist()
    assert set(joined.speakers) == {"librispeech-one"}


GOOD = {"path": "a/b.flac", "words": [], "phones": [["A", 0, 0.1], ["B", 0.1, 0.2]]}


@pytest.mark.parametrize(
    ("alignments", "message"),
    [
        ([GOOD, "no json"], r"alignments.jsonl:2: is no JSON"),
        ([[1]], r"alignments.jsonl:1: must be an object"),
        ([GOOD | {"path": 3}], r"alignments.jsonl:1: 'path'"),
        ([GOOD | {"path": "../b.flac"}], r"alignments.jsonl:1: path '../b.flac' must be relative"),
        ([GOOD | {"phones": None}], r"alignments.jsonl:1: 'phones' must be a list"),
        ([GOOD | {"words": [["a", 0]]}], r"alignments.jsonl:1: 'words' holds"),
        ([GOOD | {"phones": [["A", True, 1]]}], r"alignments.jsonl:1: 'phones' holds"),
        ([GOOD | {"phones": [["A", 1, 0.5]]}], r"alignments.jsonl:1: .* not in order"),
        ([GOOD | {"phones": [["A", 0, 1], ["B", 0.9, 2]]}], r"alignments.jsonl:1: .* begins before 'A'"),
        ([GOOD, GOOD], r"alignments.jsonl:2: a/b.flac is aligned twice"),
        ([GOOD | {"path": "a/c.flac"}], r"alignments.jsonl:1: .*metadata.jsonl names no speaker of a/c.flac"),
        ([], r"alignments.jsonl: holds no utterance"),
    ],
)
def test_errors_name_file_and_line(tmp_path, alignments, message):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in alignments]
    (tmp_path / "alignments.jsonl").write_text("\n".join(lines))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"path": "a/b.flac", "speaker": "x"}))
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"metadata.jsonl: cannot be read"):
        read(tmp_path)


# -- units ----------------------------------------------------------------------------------------------------------


def test_units_of_tones(folder, toneful):
    result = evaluate_units(folder, toneful)
    assert list(result["groups"]) == ["native", "accented", "pooled"]
    pooled, native = result["groups"]["pooled"], result["groups"]["native"]
    assert pooled["utterances"] == 8
    assert pooled["seconds"] == pytest.approx(8 * 2.9)
    # 290 hops are 288 whole frames, all within the alignment.
    assert pooled["with_silence"]["frames"] == 8 * 288
    assert pooled["without_silence"]["frames"] == 8 * 270
    assert native["with_silence"]["frames"] == 4 * 288
    assert pooled["without_silence"]["phones"] == 5
    assert pooled["with_silence"]["phones"] == 6
    # Only frames that see two tones at once can be wrong.
    assert pooled["without_silence"]["pnmi"] > 0.6
    assert pooled["without_silence"]["phone_purity"] > 0.8
    assert pooled["without_silence"]["speakers"] == 4
    assert pooled["without_silence"]["speaker_leakage_miller_madow"] < 0.05
    assert pooled["codebook"]["dead_codes"] == 0
    assert pooled["bitrate"]["nominal_bitrate"] == pytest.approx(100 * np.log2(6))
    assert pooled["bitrate"]["units_per_second"] == pytest.approx(288 / 2.9)
    assert 10 < pooled["bitrate"]["runs_per_second"] < 40
    assert pooled["ued"] is None
    assert result["conventions"]["ued"] is None
    assert result["conventions"]["shift_frames"] == 0


def test_labels_can_be_shifted(folder, toneful):
    here, late = (evaluate_units(folder, toneful, shift=shift)["groups"]["pooled"] for shift in (0, 5))
    assert late["without_silence"]["pnmi"] < here["without_silence"]["pnmi"] - 0.1
    # The last frames of a file look behind the alignment's end; as many of the first phone are not seen.
    assert late["frames_without_label"] == 8 * 4
    assert here["frames_without_label"] == 0


def test_edit_distances_under_augmentation(folder, toneful):
    from speechtok.audio.augment import FAMILIES, AugmentResources, augment
    from speechtok.audio.decode import load

    result = evaluate_units(folder, toneful, augment_data=folder / "extra", agg="pooled", limit_files=2)
    assert list(result["groups"]["pooled"]["ued"]) == list(FAMILIES)
    assert result["conventions"]["ued"]["agg"] == "pooled"
    assert result["conventions"]["ued"]["families"] == list(FAMILIES)
    resources = AugmentResources.from_folder(folder / "extra", "test")
    for family in FAMILIES:
        clean, changed = [], []
        for path in ("librispeech/one-0.flac", "speechocean762/one-0.flac"):
            wave = load(folder / path, RATE)
            clean.append(toneful.encode(wave, RATE).ids)
            changed.append(toneful.encode(augment(wave, RATE, family, path, 0, resources), RATE).ids)
        expected = unit_edit_distance(clean, changed, agg="pooled")
        assert result["groups"]["pooled"]["ued"][family]["ued"] == pytest.approx(expected)
    assert result["groups"]["pooled"]["ued"]["noise"]["ued"] > 0
    other = evaluate_units(folder, toneful, augment_data=folder / "extra", agg="pooled", limit_files=2, seed=1)
    assert other["groups"]["pooled"]["ued"] != result["groups"]["pooled"]["ued"]


def test_bad_options(folder, toneful, tmp_path):
    with pytest.raises(InputError, match="codebooks"):
        evaluate_units(folder, toneful, codebook=1)
    with pytest.raises(InputError, match="at least 1"):
        evaluate_units(folder, toneful, limit_files=0)
    with pytest.raises(InputError, match="representation"):
        evaluate_abx(folder, toneful, representation="words")
    with pytest.raises(InputError, match="no units"):
        evaluate_abx(folder, toneful.encoder, representation="units")
    (tmp_path / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text())
    late = [json.loads(line) for line in (folder / "alignments.jsonl").read_text().splitlines()[:1]]
    late[0]["phones"] = [["AA", 100.0, 101.0]]
    (tmp_path / "alignments.jsonl").write_text(json.dumps(late[0]))
    (tmp_path / "librispeech").mkdir()
    (tmp_path / "librispeech" / "one-0.flac").write_bytes((folder / "librispeech" / "one-0.flac").read_bytes())
    with pytest.raises(InputError, match="no frame of librispeech/one-0.flac"):
        evaluate_units(tmp_path, toneful)
    with pytest.raises(InputError, match="no phone stands between"):
        evaluate_abx(tmp_path, toneful)


def test_a_group_that_cannot_be_measured_is_left_out(folder, toneful, tmp_path):
    shutil.copytree(folder, tmp_path / "aligned")
    lines = [json.loads(line) for line in (folder / "alignments.jsonl").read_text().splitlines()]
    for line in lines:
        if line["path"].startswith("speechocean762"):
            line["phones"] = [["AA", 100.0, 101.0]]
    (tmp_path / "aligned" / "alignments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = run("evaluate", "units", tmp_path / "aligned", "-t", "mfcc-k100")
    assert told.exit_code == 0
    assert "accented speech is left out: no frame of" in told.stderr
    for result in (evaluate_units(tmp_path / "aligned", toneful), evaluate_abx(tmp_path / "aligned", toneful)):
        assert list(result["groups"]) == ["native", "pooled"]
        assert list(result["left_out"]) == ["accented"]


# -- ABX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["frames", "units"])
def test_abx_of_tones(folder, toneful, representation):
    result = evaluate_abx(folder, toneful, representation=representation)
    assert result["conventions"]["distance"] == ("angular" if representation == "frames" else "identical")
    for figures in result["groups"].values():
        # Three phones between B and K for each speaker, and those contexts that permutation makes.
        assert figures["within"]["cells"] >= 12
        assert figures["within"]["error"] < 3
        assert figures["across"]["error"] < 3
    assert result["groups"]["native"]["within"]["speakers"] == 2
    assert result["groups"]["pooled"]["across"]["speakers"] == 4


def test_abx_conventions_reach_the_metric(folder, toneful):
    plain = evaluate_abx(folder, toneful, conditions=["within"])
    assert "across" not in plain["groups"]["pooled"]
    # Labels half a second late: tokens hold other tones than their names say.
    late = evaluate_abx(folder, toneful, conditions=["within"], shift=53)
    assert late["groups"]["pooled"]["within"]["error"] > plain["groups"]["pooled"]["within"]["error"] + 10
    few = evaluate_abx(folder, toneful, conditions=["within"], items_per_cell=2)
    assert few["groups"]["pooled"]["within"]["triples"] < plain["groups"]["pooled"]["within"]["triples"]
    assert few["conventions"]["items_per_cell"] == 2


def test_abx_of_an_encoder(folder, toneful):
    by_encoder, by_tokenizer = (evaluate_abx(folder, source) for source in (toneful.encoder, toneful))
    assert by_encoder["groups"] == by_tokenizer["groups"]
    assert by_encoder["tokenizer"] == "mfcc"


# -- the commands ---------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_units_command(folder, toneful, tmp_path):
    toneful.save(tmp_path / "tones")
    options = ["-t", tmp_path / "tones", "-t", "mfcc-k100", "--limit-files", 4, "--log", "plain"]
    options += ["--augment-data", folder / "extra", "--norm", "frames", "--shift-frames", 1]
    done = run("evaluate", "units", folder, *options, "--json", tmp_path / "facts" / "units.json")
    assert done.exit_code == 0
    ours, shipped = json.loads((tmp_path / "facts" / "units.json").read_text())
    assert (ours["tokenizer"], shipped["tokenizer"]) == ("tones", "mfcc-k100")
    assert ours["conventions"]["ued"]["norm"] == "frames"
    assert ours["conventions"]["shift_frames"] == 1
    assert ours["groups"]["pooled"]["utterances"] == 4
    expected = evaluate_units(folder, toneful, limit_files=4, shift=1, augment_data=folder / "extra", norm="frames")
    assert ours == expected
    for text in ("PNMI (MM)", "shifted by 1 frames", "Unit edit distance", "accented", "mfcc-k100"):
        assert text in done.stdout
    assert "encoding" in done.stderr


def test_abx_command(folder, tmp_path):
    options = ["--slicing", "librilight", "--items-per-cell", 0, "--log", "quiet", "--json", tmp_path / "abx.json"]
    assert run("evaluate", "abx", folder, *options).stdout == ""
    frames, units = json.loads((tmp_path / "abx.json").read_text())
    assert (frames["representation"], units["representation"]) == ("frames", "units")
    assert frames["conventions"]["slicing"] == "librilight"
    assert frames["conventions"]["items_per_cell"] is None
    done = run("evaluate", "abx", folder, "-r", "units", "--condition", "across", "--log", "json")
    assert "across" in done.stdout
    assert "within" not in done.stdout
    assert json.loads(done.stderr.splitlines()[-1])["stage"] == "run"


def test_a_folder_without_alignments_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speechtok", "evaluate", "units", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(f"speechtok: {tmp_path / 'metadata.jsonl'}: cannot be read")


# -- real speech ----------------------------------------------------------------------------------------------------


def test_shipped_tokenizer_on_real_speech(shared, tokenizer):
    """Against a count of its own of native speech, phone by phone."""
    groups = evaluate_units(shared / "speech" / "eval", tokenizer)["groups"]
    pairs = Counter()
    for line in (shared / "speech" / "eval" / "alignments.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["path"].startswith("librispeech/"):
            units = tokenizer.encode(shared / "speech" / "eval" / entry["path"])
            centres = (units.starts_seconds + units.ends_seconds) / 2
            for phone, start, end in entry["phones"]:
                inside = (centres >= start - 1e-9) & (centres < end - 1e-9)
                if phone not in ("SIL", "SPN"):
                    pairs.update((phone, int(unit)) for unit in units.ids[inside])
    total = sum(pairs.values())
    phones, clusters = Counter(), Counter()
    for (phone, unit), count in pairs.items():
        phones[phone] += count
        clusters[unit] += count
    information = sum(n / total * math.log(n * total / (phones[p] * clusters[u])) for (p, u), n in pairs.items())
    entropy = -sum(n / total * math.log(n / total) for n in phones.values())
    frames = {"native": 40_696, "lossy": 94_153, "accented": 41_857}
    assert {name: groups[name]["without_silence"]["frames"] for name in frames} == frames
    assert total == frames["native"]
    assert groups["native"]["without_silence"]["pnmi"] == pytest.approx(information / entropy, abs=1e-9)
    assert groups["pooled"]["with_silence"]["frames"] == 229_918
    assert groups["pooled"]["with_silence"]["phones"] == 41  # with SIL and SPN


def test_abx_on_real_speech(shared, tokenizer):
    folder = shared / "speech" / "eval"
    frames, units = (
        evaluate_abx(folder, tokenizer, representation=kind, limit_files=120)["groups"]["pooled"]
        for kind in ("frames", "units")
    )
    for condition in ("within", "across"):
        assert 5 < frames[condition]["error"] < units[condition]["error"] < 50
    assert frames["within"]["error"] < frames["across"]["error"]


def test_abx_of_units_is_refused_before_frames_are_computed(tmp_path):
    """The folder does not exist: what is told first shows what was looked at first."""
    done = CliRunner().invoke(app, ["evaluate", "abx", str(tmp_path / "nowhere"), "-t", "sylber-mini"])
    assert done.exit_code != 0
    assert "-r frames" in str(done.exception or done.output)
