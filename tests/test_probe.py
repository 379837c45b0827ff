"""Probes: folds without leaks, classifiers against sklearn, intervals, nothing chosen on test folds, and tones."""

import json

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from speechtok.cli import app, main
from typer.testing import CliRunner

import speechtok
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.saved import save_encoder
from speechtok.errors import InputError, UnknownNameError
from speechtok.evaluation import probe_heads
from speechtok.evaluation.log_mel import LogMelEncoder
from speechtok.evaluation.probe import Problem, compare, figures, score, tasks_of
from speechtok.evaluation.probe_features import OUTPUT, FrozenFeatures, open_encoder
from speechtok.evaluation.probe_folds import Redrawn, grouped_folds
from speechtok.evaluation.probe_heads import PENALTIES, RATES, fit, softmax_regression
from speechtok.frames import WindowRule
from tests.conftest import tiny_encoder

RNG = np.random.default_rng


# --- folds ---


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_groups_stay_whole_and_no_fold_is_empty(data):
    folds = data.draw(st.integers(2, 6))
    groups = data.draw(st.lists(st.integers(0, 15), min_size=folds, max_size=60))
    groups = np.array([*range(folds), *groups])
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(groups), max_size=len(groups))))
    found = grouped_folds(labels, groups, folds, seed=data.draw(st.integers(0, 3)))
    assert set(found.tolist()) == set(range(folds))
    for group in np.unique(groups):
        assert len(np.unique(found[groups == group])) == 1


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=5, max_size=20), st.integers(2, 5))
def test_a_class_of_several_groups_is_in_several_folds(groups, folds):
    labels = np.concatenate([np.full(count, label) for label, count in groups])
    members = np.concatenate([np.full(count, index) for index, (_, count) in enumerate(groups)])
    found = grouped_folds(labels, members, folds)
    for label in np.unique(labels):
        if len(np.unique(members[labels == label])) > 1:
            assert len(np.unique(found[labels == label])) > 1


def test_single_items_are_spread_evenly():
    labels = np.repeat(np.arange(4), (50, 25, 10, 5))
    found = grouped_folds(labels, np.arange(90), 5, seed=3)
    counts = np.array(
        [[np.count_nonzero((found == fold) & (labels == label)) for label in range(4)] for fold in range(5)]
    )
    assert counts.tolist() == [[10, 5, 2, 1]] * 5
    assert not np.array_equal(found, grouped_folds(labels, np.arange(90), 5, seed=4))
    assert np.array_equal(found, grouped_folds(labels, np.arange(90), 5, seed=3))


@pytest.mark.parametrize(("groups", "folds"), [(3, 4), (3, 1)])
def test_too_few_groups(groups, folds):
    with pytest.raises(InputError, match=f"3 groups cannot make {folds} folds"):
        grouped_folds(np.zeros(9, np.int64), np.arange(9) % groups, folds)


# --- intervals ---


def test_intervals_of_groups_equal_a_slow_bootstrap():
    rng = RNG(0)
    groups = np.sort(rng.integers(0, 12, 150))
    labels = rng.integers(0, 3, 150)
    correct = rng.random(150) < np.linspace(0.2, 0.95, 12)[groups]
    means, recalls = [], []
    for _ in range(4000):
        items = np.concatenate([np.flatnonzero(groups == group) for group in rng.integers(0, 12, 12)])
        means.append(correct[items].mean())
        recalls.append(np.mean([correct[items][labels[items] == label].mean() for label in range(3)]))
    redrawn = Redrawn(groups, seed=1)
    assert redrawn.mean(correct.astype(float)) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)
    assert redrawn.balanced(correct, labels) == pytest.approx(np.quantile(recalls, [0.025, 0.975]), abs=0.015)
    low, high = Redrawn(np.arange(150)).mean(correct.astype(float))  # groups are right together: single items hide it
    assert high - low < 0.6 * np.subtract(*redrawn.mean(correct.astype(float))[::-1])


def test_single_items_have_the_binomial_interval():
    correct = np.repeat([True, False], (300, 100))
    low, high = Redrawn(np.arange(400)).mean(correct.astype(float))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.005)


def test_draws_without_a_class_take_the_others():
    labels = np.array([0] * 9 + [1])
    assert Redrawn(np.arange(10), seed=2).balanced(np.ones(10, bool), labels) == (1.0, 1.0)


# --- classifiers ---


@pytest.mark.parametrize(("count", "dim"), [(200, 15), (60, 150)])
def test_softmax_regression_is_sklearns(count, dim):
    rng = RNG(dim)
    x = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim))
    x = (x - x.mean(0)) / x.std(0)
    targets = np.concatenate([np.arange(5), (x[:-5, :5] + rng.normal(size=(count - 5, 5))).argmax(1)])
    new = rng.normal(size=(500, dim))
    for penalty, (weight, bias) in zip(PENALTIES, softmax_regression(x, targets, 5, PENALTIES), strict=True):
        oracle = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=20_000).fit(x, targets)
        assert np.abs(weight - oracle.coef_.T).max() < 2e-3 * np.abs(weight).max()
        assert bias - bias.mean() == pytest.approx(oracle.intercept_ - oracle.intercept_.mean(), abs=2e-3)
        decisions = (new @ weight + bias).argmax(1)
        assert np.mean(decisions == oracle.predict(new)) >= 0.998


def test_a_linear_fit_takes_the_best_penalty_of_inner_groups():
    rng = RNG(5)
    x = rng.normal(size=(120, 30)) * rng.uniform(0.1, 50, 30) + 7
    labels = (x[:, 0] > 7).astype(np.int64) + (x[:, 1] > 9)
    groups = np.arange(120) % 8
    found = fit(x, labels, groups, seed=2)
    inner = grouped_folds(labels, groups, 4, seed=2)
    right = []
    for penalty in PENALTIES:
        hits = 0
        for fold in range(4):
            mean, scale = x[inner != fold].mean(0), x[inner != fold].std(0)
            model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=20_000)
            model.fit((x[inner != fold] - mean) / scale, labels[inner != fold])
            hits += int((model.predict((x[inner == fold] - mean) / scale) == labels[inner == fold]).sum())
        right.append(hits)
    assert found.setting == PENALTIES[int(np.argmax(right))]
    assert found.inner_accuracy == max(right) / 120
    scaled = (x - x.mean(0)) / x.std(0)
    oracle = LogisticRegression(C=1 / found.setting, tol=1e-8, max_iter=20_000).fit(scaled, labels)
    assert np.array_equal(found.predict(x), oracle.predict(scaled))


@pytest.mark.parametrize("hidden", [0, 16])
def test_dimensions_that_never_change_do_no_harm(hidden):
    x = np.stack([np.repeat([0.0, 1.0], 40), np.full(80, 1e6 / 3)], 1)
    labels = np.repeat([3, 1], 40)
    found = fit(x, labels, np.arange(80) % 10, hidden=hidden)
    assert np.array_equal(found.predict(x), labels)


@pytest.mark.parametrize("hidden", [0, 16])
def test_nothing_can_be_chosen_within_one_group(hidden):
    with pytest.raises(InputError, match="use more folds"):
        fit(np.zeros((4, 2)), np.array([0, 1, 0, 1]), np.zeros(4, np.int64), hidden=hidden)


def exclusive_or(rng, count=240):
    x = rng.normal(size=(count, 2))
    return x + 0.2 * np.sign(x), ((x > 0).sum(1) == 1).astype(np.int64)


def test_a_hidden_layer_tells_what_no_line_does(monkeypatch):
    monkeypatch.setattr(probe_heads, "EPOCHS", 50)
    x, labels = exclusive_or(RNG(0))
    new, wanted = exclusive_or(RNG(1))
    groups = np.arange(len(x)) % 12
    before = torch.get_rng_state()
    network, line = fit(x, labels, groups, hidden=32, seed=4), fit(x, labels, groups)
    assert np.mean(network.predict(new) == wanted) > 0.95
    assert np.mean(line.predict(new) == wanted) < 0.7
    assert network.setting in RATES
    assert torch.equal(torch.get_rng_state(), before)
    again = fit(x, labels, groups, hidden=32, seed=4)
    assert (again.setting, again.inner_accuracy) == (network.setting, network.inner_accuracy)
    dense = RNG(2).normal(size=(2000, 2))
    assert np.array_equal(again.predict(dense), network.predict(dense))
    assert not np.array_equal(fit(x, labels, groups, hidden=32, seed=5).predict(dense), network.predict(dense))


def test_a_network_keeps_its_best_epoch(monkeypatch):
    """Labels are noise, so that networks get worse on held-out items while they learn the others by heart."""
    rng = RNG(3)
    x, labels, groups = rng.normal(size=(160, 20)), rng.integers(0, 2, 160), np.arange(160) % 16
    inner = grouped_folds(labels, groups, 4, seed=0)
    for epochs in (10, 60):
        monkeypatch.setattr(probe_heads, "EPOCHS", epochs)
        found = fit(x, labels, groups, hidden=64)
        assert np.mean(found.predict(x[inner == 0]) == labels[inner == 0]) == found.inner_accuracy


# --- nesting ---


def problem_of(labels, groups, folds=5):
    names = {f"{i}": f"c{label}" for i, label in enumerate(labels)}
    return Problem.of(names, {f"{i}": f"g{group}" for i, group in enumerate(groups)}, folds)


def test_classes_of_one_group_are_left_out_and_counted():
    problem = problem_of([0, 0, 1, 1, 2, 2, 2, 0, 1], [0, 1, 2, 3, 4, 4, 4, 5, 2], folds=3)
    assert problem.left_out == {"c2": {"items": 3, "groups": 1}}
    assert problem.classes == ["c0", "c1"]
    assert problem.paths == ["0", "1", "2", "3", "7", "8"]
    with pytest.raises(InputError, match="1 of 3 classes occur in two groups or more"):
        problem_of([0, 0, 1, 2], [0, 1, 2, 3], folds=2)


def test_the_majority_is_that_of_the_training_folds():
    problem = problem_of([0] * 6 + [1] * 5 + [0, 1] * 3, [0, 1, 2, 3, 4, 5] + [0, 1, 2, 3, 4] + [6] * 6, folds=3)
    said = problem.majority()
    for fold in range(3):
        rest = problem.labels[problem.fold_of != fold]
        assert set(said[problem.fold_of == fold]) == {int(np.count_nonzero(rest == 1) > np.count_nonzero(rest == 0))}


@pytest.fixture(scope="module")
def informative():
    """120 items of 3 classes and 15 groups; one layer is noise, one tells the class with a little noise."""
    rng = RNG(7)
    labels = rng.integers(0, 3, 120)
    layers = {"0": rng.normal(size=(120, 6)), "1": np.eye(6)[labels] + 0.3 * rng.normal(size=(120, 6))}
    return problem_of(labels, np.arange(120) % 15), layers


@pytest.mark.parametrize("hidden", [0, 16])
def test_labels_of_a_test_fold_have_no_say_in_its_predictions(informative, hidden, monkeypatch):
    problem, layers = informative
    monkeypatch.setattr(probe_heads, "EPOCHS", 10)
    redrawn = Redrawn(problem.groups)
    told, chosen, said = score(layers, problem, redrawn, hidden=hidden)
    changed = problem.labels.copy()
    test = problem.fold_of == 2
    changed[test] = (changed[test] + 1) % 3
    other = Problem(problem.paths, changed, problem.groups, problem.classes, problem.fold_of, {})
    _, chosen_other, said_other = score(layers, other, redrawn, hidden=hidden)
    assert np.array_equal(said[test], said_other[test])
    assert chosen["layer"] == ["1"] * 5
    assert chosen_other["layer"][2] == "1"
    assert chosen_other["folds"][2] < 0.1 < 0.8 < chosen["folds"][2]
    assert chosen["accuracy"] == told["1"]["accuracy"] > 0.8 > 0.5 > told["0"]["accuracy"]
    assert len(told["0"]["learning_rate" if hidden else "penalty"]) == 5


def test_permuted_labels_give_chance(informative):
    problem, layers = informative
    hits = []
    for seed in range(8):
        permuted = RNG(seed).permutation(problem.labels)
        other = Problem(problem.paths, permuted, problem.groups, problem.classes, problem.fold_of, {})
        _, chosen, _ = score(layers, other, Redrawn(problem.groups))
        hits.append(chosen["accuracy"])
    assert 0.25 < np.mean(hits) < 0.42  # one of three; eight runs of 120 have a standard error of 0.015


def test_figures_by_hand():
    problem = problem_of([0, 0, 0, 1, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7], folds=2)
    said = problem.labels.copy()
    said[[0, 3]] = 1 - said[[0, 3]]
    found = figures(said, problem, Redrawn(problem.groups))
    assert found["accuracy"] == 0.75
    assert found["recalls"] == {"c0": 4 / 5, "c1": 2 / 3}
    assert found["balanced_accuracy"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["folds"] == [np.mean((said == problem.labels)[problem.fold_of == fold]) for fold in (0, 1)]
    assert found["interval"][0] < 0.75 < found["interval"][1] <= 1


# --- features ---


@pytest.fixture(scope="module")
def wave(clip_wave):
    return clip_wave[: 16000 * 3]


def test_every_layer_is_pooled(wave):
    encoder = tiny_encoder("hubert")
    features = FrozenFeatures(encoder, pooling="mean-std")
    with torch.inference_mode():
        states = encoder.hidden_states(torch.from_numpy(wave)[None])
    assert features.layers == ["0", "1", "2"]
    for vector, state in zip(features(wave), states, strict=True):
        frames = state[0].double().numpy()
        assert vector == pytest.approx(np.concatenate([frames.mean(0), frames.std(0)]), abs=1e-9)
    means = FrozenFeatures(encoder, ["2", "0"])
    assert means.layers == ["0", "2"]
    for vector, whole in zip(means(wave), (features(wave)[0], features(wave)[2]), strict=True):
        assert np.array_equal(vector, whole[: encoder.dim])
    with pytest.raises(InputError, match="hubert has no layer 3, output; it has 0, 1, 2"):
        FrozenFeatures(encoder, ["3", "1", "output"])


def test_projected_frames_are_a_layer_of_their_own(wave):
    name, encoder, window = open_encoder("w2vbert-mini")
    features = FrozenFeatures(encoder, window=window)
    assert (name, features.layers) == ("w2vbert-mini", ["0", "1", "2", OUTPUT])
    with torch.inference_mode():
        states = encoder.hidden_states(torch.from_numpy(wave)[None])
        states.append(encoder(torch.from_numpy(wave)[None]).features)
    for vector, state in zip(features(wave), states, strict=True):
        assert vector == pytest.approx(state[0].double().mean(0).numpy(), abs=1e-9)
    assert FrozenFeatures(encoder, [OUTPUT], window=window)(wave)[0] == pytest.approx(features(wave)[3], abs=1e-12)


def test_encoders_without_layers_have_one_row(wave):
    for name, kind in (("log-mel", LogMelEncoder), ("mfcc", MfccEncoder)):
        _, encoder, _ = open_encoder(name)
        features = FrozenFeatures(encoder, ["0", "7"])
        assert isinstance(encoder, kind) and features.layers == [OUTPUT]
        frames = encoder(torch.from_numpy(wave)[None]).features[0]
        assert features(wave)[0] == pytest.approx(frames.double().mean(0).numpy(), abs=1e-9)


def test_windows_leave_no_trace_where_context_is_bounded(wave):
    _, encoder, _ = open_encoder("w2vbert-mini")
    whole, cut = (FrozenFeatures(encoder, window=WindowRule(seconds, 0.2))(wave) for seconds in (30.0, 2.7))
    for one, other in zip(whole, cut, strict=True):
        assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()


def test_windows_count_each_frame_once(wave):
    encoder = LogMelEncoder()
    whole, cut = (FrozenFeatures(encoder, None, "mean-std", WindowRule(s, 0.1))(wave)[0] for s in (30.0, 0.7))
    assert cut == pytest.approx(whole, rel=1e-4)


def test_a_sound_shorter_than_a_frame_is_filled_up():
    encoder = LogMelEncoder()
    short = RNG(0).normal(0, 0.1, 100).astype(np.float32)
    padded = np.pad(short, (0, 300))
    assert np.array_equal(FrozenFeatures(encoder)(short)[0], FrozenFeatures(encoder)(padded)[0])


# --- whole tables ---

NOTE_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def tone(midi, timbre, rate=24000, seconds=0.6):
    """Harmonics of a timbre of its own that dies away."""
    times = np.arange(int(rate * seconds)) / rate
    rng = RNG(timbre)
    levels = rng.uniform(0.2, 1, 5) / np.arange(1, 6)
    f0 = 440 * 2 ** ((midi - 69) / 12)
    wave = sum(
        level * np.sin(2 * np.pi * f0 * (i + 1) * times + rng.uniform(0, 6))
        for i, level in enumerate(levels)
        if f0 * (i + 1) < rate / 2
    )
    return (0.2 * wave * np.exp(-3 * times)).astype(np.float32)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """All notes of two octaves on six instruments, and a file that is no sound."""
    folder = tmp_path_factory.mktemp("tones")
    rows = []
    for timbre in range(6):
        for midi in range(55, 79):
            name = f"{timbre}-{midi}.wav"
            soundfile.write(folder / name, tone(midi, timbre), 24000, subtype="FLOAT")
            rows.append({"path": name, "pitch_midi": midi, "instrument": f"i{timbre}", "octave": midi // 12})
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    rows += [
        {"path": "broken.wav", "pitch_midi": 60, "instrument": "i0"},
        {"path": "0-55.wav", "instrument": "repeats"},
        {"path": "gone.wav", "pitch_midi": 61, "instrument": "i1"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def results(tones):
    events = []
    found = compare(tones, ["log-mel", "mfcc"], tasks_of(["pitch_class", "octave"]), on_event=events.append)
    assert [event.stage for event in events] == ["read"] * 290 + ["train"] * 20
    assert all(event.done <= event.total for event in events) and events[-1].done == 20
    return found


def test_a_table_says_what_it_is_made_of(results):
    assert [(found["task"], found["tokenizer"]) for found in results] == [
        ("pitch_class", "log-mel"), ("pitch_class", "mfcc"), ("octave", "log-mel"), ("octave", "mfcc"),
    ]  # fmt: skip
    found = results[1]
    assert (found["items"], found["groups"], found["unlabelled"], found["unseen"]) == (144, 6, 0, 0)
    assert found["classes"] == {name: {"items": 12, "groups": 6} for name in sorted(NOTE_NAMES)}
    assert found["chance"] == 1 / 12
    assert set(found["failed"]) == {"broken.wav", "gone.wav", "0-55.wav"}
    assert "no such file" in found["failed"]["gone.wav"]
    assert found["conventions"]["grouped_by"] == "source instrument"
    assert found["chosen"]["layer"] == [OUTPUT] * 5
    assert found["chosen"]["difference"]["to"] == "log-mel"
    assert found["chosen"]["difference"]["accuracy"] == pytest.approx(
        found["chosen"]["accuracy"] - results[0]["chosen"]["accuracy"]
    )
    assert results[0]["chosen"]["difference"] == {"to": "log-mel", "accuracy": 0.0, "interval": (0.0, 0.0)}
    assert results[2]["majority"]["accuracy"] == 0.5 > results[2]["chance"]  # C4 to B4 of G3 to F#5
    json.dumps(results)


def test_log_mel_hears_octaves_better_than_chance(results):
    assert results[2]["chosen"]["accuracy"] > 0.9


def test_the_constant_q_transform_hears_every_pitch_class(tones):
    pytest.importorskip("speechtok.encoders.cqt")
    (found,) = compare(tones, ["cqt"], tasks_of(["pitch_class"]))
    assert found["chosen"]["accuracy"] == 1.0
    assert found["chosen"]["interval"] == (1.0, 1.0)


def test_columns_and_groups_of_any_manifest(tones):
    tasks = tasks_of([], label="octave", group="instrument")
    (found,) = compare(tones, ["mfcc"], tasks, folds=3)
    assert (found["task"], found["groups"], len(found["chosen"]["folds"])) == ("octave", 6, 3)
    assert found["conventions"]["grouped_by"] == "instrument"
    assert found["unlabelled"] == 1
    assert found["classes"]["4"] == {"items": 30, "groups": 6}
    (single,) = compare(tones, ["mfcc"], tasks_of([], label="octave"), folds=3)
    assert single["groups"] == single["items"] == 144


def test_all_layers_of_an_encoder_folder(tones, tmp_path):
    folder = str(save_encoder(tiny_encoder("w2v_bert"), tmp_path / "encoder"))
    tasks = tasks_of(["octave"])
    (found,) = compare(tones, [folder], tasks, folds=2)
    assert list(found["layers"]) == ["0", "1", "2"]
    (some,) = compare(tones, [folder], tasks, folds=2, layers=["1"])
    assert some["layers"] == {"1": found["layers"]["1"]}
    (ends,) = compare(tones, [f"{folder}:1"], tasks, folds=2, layers=["1"])
    assert ends["layers"] == some["layers"]


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        ([], None, "name a --task"),
        (["pitch"], None, "no task is called pitch; known: pitch_class"),
        (["octave", "pitch_class"], "midi", "the label midi can belong to one task only"),
    ],
)
def test_tasks_that_nobody_knows(names, label, message):
    with pytest.raises(InputError, match=message):
        tasks_of(names, label)


def test_what_compare_refuses(tones):
    tasks = tasks_of(["octave"])
    for options in ({"hidden": -1}, {"pooling": "median"}):
        with pytest.raises(InputError, match="0 or more units"):
            compare(tones, ["mfcc"], tasks, **options)
    with pytest.raises(InputError, match="nothing is to be measured"):
        compare(tones, [], tasks)
    with pytest.raises(InputError, match="6 groups cannot make 7 folds"):
        compare(tones, ["mfcc"], tasks, folds=7)
    with pytest.raises(InputError, match="has no field 'artist'"):
        compare(tones, ["mfcc"], tasks_of(["artist"]))
    with pytest.raises(UnknownNameError):
        compare(tones, ["no-such-encoder"], tasks)


def test_frames_that_are_not_finite_are_told(tones, tmp_path, monkeypatch):
    monkeypatch.setattr(LogMelEncoder, "encode", lambda self, wave, lengths: speechtok_frames(wave))
    features = FrozenFeatures(LogMelEncoder())
    from speechtok.corpus.sources import scan

    vectors, failed = features.read(scan(tones / "0-60.wav").utterances)
    assert vectors == {}
    assert failed == {"0-60.wav": "the log_mel encoder gives frames that are not finite"}


def speechtok_frames(wave):
    from speechtok.encoders.base import Frames

    return Frames(torch.full((1, LogMelEncoder().grid.num_frames(wave.shape[1]), 80), torch.nan), torch.tensor([1]))


def test_the_command(tones, monkeypatch, tmp_path):
    rows = [json.loads(line) for line in (tones / "metadata.jsonl").read_text().splitlines()]
    few = tones / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[::5] if row.get("octave") != 6))
    arguments = ["evaluate", "probe", str(few), "--task", "octave", "-e", "log-mel", "-e", "mfcc", "--folds", "3"]
    done = CliRunner().invoke(app, [*arguments, "--log", "plain", "--json", str(tmp_path / "probe.json")])
    assert done.exit_code == 0, done.output
    expected = compare(few, ["log-mel", "mfcc"], tasks_of(["octave"]), folds=3)
    assert json.loads((tmp_path / "probe.json").read_text()) == json.loads(json.dumps(expected))
    for told in ("octave on few.jsonl", "6 groups (source instrument), 2 classes", "chosen: output,output,output"):
        assert told in " ".join(done.output.split())
    for path in expected[0]["failed"]:
        assert f"{path} is left out" in done.output
    assert f"{100 * expected[1]['chosen']['accuracy']:.1f}" in done.output
    monkeypatch.setattr(probe_heads, "EPOCHS", 2)
    quiet = CliRunner().invoke(app, [*arguments, "--log", "quiet", "--layers", "0, output", "--hidden", "4"])
    assert quiet.exit_code == 0 and "octave on" not in quiet.output


def test_the_command_names_what_is_missing(tones, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speechtok", "evaluate", "probe", str(tones), "--task", "artist"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code not in (0, None)
    assert "has no field 'artist'" in capsys.readouterr().err


def test_shipped_tokenizers_are_probed_by_name():
    assert open_encoder("w2vbert-mini")[1].type == speechtok.load("w2vbert-mini").encoder.type
