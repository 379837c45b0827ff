"""Continua with formants where they were asked for, morphs with true ends, and the index of vectors and encoders."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok.audio.decode import load
from speechtok.audio.formants import FIELDS, speak
from speechtok.audio.morph import morph
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.pretrained import build
from speechtok.encoders.saved import save_encoder
from speechtok.errors import AudioError, InputError, UnknownNameError
from speechtok.evaluation.alignments import Span, Utterance, read
from speechtok.evaluation.categorical import Embedding, compare
from speechtok.evaluation.continua import (
    CONTRASTS,
    RIMES,
    SAMPLE_RATE,
    Contrast,
    evaluate,
    morphed,
    synthesize,
    word_pairs,
)
from speechtok.metrics.categorical import discriminability_index
from speechtok.quantizers.kmeans import KMeans
from speechtok.segmenters import Greedy
from speechtok.tokenizer import Tokenizer
from tests.conftest import tiny_encoder

RNG = np.random.default_rng(0)


def envelope(wave):
    """Log spectrum in 20 bands of 400 Hz."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    edges = np.linspace(0, len(power), 21).astype(int)
    return np.log(np.array([power[a:b].mean() for a, b in pairwise(edges)]) + 1e-9)


def still(**values):
    """A sound of 400 ms that does not move."""
    row = {"f1": 500, "f2": 1500, "f3": 2500, "voice": 0, "breath": 0, "friction": 0, "centre": 2500, "width": 500}
    table = np.array([[(row | values)[name] for name in FIELDS]] * 2, float)
    return speak(np.array([0.0, 0.4]), table, (100.0, 100.0), 0)


@pytest.mark.parametrize("formants", [(300, 1200, 2200), (700, 1100, 2600), (450, 2000, 2800)])
def test_formants_are_where_they_were_asked_for(formants):
    """Harmonics of 100 Hz: those next to a formant are the strongest between its neighbours."""
    wave = still(voice=1, **dict(zip(("f1", "f2", "f3"), formants, strict=True)))[800:-800]
    size = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), SAMPLE_RATE))  # bins of 1 Hz
    harmonics = np.array([size[100 * k - 3 : 100 * k + 4].max() for k in range(1, 40)])
    for formant in formants[1:]:
        near = np.arange(39)[np.abs(100 * np.arange(1, 40) - formant) <= 300]
        assert abs(100 * (near[harmonics[near].argmax()] + 1) - formant) <= 100
    assert size[200:3900].max() == harmonics.max()


def test_frication_is_where_it_was_asked_for():
    for centre in (3000, 5800):
        power = np.abs(np.fft.rfft(still(friction=1, centre=centre), SAMPLE_RATE)) ** 2
        smooth = np.convolve(power, np.ones(400), "same")
        assert abs(smooth.argmax() - centre) < 400


def test_every_continuum_moves_in_one_direction():
    for contrast in CONTRASTS:
        waves = synthesize(contrast, RIMES[0], steps=5)
        assert len(waves) == 5
        assert all(wave.dtype == np.float32 and 0.28 < np.abs(wave).max() <= 0.3 for wave in waves)
        lengths = np.diff([len(wave) for wave in waves])
        assert np.ptp(lengths) <= 1
        shortest = min(map(len, waves))
        part = slice(0, shortest // 2) if contrast.place == "onset" else slice(-shortest // 2, None)
        vectors = np.array([envelope(wave[part]) for wave in waves])
        away = np.linalg.norm(vectors - vectors[0], axis=1)
        assert away[-1] > 0.5
        assert away[-1] == away.max()


def test_vowels_rhyme_and_noise_is_one():
    """Endpoints are equal behind the consonant; the same call gives the same samples."""
    first, *_, last = synthesize(Contrast("B", "D"), "AA")
    assert len(first) == len(last)
    tail = slice(-int(0.15 * SAMPLE_RATE), None)
    assert np.abs(first[tail] / np.abs(first[tail]).max() - last[tail] / np.abs(last[tail]).max()).max() < 0.02
    assert all(np.array_equal(a, b) for a, b in zip(*(synthesize(CONTRASTS[5], "IY") for _ in "ab"), strict=True))


def test_bad_options():
    for arguments, message in (
        ((Contrast("B", "Q"), "AA"), "Q: use B"),
        ((Contrast("B", "D"), "XX"), "XX: use"),
    ):
        with pytest.raises(InputError, match=message):
            synthesize(*arguments)
    with pytest.raises(InputError, match="2 steps"):
        synthesize(CONTRASTS[0], "AA", steps=1)
    with pytest.raises(InputError, match="40 to 500"):
        synthesize(CONTRASTS[0], "AA", pitch=(20.0, 100.0))
    with pytest.raises(InputError, match="a track of"):
        speak(np.array([0.0, 1.0]), np.zeros((2, 3)), (100.0, 100.0), 0)


# -- morphing -------------------------------------------------------------------------------------------------------


def test_morph_ends_are_the_sounds():
    first, second = synthesize(Contrast("S", "SH"), "AY", steps=2)
    second = np.concatenate([second, second[-800:] * 0])
    waves = morph(first, second, SAMPLE_RATE, steps=3)
    assert [len(wave) for wave in waves] == [len(first), round((len(first) + len(second)) / 2), len(second)]
    ends = [envelope(wave) for wave in (first, second)]
    for wave, own, other in ((waves[0], *ends), (waves[-1], *ends[::-1])):
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(
            np.sqrt(np.mean((first if wave is waves[0] else second) ** 2)), rel=1e-3
        )
        assert np.abs(envelope(wave) - own).mean() < np.abs(envelope(wave) - other).mean()
    middle = envelope(waves[1])
    assert all(np.linalg.norm(middle - end) < np.linalg.norm(ends[0] - ends[1]) for end in ends)


def test_morph_of_one_sound_with_itself(clip_wave):
    word = clip_wave[16000:24000]
    for wave in morph(word, word, 16000, steps=2):
        assert np.abs(envelope(wave) - envelope(word)).mean() < 1.0


def test_bad_morphs():
    tone = np.sin(np.arange(4000) / 10).astype(np.float32)
    for bad in (tone[:100], tone * 0, np.stack([tone, tone])):
        with pytest.raises(AudioError, match="no morphs"):
            morph(tone, bad, 16000)
    with pytest.raises(InputError, match="2 steps"):
        morph(tone, tone, 16000, steps=1)


def test_word_pairs():
    def says(speaker, *words):
        spans, phones, clock = [], [], 0.0
        for name, sounds, length in words:
            start = clock
            for sound in sounds.split():
                phones.append(Span(sound, clock, clock + length / len(sounds.split())))
                clock = phones[-1].end
            spans.append(Span(name, start, clock))
        return Utterance(f"{speaker}.flac", speaker, tuple(spans), tuple(phones))

    utterances = [
        says("a", ("rest", "R EH S T", 0.4), ("lest", "L EH S T", 0.5), ("list", "L IH S T", 0.5)),
        says("a", ("rest", "R EH S T", 0.6), ("mist", "M IH S T", 0.1), ("at", "AE T", 0.4)),
        says("b", ("best", "B EH S T", 0.5)),
    ]
    ((first, second),) = word_pairs(utterances)
    assert (first.word.name, second.word.name, second.word.end) == ("lest", "rest", pytest.approx(0.6))
    assert word_pairs(utterances[2:]) == []


def test_morphs_of_real_words(shared):
    folder = shared / "speech" / "dev"
    pairs = word_pairs(read(folder), limit=2)
    assert len(pairs) == 2
    (waves,) = morphed(folder, pairs[:1], steps=2)
    for one, wave in zip(pairs[0], waves, strict=True):
        span = slice(*(round(time * SAMPLE_RATE) for time in (one.word.start, one.word.end)))
        word = load(folder / one.path, SAMPLE_RATE)[span]
        assert abs(len(wave) - len(word)) <= 1
        assert np.corrcoef(envelope(wave), envelope(word))[0, 1] > 0.9


# -- the index ------------------------------------------------------------------------------------------------------


def test_index_of_known_vectors():
    line = np.outer(1 - np.linspace(0, 1, 11), [1.0, 0.0]) + np.outer(np.linspace(0, 1, 11), [0.0, 1.0])
    step = np.repeat(np.eye(2), [6, 5], axis=0)
    assert discriminability_index(step) == discriminability_index(step, similarity="distance") == 0
    assert discriminability_index(step, keep_middle=True) == pytest.approx(1 / 11)
    assert discriminability_index(line, similarity="distance") == pytest.approx(0.2)
    assert discriminability_index(line, similarity="distance", keep_middle=True) == pytest.approx(2.5 / 11)
    # On this line the cosines to the ends are in the ratio of the weights.
    assert discriminability_index(line) == pytest.approx(0.2)
    assert discriminability_index(line + 100) == pytest.approx(0.5, abs=0.01)
    assert discriminability_index(line[::-1]) == pytest.approx(discriminability_index(line))


def test_index_of_functions():
    """A function that is told the place on the continuum, and one that is deaf."""
    continua = [[np.full(10, step / 10, np.float32) for step in range(11)] for _ in range(3)]
    sharp = evaluate(lambda wave: np.array([1.0, 0.0]) if wave[0] < 0.5 else np.array([0.0, 1.0]), continua)
    smooth = evaluate(lambda wave: np.array([1 - wave[0], wave[0]]), continua)
    assert sharp["cosine"]["mean"] == sharp["distance"]["mean"] == 0
    assert smooth["distance"]["mean"] == pytest.approx(0.2, abs=1e-6)
    assert (smooth["continua"], smooth["same"], smooth["middle"]) == (3, 0, "left out")
    with pytest.raises(InputError, match="none of the 3 continua"):
        evaluate(lambda wave: np.ones(2), continua)


@pytest.mark.parametrize(
    ("vectors", "similarity", "message"),
    [
        (np.ones((1, 3)), "cosine", "2 steps or more"),
        (np.full((3, 3), np.nan), "cosine", "finite"),
        (np.ones((3, 3)), "cosine", "same vector"),
        (RNG.normal(size=(3, 3)), "dot", "none of cosine, distance"),
    ],
)
def test_bad_vectors(vectors, similarity, message):
    with pytest.raises(InputError, match=message):
        discriminability_index(vectors, similarity=similarity)


# -- tokenizers and encoders ----------------------------------------------------------------------------------------


def frames_of(encoder, wave):
    with torch.inference_mode():
        return encoder(torch.from_numpy(wave)[None]).features[0].double().numpy()


def test_embedding_is_the_mean_frame(clip_wave):
    encoder, wave = MfccEncoder(), clip_wave[:16000]
    frames = frames_of(encoder, wave)
    assert Embedding(encoder)(wave) == pytest.approx(frames.mean(0), rel=1e-9)
    units = KMeans(frames[:3].astype(np.float32))
    assert np.array_equal(Embedding(Tokenizer(encoder, units, name="t"))(wave), Embedding(encoder)(wave))
    with pytest.raises(InputError, match="shorter than a frame"):
        Embedding(encoder)(wave[:300])


def test_embedding_resamples(clip, clip_wave):
    tiny = tiny_encoder("hubert")
    fast = build("hubert", tiny.config_dict() | {"sample_rate": 24000}, 2)
    fast.load_state_dict(tiny.state_dict())
    assert Embedding(fast)(clip_wave) == pytest.approx(frames_of(tiny, load(clip, 24000)).mean(0), rel=1e-6)


def test_embedding_of_the_voiced_stretch(clip_wave):
    encoder = MfccEncoder()
    frames = frames_of(encoder, clip_wave)
    segmenter = Greedy(float(np.quantile(np.linalg.norm(frames, axis=1), 0.3)), 0.7)
    tokenizer = Tokenizer(encoder, KMeans(frames[:3].astype(np.float32)), name="t", segmenter=segmenter)
    embed = Embedding(tokenizer)
    inside = np.concatenate([np.arange(begin, end) for begin, end in segmenter.segment(frames.astype(np.float32))[0]])
    assert 0 < len(inside) < len(frames)
    assert embed(clip_wave) == pytest.approx(frames[inside].mean(0), rel=1e-9)
    assert embed.unvoiced == 0
    tokenizer.segmenter = Greedy(1e9)
    deaf = Embedding(tokenizer)
    assert deaf(clip_wave) == pytest.approx(frames.mean(0), rel=1e-9)
    assert deaf.unvoiced == 1


def test_compare(tmp_path):
    save_encoder(tiny_encoder("hubert"), tmp_path / "encoder")
    told = []
    names = ["mfcc-k100", f"{tmp_path / 'encoder'}:1"]
    results = compare(names, limit=3, on_event=told.append)
    assert [one["tokenizer"] for one in results] == [*names, "log mel", "MFCC"]
    assert [one["synthetic"]["continua"] for one in results] == [3] * 4
    assert results[0]["synthetic"] == results[3]["synthetic"]  # its encoder
    pairs = [(contrast, vowel) for contrast in CONTRASTS for vowel in RIMES][::24]
    expected = evaluate(lambda wave: frames_of(MfccEncoder(), wave).mean(0), [synthesize(*pair) for pair in pairs])
    for name in ("cosine", "distance"):
        assert results[3]["synthetic"][name]["mean"] == pytest.approx(expected[name]["mean"], rel=1e-6)
    assert all((one["morphed"], one["unvoiced"]) == (None, 0) for one in results)
    assert told[-1].done == told[-1].total > 0
    with pytest.raises(InputError, match="nothing is to be measured"):
        compare([], baselines=False)
    with pytest.raises(InputError, match="at least 1"):
        compare([], limit=0)
    with pytest.raises(UnknownNameError, match="tokenizers are"):
        compare(["nothing"])


def test_continua_command(shared, tmp_path):
    words = ["--words", str(shared / "speech" / "dev"), "--limit", "2", "--json", str(tmp_path / "facts.json")]
    done = CliRunner().invoke(app, ["evaluate", "continua", "-t", "mfcc-k100", *words], catch_exceptions=False)
    assert done.exit_code == 0
    written = json.loads((tmp_path / "facts.json").read_text())
    assert [one["tokenizer"] for one in written] == ["mfcc-k100", "log mel", "MFCC"]
    assert written[0]["morphed"]["continua"] == 2
    assert written == json.loads(json.dumps(compare(["mfcc-k100"], words=shared / "speech" / "dev", limit=2)))
    for text in ("Discriminability index", "log mel", "morphed", "by distance", "order alone", "Sylber 0.112"):
        assert text in done.stdout
