"""Fitting tokenizers of segments, and spherical k-means."""

import json
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from speechtok.cli import app
from typer.testing import CliRunner

import speechtok
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import AudioError, InputError
from speechtok.frames import WindowRule
from speechtok.segmenters import Greedy, MinCut, NormPeaks
from speechtok.segmenters.pool import pool
from speechtok.training import kmeans
from speechtok.training.kmeans import SegmentMeans, fit
from tests.test_segment_kernel import utterances

LOUD = Greedy(60.0, 0.9)  # for frames of MFCC


def mfcc(clips):
    """Frames of each clip, float32 [T, 39]."""
    tokenizer = speechtok.load("mfcc-k100")
    files = sorted(path for path in clips.iterdir() if path.suffix in {".flac", ".opus", ".mp3"})
    with torch.inference_mode():
        waves = [next(tokenizer.windows(file))[1] for file in files]
        return files, [tokenizer.encoder(torch.from_numpy(wave)[None]).features[0].numpy() for wave in waves]


@pytest.mark.parametrize("segmenter", [Greedy(0.5, 0.7), MinCut(0.5), NormPeaks()], ids=lambda each: each.type)
def test_means_are_those_of_whole_files(segmenter):
    files, rng = utterances(0, 30, 8), np.random.default_rng(0)
    pieces, expected = [], {}
    for index, frames in enumerate(files):
        bounds = [0, *np.sort(rng.integers(0, len(frames) + 1, 5)).tolist(), len(frames)]
        pieces += [(index, begin, frames[begin:end]) for begin, end in pairwise(bounds)]
        expected[index] = pool(frames, segmenter.segment(frames)[0])
    found: dict[int, list] = {}
    means = SegmentMeans(pieces, segmenter)
    for index, first, rows in means:
        assert first == sum(map(len, found.setdefault(index, [])))
        assert len(rows) > 0
        found[index].append(rows)
    for index, rows in expected.items():
        np.testing.assert_array_equal(np.concatenate([rows[:0], *found.get(index, [])]), rows)
    assert means.frames == sum(map(len, files))
    assert means.errors == {}


def test_frames_of_a_long_file_are_dropped_as_segments_settle(monkeypatch):
    largest = 0

    def watched(frames, spans):
        nonlocal largest
        largest = max(largest, len(frames))
        return pool(frames, spans)

    monkeypatch.setattr(kmeans, "pool", watched)
    piece = np.repeat(np.float32([[3, 0], [0, 0], [0, 3], [0, 0]]), 10, 0)
    rows = list(SegmentMeans(((0, 40 * i, piece) for i in range(500)), Greedy()))
    assert sum(len(each) for *_, each in rows) == 1000
    assert largest <= 80


def test_a_file_that_cannot_be_cut_is_left_out():
    good = np.repeat(np.float32([[3, 0], [0, 3]]), 10, 0)
    bad = good.copy()
    bad[15] = np.nan
    means = SegmentMeans([(0, 0, good), (1, 0, bad), (1, 20, good), (2, 0, good)], Greedy())
    assert [(index, len(rows)) for index, _, rows in means] == [(0, 2), (2, 2)]
    assert list(means.errors) == [1]
    assert "frame 15" in means.errors[1]


@pytest.mark.parametrize("seconds", [30.0, 3.0])
def test_what_is_sampled_is_what_the_tokenizer_cuts(clips, seconds):
    """Also where files are longer than a window, so that segments cross windows."""
    tokenizer, report = fit(
        str(clips), MfccEncoder(), 8, name="x", segmenter=LOUD, silence_gap=7, iterations=3, restarts=1,
        window=WindowRule(seconds, 0.5),
    )  # fmt: skip
    files, frames = mfcc(clips)
    segments = sum(int((tokenizer.encode(file).ids < 8).sum()) for file in files)
    assert report["segments seen"] == report["segments sampled"] == segments > 50
    assert report["segments per second"] == pytest.approx(segments / sum(map(len, frames)) * 100, rel=1e-9)
    assert "frames seen" not in report
    assert (tokenizer.segmenter, tokenizer.silence_gap, tokenizer.vocab_size) == (LOUD, 7, 9)


def test_a_fit_is_repeated_to_the_bit(clips):
    options = {"segmenter": LOUD, "iterations": 3, "restarts": 1, "sample_frames": 40}
    one, two, other = (fit(str(clips), MfccEncoder(), 8, name="x", seed=seed, **options)[0] for seed in (0, 0, 1))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_arrays_are_fitted_like_files(tmp_path):
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 0.1, samples).astype(np.float32) for samples in (16000, 1000, 40000)]
    for index, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{index}.wav", wave, 16000, subtype="FLOAT")
    options = {"name": "x", "iterations": 3, "restarts": 1, "window": WindowRule(1.0, 0.3)}
    (files, told), (arrays, report) = (fit(source, MfccEncoder(), 8, **options) for source in (str(tmp_path), waves))
    assert arrays.fingerprint == files.fingerprint
    assert report == told
    assert report["files"] == 3
    # Segments cross windows there, too.
    cut, report = fit(waves, MfccEncoder(), 4, segmenter=Greedy(0.1), **options)
    assert cut.fingerprint == fit(str(tmp_path), MfccEncoder(), 4, segmenter=Greedy(0.1), **options)[0].fingerprint
    with pytest.raises(InputError, match="a list of 1 arrays gives 1 frames, fewer than 8 clusters"):
        fit([waves[0][:400]], MfccEncoder(), 8, **options)
    with pytest.raises(AudioError):
        fit([np.array([0.0, np.nan])], MfccEncoder(), 8, **options)


def test_spherical_is_as_good_as_sklearn(clips):
    tokenizer, report = fit(str(clips), MfccEncoder(), 16, name="x", spherical=True, iterations=30)
    centroids = tokenizer.quantizer.centroids.double().numpy()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    frames = np.concatenate(mfcc(clips)[1])
    unit = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    distance = ((unit[:, None] - centroids[(unit @ centroids.T).argmax(1)][:, None]) ** 2).sum(-1).mean()
    assert report["mean squared distance"] == pytest.approx(distance, rel=1e-4)
    other = SklearnKMeans(16, n_init=3, random_state=0).fit(unit).cluster_centers_
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    assert distance < 1.05 * (2 - 2 * (unit @ other.T).max(1)).mean()
    assert (report["spherical"], tokenizer.quantizer.spherical) == (True, True)


def test_rows_without_a_direction_are_left_out(tmp_path, monkeypatch):
    """Digital silence has zero frames, for encoders that give such."""
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    encoder = MfccEncoder()
    forward = encoder.forward

    def half(*arguments):
        frames = forward(*arguments)
        frames.features[:, ::2] = 0
        return frames

    monkeypatch.setattr(encoder, "forward", half)
    tokenizer, report = fit(str(tmp_path), encoder, 4, name="x", spherical=True, iterations=3, restarts=1)
    assert report["frames sampled"] == report["frames seen"] // 2
    assert bool(torch.isfinite(tokenizer.quantizer.centroids).all())


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="silence_gap 7"):
        fit(nowhere, MfccEncoder(), 4, name="x", silence_gap=7)
    with pytest.raises(InputError, match="silence_gap -1"):
        fit(nowhere, MfccEncoder(), 4, name="x", segmenter=Greedy(), silence_gap=-1)
    with pytest.raises(InputError, match="max_seconds"):
        fit(nowhere, MfccEncoder(), 4, name="x", window=WindowRule(0.05, 0.0))


def test_too_few_segments(clips):
    with pytest.raises(InputError, match="gives 0 segments, fewer than 4 clusters"):
        fit(str(clips), MfccEncoder(), 4, name="x", segmenter=Greedy(1e9), standardize=True)


def test_files_that_cannot_be_cut_are_counted(clips, monkeypatch):
    files, frames = mfcc(clips)
    longest = sorted(map(len, frames))[-2]
    monkeypatch.setattr("speechtok.segmenters.min_cut._LONGEST", longest)
    segmenter = MinCut(0.0, frame_rate=100.0)
    _, report = fit(str(clips), MfccEncoder(), 4, name="x", segmenter=segmenter, iterations=3, restarts=1)
    assert (report["files"], report["files failed"]) == (len(files) - 1, 1)


def command(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)], catch_exceptions=False)


def test_the_command(tmp_path, clips, clip):
    arguments = ["--segmenter", "greedy", "--norm-threshold", 60, "--merge-threshold", 0.9, "--silence-gap", 7]
    result = command(
        clips, "-o", tmp_path / "mine", "-k", 12, *arguments, "--spherical", "--iterations", 5, "--restarts", 1,
        "--json", tmp_path / "fit.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "fit.json").read_text())["segments sampled"] > 50
    tokenizer = speechtok.load(tmp_path / "mine")
    assert tokenizer.segmenter == LOUD
    assert (tokenizer.silence_gap, tokenizer.quantizer.spherical, tokenizer.vocab_size) == (7, True, 13)
    assert len(tokenizer.encode(clip)) > 5
    for cut, expected in (("min-cut", MinCut(frame_rate=100.0)), ("norm-peaks", NormPeaks())):
        options = ["-k", 4, "--iterations", 2, "--restarts", 1]
        assert command(clips, "-o", tmp_path / cut, "--segmenter", cut, *options).exit_code == 0
        assert speechtok.load(tmp_path / cut).segmenter == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norm-threshold", 2.6], "--norm-threshold: only with --segmenter"),
        (["--merge-threshold", 0.8, "--silence-gap", 7], "--merge-threshold, --silence-gap: only with --segmenter"),
        (["--segmenter", "norm-peaks", "--norm-threshold", 1], "norm-peaks has no thresholds"),
        (["--segmenter", "greedy", "--norm-threshold", "nan"], "norm_threshold is nan"),
    ],
)
def test_options_that_do_not_fit_together(tmp_path, clips, options, message):
    with pytest.raises(InputError, match=message) as error:
        command(clips, "-o", tmp_path / "out", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
