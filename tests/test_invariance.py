"""`evaluate invariance`: figures against plain code, guards, curves, broken files, the page and the command."""

import json
from html.parser import HTMLParser
from pathlib import Path

import editdistance
import numpy as np
import pytest
import soundfile
import torch
from speechtok.cli import app
from typer.testing import CliRunner

import speechtok
from speechtok.audio.augment import AugmentResources, augment
from speechtok.audio.decode import load
from speechtok.audio.mixing import mix_at_snr
from speechtok.encoders.lipcot import LipcotConfig, LipcotEncoder
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import InputError
from speechtok.evaluation import invariance
from speechtok.evaluation.complexity import VIEWS, Seen, complexity, see, views_of
from speechtok.evaluation.invariance_report import figure_of, write_report
from speechtok.metrics.edit_distance import aggregate, distances, interval, unit_edit_distance
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer
from speechtok.units import run_lengths

CLIPS = Path(__file__).resolve().parents[1] / "assets" / "clips"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three clips cut to 1.5 s, and a file that is none."""
    path = tmp_path_factory.mktemp("sounds")
    for clip in sorted(CLIPS.glob("librispeech-*.[fo]*"))[:3]:
        soundfile.write(path / f"{clip.stem}.flac", load(clip, 16000)[:24000], 16000)
    (path / "broken.wav").write_bytes(b"no sound")
    return path


@pytest.fixture(scope="module")
def constant() -> Tokenizer:
    """Says always the same."""
    return Tokenizer(MfccEncoder(), KMeans(np.concatenate([np.zeros((1, 39)), np.full((9, 39), 1e6)])), name="constant")


@pytest.fixture(scope="module")
def result(folder: Path, constant: Tokenizer) -> dict:
    return invariance.evaluate(
        folder, [speechtok.load("mfcc-k100"), constant], families=("noise", "stretch"), curve_files=4, seed=3
    )


def runs(units) -> list[int]:
    return run_lengths(units.ids)[0].tolist()


def test_distances_are_those_of_plain_code(result: dict, folder: Path) -> None:
    tokenizer = speechtok.load("mfcc-k100")
    found = []
    for path in sorted(folder.glob("*.flac")):
        wave, rate = soundfile.read(path, dtype="float32")
        assert rate == 16000
        changed = augment(wave, rate, "noise", path.stem, 3, AugmentResources.default())
        clean = runs(tokenizer.encode(wave, rate))
        found.append(100 * editdistance.eval(clean, runs(tokenizer.encode(changed, rate))) / len(clean))
    figures = result["tokenizers"]["mfcc-k100"]
    assert figures["ued"]["noise"] == pytest.approx(np.mean(found))
    low, high = figures["ued_ci"]["noise"]
    assert min(found) - 1e-9 <= low <= figures["ued"]["noise"] <= high <= max(found) + 1e-9
    assert figures["utterances"] == 3 and figures["seconds"] == pytest.approx(4.5)
    assert figures["units_per_second"] == pytest.approx(100, abs=2)
    assert 0 <= figures["floor"]["pad"] < figures["floor"]["delay"] < figures["ued"]["noise"]
    assert figures["chance"] > 80 and not figures["collapsed"]


def test_a_constant_tokenizer_does_not_look_good(result: dict) -> None:
    figures = result["tokenizers"]["constant"]
    assert figures["ued"] == {"noise": 0, "stretch": 0} and figures["chance"] == 0
    assert figures["collapsed"] and figures["vocab_used"] == 1 and figures["vocab_size"] == 10


def test_curves_follow_the_strength(result: dict) -> None:
    curve = result["tokenizers"]["mfcc-k100"]["curves"]["noise"]
    assert curve["strength"] == [0, 5, 10, 15, 20, 30] and curve["files"] == 3
    assert curve["ued"][0] > curve["ued"][-1]
    assert all(low <= value <= high for value, (low, high) in zip(curve["ued"], curve["ued_ci"], strict=True))
    assert set(result["tokenizers"]["mfcc-k100"]["curves"]) == {"noise", "stretch"}


def test_broken_files_are_named_and_the_rest_goes_on(result: dict) -> None:
    assert list(result["failed"]) == ["broken.wav"] and "broken.wav" in result["failed"]["broken.wav"]
    said = result["conventions"]
    assert said["norm"] == "dedup_ref" and said["agg"] == "mean"
    assert said["noise"] == "12 files of noise, split train" and said["rir"].startswith("simulated rooms")


class Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


def test_the_page_holds_everything(result: dict, tmp_path: Path) -> None:
    renamed = {**result, "tokenizers": {"<b>": result["tokenizers"]["mfcc-k100"]}}
    page = write_report(renamed, tmp_path / "report").read_text()
    parsed = Words()
    parsed.feed(page)
    assert not parsed.open and "<b>" in parsed.words
    text = " ".join(parsed.words)
    assert f"{result['tokenizers']['mfcc-k100']['ued']['noise']:.1f}" in text
    for words in ("runs of the clean sequence", "seed 3", "noise: 5 to 15 dB", "Chance"):
        assert words in text
    assert (tmp_path / "report" / "ued.png").read_bytes().startswith(b"\x89PNG")


def test_no_curve_leaves_its_panel(result: dict) -> None:
    figure = figure_of(result)
    for axes, family in zip(figure.axes, ("noise", "stretch"), strict=True):
        highest = max(high for one in result["tokenizers"].values() for _, high in one["curves"][family]["ued_ci"])
        assert axes.get_title() == family and axes.get_ylim()[0] == 0 and highest < axes.get_ylim()[1] < 2 * highest
        # A line is broken where the strength changes nothing.
        assert all(np.isnan(line.get_xdata()).any() == (family == "stretch") for line in axes.lines)


def test_saturated_bits_are_marked(result: dict, tmp_path: Path) -> None:
    bits = {"bits": 3.91, "ci": [3.5, 4.0], "most_bits": 4.0, "saturated": True}
    figures = result["tokenizers"]["mfcc-k100"]
    figures = figures | {"complexity": {"units": bits, "frames": bits | {"bits": 1.25, "saturated": False}}}
    figures |= {"groups": {"native": result["tokenizers"]["constant"]}}
    page = write_report({**result, "tokenizers": {"one": figures}}, tmp_path / "report").read_text()
    assert "&ge; 3.91" in page and "1.25" in page and "&ge; 1.25" not in page
    assert "<td>one, native</td>" in page


def test_complexity_of_units_and_frames(constant: Tokenizer) -> None:
    # Utterances that are easily told apart: tones of their own, which no family moves far.
    time = np.arange(16000) / 16000
    waves = [0.3 * np.sin(2 * np.pi * 150 * 1.25**number * time).astype(np.float32) for number in range(16)]

    def seen(tokenizer: Tokenizer) -> list[Seen]:
        settings = {"families": ("noise", "stretch"), "resources": AugmentResources.default()}
        return [see(views_of(wave, 16000, f"tone {at}", **settings), tokenizer) for at, wave in enumerate(waves)]

    clear = complexity(seen(speechtok.load("mfcc-k100")), 100)
    for part in ("units", "frames"):
        found = clear[part]
        assert found["most_bits"] == 4 and 2 < found["bits"] <= 4
        assert [count for count, _ in found["by_utterances"]] == [4, 8, 16]
        assert found["by_utterances"][-1][1] == found["bits"]
    alike = seen(constant)
    assert complexity(alike, constant.vocab_size)["units"]["bits"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="at least 16"):
        complexity(alike[:15], constant.vocab_size)


def test_complexity_falls_from_all_to_nothing_with_the_noise() -> None:
    """Of sounds: as they are they are told apart (saturated), as silence not at all, and the less the more noise."""
    generator = np.random.default_rng(0)
    tokenizer, time = speechtok.load("mfcc-k100"), np.arange(8000) / 16000
    sounds = [np.sin(2 * np.pi * 300 * 1.1**number * time).astype(np.float32) for number in range(16)]

    def mean_of(change) -> dict[str, float]:
        seen = [see([change(sound) for _ in range(3 * VIEWS)], tokenizer) for sound in sounds]
        return {part: found["mean"] for part, found in complexity(seen, 100).items()}

    def noisy(snr_db: float):
        return lambda sound: mix_at_snr(sound, generator.standard_normal(len(sound)).astype(np.float32), snr_db)

    alike = mean_of(lambda sound: sound)
    assert alike["frames"] == pytest.approx(16) and alike["units"] > 6  # some tones have the same unit
    assert mean_of(np.zeros_like) == {"units": pytest.approx(1), "frames": pytest.approx(1)}
    falling = [mean_of(noisy(snr_db)) for snr_db in (30.0, 10.0, -10.0, -40.0)]
    values = [one["frames"] for one in falling]
    assert values == sorted(values, reverse=True) and values[-1] < 2
    # A little noise makes units of steady tones differ where they were the same: they are told apart better.
    assert falling[1]["units"] > alike["units"] > 3 * falling[-1]["units"]


def test_all_tokenizers_are_measured_on_the_same_files(folder: Path, constant: Tokenizer, tmp_path: Path) -> None:
    """A file that cannot be used at the rate of one tokenizer, or in one version, counts for none."""
    for place, path in enumerate(sorted(folder.glob("*.flac"))):
        (tmp_path / "ab"[place % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[place % 2] / path.name).write_bytes(path.read_bytes())
    soundfile.write(tmp_path / "a" / "silence.wav", np.zeros(24000), 16000)  # no noise can be added to it
    encoder = LipcotEncoder(LipcotConfig(sample_rate=8000))
    slow = Tokenizer(encoder, KMeans(np.zeros((1, encoder.dim))), name="slow")
    found = invariance.evaluate(
        tmp_path, [constant, slow], families=("stretch", "noise"), curve_files=4, complexity_files=0, groups=True
    )
    assert list(found["failed"]) == ["a/silence.wav"] and found["files"] == 3
    for figures in found["tokenizers"].values():
        assert figures["utterances"] == 3
        assert {name: group["utterances"] for name, group in figures["groups"].items()} == {"a": 2, "b": 1}
        assert figures["curves"]["noise"]["files"] == 3
        assert "groups" not in figures["groups"]["a"]


def test_figures_do_not_depend_on_the_tokenizers_beside(result: dict, folder: Path) -> None:
    alone = invariance.evaluate(
        folder, [speechtok.load("mfcc-k100")], families=("noise", "stretch"), curve_files=4, seed=3
    )
    assert alone["tokenizers"]["mfcc-k100"] == result["tokenizers"]["mfcc-k100"]


def test_intervals_cover_the_mean_of_many_samples() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        lengths = generator.integers(20, 60, 60)
        edits = generator.binomial(lengths, 0.3)
        low, high = interval(edits, lengths, "pooled", resamples=300, seed=trial)
        covered += low <= 30 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_aggregates_are_those_of_the_distance() -> None:
    generator = np.random.default_rng(1)
    pairs = [[generator.integers(0, 9, 30) for _ in range(5)] for _ in range(2)]
    for norm in ("dedup_ref", "frames", "max_len"):
        for agg in ("mean", "pooled"):
            assert aggregate(*distances(*pairs, norm), agg) == unit_edit_distance(*pairs, norm=norm, agg=agg)


def test_unusable_options_are_refused(folder: Path, constant: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a name twice"):
        invariance.evaluate(folder, [constant, constant])
    with pytest.raises(InputError, match="codebooks"):
        invariance.evaluate(folder, [constant], codebook=1)
    with pytest.raises(InputError, match="one of stretch"):  # before anything is looked for
        invariance.evaluate(folder / "nowhere", [constant], families=("noise", "nois"))
    with pytest.raises(InputError, match="complexity of 4 files: at least 16"):
        invariance.evaluate(folder, [constant], complexity_files=20)
    with pytest.raises(InputError, match="at least one family"):
        invariance.evaluate(folder, [constant], families=())
    (tmp_path / "no.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match="nothing could be measured"):
        invariance.evaluate(tmp_path, [constant])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    command = ["evaluate", "invariance", str(folder), "-t", "mfcc-k100", "--family", "noise", "--curve-files", "0"]
    command += ["--json", str(tmp_path / "ued.json"), "--report", str(tmp_path / "page"), "--log", "plain"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3, done.output  # a broken file
    found = json.loads((tmp_path / "ued.json").read_text())["tokenizers"]["mfcc-k100"]
    assert isinstance(found["ued"]["noise"], float) and len(found["ued_ci"]["noise"]) == 2
    assert f"{found['ued']['noise']:.1f}" in done.output and "broken.wav" in done.output
    assert (tmp_path / "page" / "report.html").exists() and not (tmp_path / "page" / "ued.png").exists()
    assert torch.is_grad_enabled()
