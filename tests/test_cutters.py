"""Tokenizers and encoders as cutters: names, frames that are computed once, settings of the grids, the command."""

import itertools
import json

import numpy as np
import pytest
import torch
from speechtok.cli import app, main
from typer.testing import CliRunner

from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError, UnknownNameError
from speechtok.evaluation.cutters import (
    GATED_GREEDY,
    GRIDS,
    PUBLISHED,
    EncoderFrames,
    compare,
    grid_for,
    of_encoder,
    of_tokenizer,
)
from speechtok.metrics.boundaries import f1, r_value
from speechtok.quantizers.kmeans import KMeans
from speechtok.segmenters import Greedy, greedy_segment, min_cut_segment, norm_peak_segment
from speechtok.tokenizer import Tokenizer
from tests.conftest import tiny_encoder
from tests.test_boundaries import bumps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four syllables per second of sound, silence included."""
    return bumps(tmp_path_factory.mktemp("aligned"), beat=0.16)


@pytest.fixture(scope="module")
def segmental(clip_wave):
    """A tokenizer of segments: MFCC, the louder two thirds of the frames voiced, and some frames as centroids."""
    frames = EncoderFrames(MfccEncoder())(clip_wave)
    threshold = float(np.quantile(np.linalg.norm(frames, axis=1), 0.3))
    return Tokenizer(
        MfccEncoder(), KMeans(frames[::9][:40]), name="segmental", segmenter=Greedy(threshold, 0.7), silence_gap=7
    )


def test_a_tokenizer_cuts_as_it_encodes(segmental, clip_wave):
    cutter = of_tokenizer(segmental)
    spans, ids = cutter.cut(clip_wave)
    units = segmental.encode(clip_wave, 16000)
    assert ids.tolist() == units.ids.tolist()
    assert np.allclose(spans * 16000, np.stack([units.starts, units.ends], 1), rtol=0, atol=1e-6)
    assert (cutter.vocab_size, cutter.silence) == (41, 40)
    assert 40 in ids
    assert cutter.facts["setting"]["merge_threshold"] == 0.7
    assert cutter.facts["silence_gap"] == 7
    plain = Tokenizer(segmental.encoder, segmental.quantizer, name="plain", segmenter=segmental.segmenter)
    assert (of_tokenizer(plain).vocab_size, of_tokenizer(plain).silence) == (40, None)
    with pytest.raises(InputError, match=r"frames; to cut .* frames-only\+greedy or frames-only\+min-cut"):
        of_tokenizer(Tokenizer(segmental.encoder, segmental.quantizer, name="frames-only"))


class Counting(MfccEncoder):
    """MFCC that count how often they are asked."""

    asked = 0

    def encode(self, wave, lengths):
        Counting.asked += 1
        return super().encode(wave, lengths)


def test_segmenters_share_the_frames_of_a_file(folder, monkeypatch):
    monkeypatch.setattr(Counting, "asked", 0)
    frames = EncoderFrames(Counting())
    from speechtok.evaluation.boundaries import evaluate

    results = evaluate(folder, [of_encoder(frames, kind) for kind in GRIDS], dev=folder)
    assert [result["tokenizer"] for result in results] == [f"mfcc+{kind}" for kind in GRIDS]
    assert Counting.asked == 8  # four files of either folder, three segmenters, all settings
    greedy = results[0]["facts"]
    assert greedy["settings_tried"] == len(GRIDS["greedy"]["norm_quantile"]) * len(GRIDS["greedy"]["merge_threshold"])
    assert greedy["grid"]["norm_quantile"] == list(GRIDS["greedy"]["norm_quantile"])
    json.dumps(results, allow_nan=False)


def test_frames_are_those_of_the_encoder(clip_wave):
    encoder = tiny_encoder("hubert")
    frames = EncoderFrames(encoder)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(clip_wave)[None]).features[0].numpy()
    assert np.array_equal(frames(clip_wave), expected)
    assert frames(clip_wave) is frames(clip_wave)
    assert frames(clip_wave[:399]).shape == (0, 32)
    # A file of two windows has as many frames as one of the whole.
    long = np.tile(clip_wave, 8)
    assert len(frames(long)) == encoder.grid.num_frames(len(long))


def by_function(kind, frames, setting):
    if kind == "greedy":
        assert setting["close_gap"] == 0
        return greedy_segment(frames, **{name: value for name, value in setting.items() if name != "close_gap"})
    if kind == "min-cut":
        voiced = np.linalg.norm(frames, axis=1) > setting["norm_threshold"]
        return min_cut_segment(frames, voiced, **{k: v for k, v in setting.items() if k != "norm_threshold"})
    return norm_peak_segment(frames, **setting)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("encoder", [MfccEncoder(), tiny_encoder("hubert")], ids=["100 Hz", "50 Hz"])
def test_settings_and_times(kind, encoder, clip_wave):
    """Every setting is the segmenter's function at its thresholds; times are those of the frames' spans."""
    frames = EncoderFrames(encoder)
    family = of_encoder(frames, kind, name="row")
    here = frames(clip_wave)
    settings = family.settings([here[:200], here[200:]])
    assert (
        len(settings) == len({json.dumps(one) for one in settings}) == np.prod([len(x) for x in GRIDS[kind].values()])
    )
    for setting in settings[:: 1 if kind == "norm-peaks" else 7]:
        spans = by_function(kind, here, setting)
        cut = family.at(setting).cut(clip_wave)
        starts, ends = (
            [encoder.grid.span(frame)[side] for frame in row] for side, row in ((0, spans[:, 0]), (1, spans[:, 1] - 1))
        )
        assert np.allclose(cut[:, 0] * 16000, starts)
        assert np.allclose(cut[:, 1] * 16000, ends)
    if kind == "norm-peaks":
        step = 2 if encoder.grid.rate == 100 else 1
        assert {one["window"] for one in settings} == {1, 1 + 2 * step, 1 + 4 * step, 1 + 6 * step}
    else:
        norms = np.linalg.norm(here, axis=1)
        expected = np.quantile(norms, GRIDS[kind]["norm_quantile"])
        assert sorted({one["norm_threshold"] for one in settings}) == pytest.approx(expected.tolist())


def test_gated_encoders_have_thresholds_of_their_own(clip_wave):
    """Lengths of gated frames mean the same in all encoders, so quantiles would only follow the share of silence."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = W2vBertConfig(**sizes, projected_layer=1, projection_size=8, gated=True)
    gated = EncoderFrames(W2vBertEncoder(config))
    frames = gated(clip_wave)
    assert np.linalg.norm(frames, axis=1).max() <= 1 + 1e-6
    family = of_encoder(gated, "greedy")
    settings = family.settings([frames])
    expected = list(itertools.product(GATED_GREEDY["norm_threshold"], GATED_GREEDY["merge_threshold"]))
    assert [(one["norm_threshold"], one["merge_threshold"]) for one in settings] == expected
    assert {one["count_mode"] for one in settings} == {"reset"}
    assert family.facts["grid"] == {name: list(values) for name, values in GATED_GREEDY.items()}
    # Without merging, a segment is a run of voiced frames.
    setting = next(one for one in settings if one["merge_threshold"] == -1)
    voiced = np.linalg.norm(frames, axis=1) >= setting["norm_threshold"]
    assert len(family.at(setting).cut(clip_wave)) == (np.diff(np.concatenate([[0], voiced])) == 1).sum() > 0
    # The layer below is not gated, and neither are other segmenters asked for other norms.
    assert grid_for(W2vBertEncoder(config, layer=0), "greedy") is GRIDS["greedy"]
    assert grid_for(gated.encoder, "min-cut") is GRIDS["min-cut"]


def test_names(folder, segmental, tmp_path):
    segmental.save(tmp_path / "segmental")
    save_encoder(tiny_encoder("hubert"), tmp_path / "encoder")
    names = [str(tmp_path / "segmental"), "mfcc-k100+greedy", f"{tmp_path / 'segmental'}+norm-peaks", "mfcc+min-cut"]
    results = compare(folder, names, dev=folder)
    grid = results[4]["tokenizer"]
    # A folder of a tokenizer goes by the tokenizer's name.
    called = ["segmental", "mfcc-k100+greedy", "segmental+norm-peaks", "mfcc+min-cut", grid, "energy", "energy-onsets"]
    assert [one["tokenizer"] for one in results] == called
    assert grid == f"uniform-{round(results[0]['groups']['pooled']['segments_per_second'], 2):g}"
    assert results[2]["facts"]["encoder"] == "mfcc"
    assert results[-2]["facts"]["chosen_on"] == folder.name
    only = compare(folder, [str(tmp_path / "segmental")], baselines=False, shift=0.01)
    assert [one["tokenizer"] for one in only] == ["segmental"]
    # Added to the reference, or taken from the predictions.
    assert only[0]["conventions"]["shift"] == {"sdhubert": 0.01, "zerosyl": -0.01, "inner": -0.01}
    assert [one["tokenizer"] for one in compare(folder, [])][1:] == ["energy", "energy-onsets"]
    for name in (":1+norm-peaks", "+norm-peaks"):
        (row,) = compare(folder, [f"{tmp_path / 'encoder'}{name}"], dev=folder, baselines=False, shift=0.0)
        assert row["facts"]["layer"] == (1 if name.startswith(":") else 2)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], InputError, "nothing is to be measured"),
        (["mfcc-k100+greedy"], InputError, r"mfcc-k100\+greedy: its thresholds are chosen .*--dev"),
        (["mfcc-k100+best"], InputError, "NAME.SEGMENTER with one of greedy, min-cut, norm-peaks"),
        (["mfcc-k100"], InputError, "mfcc-k100 has no segmenter"),
        (["nothing"], UnknownNameError, "'nothing' is neither"),
    ],
)
def test_names_that_stand_for_nothing(folder, names, error, message):
    with pytest.raises(error, match=message):
        compare(folder, names, baselines=False)


def test_encoders_that_stand_for_nothing(folder):
    with pytest.raises(InputError, match="leave :3 out"):
        compare(folder, ["mfcc-k100:3+greedy"], dev=folder)
    with pytest.raises(UnknownNameError, match="'nothing' is neither.*; tokenizers are: .*mfcc-k100"):
        compare(folder, ["nothing+greedy"], dev=folder)


def test_published_rows_are_consistent():
    for row in PUBLISHED.values():
        precision, recall = row["precision"] / 100, row["recall"] / 100
        assert row["f1"] == pytest.approx(100 * f1(precision, recall), abs=0.1)
        assert row["r_value"] == pytest.approx(100 * r_value(precision, recall), abs=0.15)


# -- the command ----------------------------------------------------------------------------------------------------


def test_syllables_command(folder, segmental, tmp_path):
    segmental.save(tmp_path / "segmental")
    options = ["-t", tmp_path / "segmental", "-t", "mfcc-k100+norm-peaks", "--dev", folder, "--tolerance-ms", 40]
    options += ["--silence-starts", "--log", "plain", "--json", tmp_path / "facts.json"]
    done = CliRunner().invoke(app, ["evaluate", "syllables", str(folder), *map(str, options)], catch_exceptions=False)
    assert done.exit_code == 0
    written = json.loads((tmp_path / "facts.json").read_text())
    expected = compare(
        folder, [str(tmp_path / "segmental"), "mfcc-k100+norm-peaks"], dev=folder, tolerance=0.04, silence_starts=True
    )
    assert written == json.loads(json.dumps(expected))
    for text in (
        "within 40 ms", "mfcc-k100+norm-peaks", "uniform-", "energy", "accented", "entropy bit/s", "Sylber, greedy",
        "other data", "prominence ", f"(best of 36 on {folder.name})", "shift best R on",
    ):  # fmt: skip
        assert text in done.stdout
    assert "encoding" in done.stderr


def test_syllables_command_says_what_is_left_out(folder, tmp_path):
    (tmp_path / "aligned").mkdir()
    for name in ("librispeech", "speechocean762", "metadata.jsonl"):
        (tmp_path / "aligned" / name).symlink_to(folder / name)
    lines = [json.loads(line) for line in (folder / "alignments.jsonl").read_text().splitlines()]
    for line in lines:
        if line["path"].startswith("speechocean762"):
            line["words"], line["phones"] = [], [["SIL", 0, 1]]
    (tmp_path / "aligned" / "alignments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(app, ["evaluate", "syllables", str(tmp_path / "aligned"), "--shift-ms", "5"])
    assert done.exit_code == 0
    assert "energy: accented speech is left out: the references hold no boundary" in done.stderr
    assert "shift given: sdhubert 5 ms, zerosyl -5 ms" in done.stdout


def test_thresholds_without_dev_are_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speechtok", "evaluate", "syllables", str(folder), "-t", "mfcc-k100+greedy"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("speechtok: mfcc-k100+greedy: its thresholds are chosen on other speech")


def test_real_speech(shared):
    """The plain truth about the shipped encoder: its norms and cosines know less of syllables than loudness does."""
    speech = shared / "speech"
    results = compare(speech / "eval", ["w2vbert-mini+norm-peaks"], dev=speech / "dev", limit_files=40)
    peaks, grid, dips, onsets = (one["groups"]["pooled"] for one in results)
    assert 3 < peaks["segments_per_second"] < 6.5
    assert grid["segments_per_second"] == pytest.approx(peaks["segments_per_second"], rel=0.05)
    assert dips["zerosyl"]["f1"] > peaks["zerosyl"]["f1"] > grid["zerosyl"]["f1"]
    assert onsets["sdhubert"]["f1"] > dips["sdhubert"]["f1"]
