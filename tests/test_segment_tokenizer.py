"""Tokenizers of segments: their units by hand, silence, bundles, memory; equivalence/test_segments.py has the rest."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechtok.canonical import FramePass
from speechtok.corpus.convert import convert
from speechtok.corpus.engine import tokenize
from speechtok.corpus.formats import FORMATS, read
from speechtok.corpus.rows import read_parts
from speechtok.errors import CheckpointError, FingerprintError, FormatError, InputError
from speechtok.evaluation.abx import evaluate as evaluate_abx
from speechtok.evaluation.units import evaluate as evaluate_units
from speechtok.frames import WindowRule
from speechtok.quantizers.base import Codes
from speechtok.quantizers.kmeans import KMeans
from speechtok.segmenters import Greedy, MinCut, NormPeaks, greedy_segment, norm_peak_segment
from speechtok.segments import SegmentPass, Segments, segments_of
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units
from speechtok.windows import WindowBuffer, cut

from .conftest import chunked_tokenizer, frames_of, segmented

ENCODERS = ("mfcc", "chunked", "bidirectional")


def by_hand(tokenizer, wave):
    """Units of a wave at 16 kHz from the plain functions, without windows and batches."""
    frames, segmenter, quantizer = frames_of(tokenizer.encoder, wave), tokenizer.segmenter, tokenizer.quantizer
    if isinstance(segmenter, Greedy):
        spans = greedy_segment(frames, segmenter.norm_threshold, segmenter.merge_threshold, segmenter.count_mode)
    else:
        spans = norm_peak_segment(frames)
    found, end = [], 0
    for begin, stop in spans.tolist():
        mean = frames[begin:stop].astype(np.float64).sum(0) / (stop - begin)
        if quantizer.spherical:
            mean /= np.linalg.norm(mean)
        nearest = int(np.linalg.norm(quantizer.centroids.numpy() - mean, axis=1).argmin())
        if tokenizer.silence_gap is not None and begin - end > tokenizer.silence_gap:
            found.append((quantizer.vocab_size, end, begin))
        found.append((nearest, begin, stop))
        end = stop
    grid = tokenizer.encoder.grid
    times = np.array([(i, grid.span(a)[0], grid.span(b - 1)[1]) for i, a, b in found], np.int64).reshape(-1, 3)
    return Units(*times.T, 16000, tokenizer.vocab_size, tokenizer.fingerprint)


def test_units_are_what_the_parts_give(by_segments, clip_wave):
    for length in (30_000, 9_001, 399, 0):
        wave = clip_wave[:length]
        units = by_segments.encode(wave, 16000)
        assert units == by_hand(by_segments, wave)
    units = by_hand(by_segments, clip_wave[:30_000])
    assert len(units) > 5
    assert len(set(units.ids.tolist())) > 1
    gaps = units.starts[1:] - units.ends[:-1]
    assert (gaps >= 0).all()
    if by_segments.silence_gap is not None:
        assert (units.ids == by_segments.vocab_size - 1).any()
        assert 0 < gaps.max() <= by_segments.silence_gap * by_segments.encoder.hop, (
            "longer gaps have a unit, shorter ones none"
        )


@pytest.mark.parametrize("kind", ["greedy", "norm_peaks"])
@pytest.mark.parametrize("encoder", ["mfcc", "chunked"])
def test_long_files_are_cut_without_a_trace(bases, clip_wave, long_wave, encoder, kind):
    """Segments cross windows as if there were none (encoders of bounded context)."""
    expected = by_hand(segmented(bases[encoder], clip_wave, kind), long_wave)
    for seconds in (3.0, 8.0):
        each = segmented(bases[encoder], clip_wave, kind, window=WindowRule(seconds, 0.1))
        assert len(list(each.windows(long_wave, 16000))) > 2
        units = each.encode(long_wave, 16000)
        assert len(units) > 50
        for name in ("ids", "starts", "ends"):
            assert np.array_equal(getattr(units, name), getattr(expected, name))


def test_spherical_units(tmp_path, bases, clip_wave):
    each = segmented(bases["chunked"], clip_wave, spherical=True)
    assert each.encode(clip_wave, 16000) == by_hand(each, clip_wave)
    again = Tokenizer.load(each.save(tmp_path / "bundle"))
    assert again.quantizer.spherical
    assert again.fingerprint == each.fingerprint
    assert again.encode(clip_wave, 16000) == each.encode(clip_wave, 16000)


# canonical frames


def passed(encoder, windows):
    sound = FramePass.new(encoder)
    parts = [sound.frames(encoder, *window, torch.device("cpu")) for window in windows]
    return np.concatenate([np.zeros((0, encoder.dim), np.float32), *parts])


@pytest.mark.parametrize(("look_ahead", "smoothing"), [(3, 1), (3, 7), (8, 1), (10, 3), (0, 1)])
@pytest.mark.parametrize("frames", [0, 1, 5, 8, 13, 16, 250, 701])
def test_canonical_frames_do_not_depend_on_windows_chunks(long_wave, frames, look_ahead, smoothing):
    base = chunked_tokenizer(long_wave, look_ahead=look_ahead, smoothing=smoothing)
    _same_bits(segmented(base, long_wave[:80_000]), long_wave[: base.encoder.grid.num_samples(frames) + 7])


@pytest.mark.parametrize("frames", [0, 1, 15, 16, 17, 33, 250, 1401])
def test_canonical_frames_do_not_depend_on_windows_blocks(bases, long_wave, frames):
    each = segmented(bases["mfcc"], long_wave[:80_000])
    _same_bits(each, long_wave[: each.encoder.grid.num_samples(frames) + 7])


def _same_bits(each, wave):
    """One window, windows of several lengths, and one chunk at a time as streams have it give the same bits."""
    encoder, frames = each.encoder, each.encoder.grid.num_frames(len(wave))
    expected = passed(encoder, cut([wave], encoder.grid, WindowRule(100, 0), each.context))
    assert len(expected) == frames
    for seconds in (2.5, 4.0):
        windows = list(cut([wave], encoder.grid, WindowRule(seconds, 0), each.context))
        assert np.array_equal(passed(encoder, windows), expected)
    buffer = WindowBuffer(encoder.grid, each.window, each.context, eager=True, chunks=1)
    pieces = [window for at in range(0, len(wave), 900) for window in buffer.push(wave[at : at + 900])]
    assert np.array_equal(passed(encoder, [*pieces, *buffer.flush()]), expected)
    if frames > 20:  # and they are the frames of the encoder
        reference = frames_of(encoder, wave)
        difference = np.linalg.norm(expected - reference, axis=1) / np.linalg.norm(reference, axis=1)
        assert difference.max() < encoder.rounding


# silence


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=12),
    gap=st.integers(0, 4),
    parts=st.integers(1, 4),
)
def test_silence_units_stand_before_segments(lengths, gap, parts):
    spans, expected, at = [], [], 3
    for silence, length in lengths:
        if silence > gap:
            expected.append((99, at, at + silence))
        at += silence
        spans.append((at, at + length))
        expected.append((len(spans), at, at + length))
        at += length
    spans = np.array(spans, np.int64).reshape(-1, 2)
    ids = np.arange(1, len(spans) + 1, dtype=np.int32)
    found, end = [], 3
    for piece in np.array_split(np.arange(len(spans)), parts):  # wherever the segments come in parts
        found.append(Segments(ids[piece], spans[piece]).with_silence(end, gap, 99))
        end = int(spans[piece[-1], 1]) if len(piece) else end
    joined = Segments.join(found)
    assert joined.ids.dtype == np.int32
    assert [(i, *span) for i, span in zip(joined.ids.tolist(), joined.spans.tolist(), strict=True)] == expected


def test_silence_has_no_units(bases, clip_wave):
    for name in ENCODERS:
        each = segmented(bases[name], clip_wave)
        loud = Tokenizer(each.encoder, each.quantizer, name="loud", segmenter=Greedy(1e6), window=each.window)
        for wave in (clip_wave[:20_000], np.tile(clip_wave, 3)):
            units = loud.encode(wave, 16000)
            assert (len(units), units.ids.shape, units.starts.shape) == (0, (0,), (0,))
            with loud.stream(16000) as stream:
                assert len(stream.push(wave)) == len(stream.flush()) == 0


# parts that fit


def test_parts_must_fit(bases, clip_wave):
    each = segmented(bases["mfcc"], clip_wave)
    for gap, segmenter in ((7, None), (-1, Greedy())):
        with pytest.raises(FormatError, match="silence_gap"):
            Tokenizer(each.encoder, each.quantizer, name="x", segmenter=segmenter, silence_gap=gap)

    class Pairs(KMeans):
        codebooks = 2

        def forward(self, features):
            codes = super().forward(features)
            return Codes(codes.ids.repeat(1, 2, 1), codes.margins)

    with pytest.raises(FormatError, match="2 codebooks"):
        Tokenizer(each.encoder, Pairs(np.zeros((2, 39))), name="x", segmenter=Greedy())


def test_windows_of_segments_are_not_for_batches(bases, clip_wave, long_wave):
    each = segmented(bases["chunked"], clip_wave)
    with pytest.raises(InputError, match="encode_windows"):
        each.encode_batch_of_windows(list(each.windows(long_wave, 16000)))


def test_broken_weights_are_noticed(clip_wave):
    base = chunked_tokenizer(clip_wave)
    each = segmented(base, clip_wave)
    with torch.no_grad():
        each.encoder.feature_projection.projection.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        each.encode(clip_wave, 16000)
    with pytest.raises(CheckpointError, match="NaN"):
        each.stream(16000).push(clip_wave)


def test_what_describes_it(by_segments):
    facts = by_segments.describe()
    assert (by_segments.rate, by_segments.bitrate, facts["bitrate"]) == (None, None, None)
    assert facts["segmenter"] == by_segments.segmenter.type
    assert facts["segmenter_config"] == by_segments.segmenter.config_dict()
    assert facts["silence_gap"] == by_segments.silence_gap
    assert (
        by_segments.vocab_size
        == facts["vocab_size"]
        == by_segments.quantizer.vocab_size + (by_segments.silence_gap is not None)
    )


def test_measures_of_frames_refuse_segments(tmp_path, bases, clip_wave):
    each = segmented(bases["mfcc"], clip_wave)
    with pytest.raises(InputError, match="units are segments"):
        evaluate_units(tmp_path, each)
    with pytest.raises(InputError, match="units are segments"):
        evaluate_abx(tmp_path, each, representation="units")


def test_the_fingerprint_sees_the_segmenter(bases, clip_wave):
    each = segmented(bases["mfcc"], clip_wave)

    def other(**changes):
        parts = {"name": "x", "segmenter": each.segmenter, "silence_gap": each.silence_gap, "window": each.window}
        return Tokenizer(each.encoder, each.quantizer, **(parts | changes)).fingerprint

    assert other() == each.fingerprint
    changes = [{"segmenter": Greedy(1.0)}, {"segmenter": NormPeaks()}, {"silence_gap": None}, {"silence_gap": 9}]
    changes.append({"segmenter": None, "silence_gap": None})
    assert len({each.fingerprint, *(other(**change) for change in changes)}) == 6


def test_save_and_load(tmp_path, by_segments, clip_wave):
    again = Tokenizer.load(by_segments.save(tmp_path / "bundle"))
    assert again.fingerprint == by_segments.fingerprint
    assert again.segmenter == by_segments.segmenter
    assert again.silence_gap == by_segments.silence_gap
    assert again.encode(clip_wave, 16000) == by_segments.encode(clip_wave, 16000)


def test_damaged_bundles_are_refused(tmp_path, bases, clip_wave):
    good = segmented(bases["mfcc"], clip_wave).save(tmp_path / "good")
    facts = json.loads((good / "tokenizer.json").read_text())
    for change, error in [
        ({"segmenter": "magic"}, FormatError),
        ({"segmenter": 3}, FormatError),
        ({"segmenter_config": {"magic": 1}}, FormatError),
        ({"segmenter_config": [1]}, FormatError),
        ({"segmenter_config": {"norm_threshold": "loud"}}, FormatError),
        ({"silence_gap": "7"}, FormatError),
        ({"silence_gap": -7}, FormatError),
        ({"segmenter": None}, FormatError),
        ({"quantizer_config": {"spherical": 1}}, FormatError),
        ({"quantizer_config": 5}, FormatError),
        ({"silence_gap": 8}, FingerprintError),
    ]:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        folder = shutil.copytree(good, tmp_path / "bad")
        (folder / "tokenizer.json").write_text(json.dumps(facts | change))
        with pytest.raises(error, match=str(folder) if error is FingerprintError else "bad|silence_gap"):
            Tokenizer.load(folder)


# near-ties


def test_a_near_tie_of_a_mean_is_seen(bases, clip_wave):
    """The bound is that of the frames, seen from the mean: two centroids beside a short mean of long frames."""
    frames = np.array([[10.0, 0, 0.1], [-10.0, 0, 0.1]], np.float32)
    encoder = bases["mfcc"].encoder
    moved = encoder.rounding * 10  # as far as the mean may be moved

    def near(distance):
        """Of a mean that lies `distance` off the border of two centroids."""
        wide = np.zeros((2, 39), np.float32)
        wide[:, :3] = frames
        centroids = np.zeros((2, 39), np.float32)
        centroids[:, :3] = [[0, 1 + distance, 0.1], [0, -1 + distance, 0.1]]
        each = Tokenizer(encoder, KMeans(centroids), name="x", segmenter=_Halves())
        segments, near = segments_of(each, wide)
        assert segments.spans.tolist() == [[0, 2]]
        return near

    assert near(0.5 * moved)
    assert near(1.5 * moved)
    assert not near(4 * moved)


class _Halves(Greedy):
    """One segment over all frames, never a near-tie itself."""

    def segment(self, frames, slack=0.0):
        return np.array([[0, len(frames)]]), False


@pytest.fixture
def uncuttable(bases, clip_wave):
    """Min-cut, for which a minute of sound without silence is too long."""
    base = bases["mfcc"]
    means, segmenter = frames_of(base.encoder, clip_wave)[:20], MinCut(0.0, frame_rate=100.0)
    return Tokenizer(base.encoder, KMeans(means), name="min-cut", segmenter=segmenter, window=base.window)


@pytest.fixture
def endless(long_wave):
    return np.tile(long_wave, 3)


def test_sounds_that_cannot_be_cut(uncuttable, endless, long_wave):
    """The sound is at fault, not those beside it."""
    each = uncuttable
    with pytest.raises(InputError, match="at most 6000"):
        each.encode(endless, 16000)
    jobs = [(i, *job) for i, wave in enumerate((endless, long_wave[:90_000])) for job in each.windows(wave, 16000)]
    parts = [[], []]
    for i, encoded in each.encode_windows(jobs, 60.0):
        parts[i].append(encoded)
    with pytest.raises(InputError, match="at most 6000"):
        each.assemble(parts[0])
    assert each.assemble(parts[1]) == each.encode(long_wave[:90_000], 16000)
    stream = each.stream(16000)
    stream.push(endless)
    with pytest.raises(InputError, match="at most 6000"):
        stream.flush()


# folder jobs


@pytest.fixture
def mixed(tmp_path, clips):
    """Two clips, a silent file, one that is too short, a broken one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(clips.iterdir())[:2]:
        shutil.copy(path, folder)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "short.wav", np.zeros(100), 16000)
    (folder / "broken.wav").write_bytes(b"")
    return folder


@pytest.fixture
def loud(bases, clip_wave):
    """A tokenizer for which digital silence has no segment."""
    each = segmented(bases["mfcc"], clip_wave)
    with torch.inference_mode():
        quiet = frames_of(each.encoder, np.zeros(16000, np.float32))
    threshold = 1.0001 * float(np.linalg.norm(quiet, axis=1).max())
    segmenter = Greedy(threshold, each.segmenter.merge_threshold)
    return Tokenizer(each.encoder, each.quantizer, name="loud", segmenter=segmenter, silence_gap=1, window=each.window)


def reasons(out):
    return {item["key"]: item["reason"] for item in map(json.loads, (out / "errors.jsonl").open())}


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_format(tmp_path, mixed, loud, output_format):
    """Silence is a row without units, or says why not; what `convert` writes is what the job writes."""
    for name in ("parquet", output_format):
        tokenize(mixed, tmp_path / name, tokenizer=loud, output_format=name)
    rows = {row.key: row for row in read_parts(tmp_path / "parquet")}
    assert reasons(tmp_path / "parquet").keys() == {"short", "broken"}
    assert [len(getattr(rows["silent"], name)) for name in ("units", "durations", "starts", "ends")] == [0] * 4
    for key, row in rows.items():
        (path,) = mixed.glob(f"{key}.*")
        units = loud.encode(path)
        assert np.array_equal(row.ids, units.ids)
        assert np.array_equal(row.starts, units.starts_seconds)
        assert np.array_equal(row.ends, units.ends_seconds)
        assert np.array_equal(row.durations * loud.encoder.hop, units.ends - units.starts)
    assert sum(len(row.ids) for row in rows.values()) > 20
    if output_format == "km":
        assert "no units" in reasons(tmp_path / "km")["silent"]
        assert len((tmp_path / "km" / "units.km").read_text().splitlines()) == 2
        with pytest.raises(InputError, match="'silent' cannot be stored as km: it has no units"):
            convert(tmp_path / "parquet", tmp_path / "converted", "km")
        return
    assert reasons(tmp_path / output_format).keys() == {"short", "broken"}
    convert(tmp_path / "parquet", tmp_path / "converted", output_format)
    written = {path.relative_to(tmp_path / "converted") for path in (tmp_path / "converted").rglob("*.*")}
    for name in written - {Path("tokenizer.json")}:
        if name.suffix == ".parquet":
            assert all(map(same_row, read(tmp_path / "converted"), read_parts(tmp_path / "parquet")))
        else:
            assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / output_format / name).read_bytes()
    if output_format in ("parquet", "jsonl"):
        assert all(map(same_row, read(tmp_path / output_format), read_parts(tmp_path / "parquet")))


def same_row(left, right):
    names = ("units", "durations", "starts", "ends")
    return left.key == right.key and all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)


def test_a_file_that_cannot_be_cut_is_an_error_of_its_own(tmp_path, mixed, uncuttable, endless):
    soundfile.write(mixed / "endless.flac", endless, 16000)
    summary = tokenize(mixed, tmp_path / "out", tokenizer=uncuttable)
    assert (summary.files, summary.failed) == (3, 3)
    assert "at most 6000" in reasons(tmp_path / "out")["endless"]


# memory


@pytest.mark.parametrize("encoder", ["mfcc", "chunked"])
def test_a_long_file_is_never_held(bases, clip_wave, long_wave, encoder, monkeypatch):
    each, held = segmented(bases[encoder], clip_wave), []
    push = SegmentPass.push

    def watched(self, *arguments):
        segments = push(self, *arguments)
        held.append(sum(map(len, self.held)))
        return segments

    monkeypatch.setattr(SegmentPass, "push", watched)
    wave = np.tile(long_wave, 6)
    units = each.encode(wave, 16000)
    frames = each.encoder.grid.num_frames(len(wave))
    window = each.encoder.grid.num_frames(each.window.max_samples(each.encoder.grid))
    assert len(held) > 25
    assert units.ends[-1] > 0.9 * len(wave)
    assert max(held) <= 2 * window < frames / 10


@pytest.mark.parametrize("encoder", ["mfcc", "chunked"])
def test_state_does_not_grow(bases, clip_wave, encoder):
    each, sizes = segmented(bases[encoder], clip_wave), []
    with each.stream(16000) as stream:
        for _ in range(30):
            stream.push(clip_wave)
            sizes.append(len(pickle.dumps(stream.state())))
    assert max(sizes[10:]) <= 1.2 * max(sizes[:10])
