"""`make models`, the codec at toy size: training, table, card, and what makes them anew."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import speechtok
from speechtok.corpus.sources import scan
from speechtok.errors import FormatError, InputError
from speechtok.metrics.signal import si_sdr
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder
from speechtok.training import codec_card, codec_models, splits
from speechtok.training.cards import Origin, share_alike
from speechtok.training.codec_config import CodecObjectiveConfig
from speechtok.training.fingerprints import sounds
from speechtok.training.graph import Record, Step, file_hash, plan, run
from speechtok.training.jobs import BUNDLE, Choices, Job, Places
from speechtok.training.recipe import Recipe, section
from tests import toy_sound

pytest.importorskip("pesq", reason="pesq is not installed: it needs a C compiler")

RECIPE = """kind = "codec"
[model]
num_filters = 4
hidden_size = 16
upsampling_ratios = [2, 4, 5, 8]
pad_mode = "constant"
num_lstm_layers = 0
use_conv_shortcut = false
[objective]
codebooks = 8
codes = 16
adversarial_from = 0.5
decoder_from = 0.5
discriminator_windows = [256, 128]
discriminator_filters = 2
[data]
crop_seconds = [0.5]
batch_seconds = 3.0
[run]
steps = 6
precision = "float32"
log_every = 1
evaluate_every = 3
"""
STEPS = ["codec-mini", "codec_codec-mini", "card_codec-mini"]
BROKEN = "speech/eval/librispeech/zz-broken.flac"


class Toy:
    def __init__(self, root: Path) -> None:
        self.places = Places(root / "data", root / "checkout", root / "runs")
        self.recipe = root / "codec-mini-toy.toml"
        self.recipe.write_text(RECIPE)
        (self.places.root / "assets").mkdir(parents=True)
        rng = np.random.default_rng(0)
        toy_sound.speech(self.places.data)
        toy_sound.music(self.places.data, rng)
        toy_sound.noise(self.places.data, rng)
        (self.places.data / BROKEN).write_bytes(b"fLaC, but not really")

    def steps(self, given: Path | None = None) -> list[Step]:
        sounds.cache_clear()
        recipe = Recipe.read(self.recipe, "codec")
        choices = Choices("", "", self.recipe, "", codec_every=2)
        return codec_models.steps(
            Job(self.places, choices, recipe, recipe, recipe, recipe, recipe, "cpu", "make models", lambda event: None),
            given,
        )

    def record(self) -> Record:
        return Record(self.places.root / "assets" / "models.json", self.places.root, self.places.runs)

    def plan(self, given: Path | None = None) -> dict[str, str]:
        return {name: reason for name, reason in plan(self.steps(given), self.record()).items() if reason}

    def run(self, *only: str, given: Path | None = None) -> list[str]:
        return run(self.steps(given), self.record(), only)

    def asset(self, *parts: str) -> Path:
        return self.places.root.joinpath("assets", "codec-mini", *parts)

    def tables(self) -> list[dict]:
        return json.loads((self.places.root / "benchmarks" / "results" / "codec_codec-mini.json").read_text())


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Toy(tmp_path_factory.mktemp("toy"))
    assert made.run() == STEPS
    yield made
    torch.set_num_threads(threads)


@pytest.fixture
def copied(toy, tmp_path):
    """The same at another place, so that other tests find what they left."""
    other = object.__new__(Toy)
    other.places, other.recipe = Places(tmp_path / "data", tmp_path / "checkout", tmp_path / "runs"), toy.recipe
    for old, new in zip(
        (toy.places.data, toy.places.root, toy.places.runs),
        (other.places.data, other.places.root, other.places.runs),
        strict=True,
    ):
        shutil.copytree(old, new)
    return other


def test_the_codec_comes_out(toy):
    codec = speechtok.load(toy.asset())
    assert (codec.name, codec.codebooks, codec.vocab_size, codec.licence) == ("codec-mini", 8, 16, "Apache-2.0")
    assert codec.training.keys() == {"recipe", "steps", "hours"}
    assert (codec.training["recipe"], codec.training["steps"]) == ("codec-mini-toy", 6)
    assert 0 < codec.training["hours"] < 6 * 3.0 / 3600  # notes are shorter than a crop
    wave = soundfile.read(toy.places.data / "music" / "tracks" / "eval" / "piece-0.flac", dtype="float32")[0]
    assert codec.decode(codec.encode(wave, 24000)).shape == wave.shape
    # It is what the run has made, to the bit.
    (trained,) = toy.places.runs.glob("codec-mini-toy-*")
    for file in BUNDLE[1:]:
        assert file_hash(toy.asset(file)) == file_hash(trained / "codec" / file)
    assert file_hash(toy.asset("curves.png")) == file_hash(trained / "curves.png")
    facts = toy.record().entries["codec-mini"]["facts"]
    assert facts["config"]["objective"]["codebooks"] == 8
    assert facts["held_out"][0]["step"] == 6
    weights = [tensor for file in BUNDLE[1:] for tensor in load_file(toy.asset(file)).values()]
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights)


def test_it_hears_all_sound_of_the_train_split_and_nothing_else(toy):
    def heard(split: str) -> set[str]:
        return {utterance.key for utterance in scan(toy.places.runs / f"codec-mini-{split}.jsonl").utterances}

    for split, folder, every in (("train", "train", 1), ("valid", "dev", codec_models.WATCHED)):
        expected = set()
        for place in ("music/tracks", "music/notes", "noise"):
            lines = [json.loads(x) for x in (toy.places.data / place / "metadata.jsonl").read_text().splitlines()]
            expected |= {f"{place}/{x['path']}"[: -len(".flac")] for x in lines if x["split"] == split}
        spoken = sorted(path.stem for path in (toy.places.data / "speech" / folder).rglob("librispeech-*"))[::every]
        assert heard(split) == expected | {f"speech/{folder}/librispeech/{stem}" for stem in spoken}


def test_table_and_card_say_the_same(toy):
    card, tables = toy.asset("README.md").read_text(), toy.tables()
    codec = speechtok.load(toy.asset())
    assert [(table["data"], table["speech"], table["files"]) for table in tables] == [
        ("speech/eval", True, 1), ("music/tracks", False, 2), ("music/notes", False, 9),
    ]  # fmt: skip
    assert [table["conventions"]["limit"] for table in tables] == ["one of every 2 files", "all files", "all files"]
    assert tables[0]["failed"].keys() == {BROKEN}
    sections = dict(zip(*[iter(re.split(r"^### (.*)$", card, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for table in tables:
        assert table["fingerprint"] == codec.fingerprint
        assert table["decoder_fingerprint"] == codec.decoder_fingerprint
        assert [row["system"] for row in table["rows"]] == [
            *(f"codec-mini, {books} of 8" for books in (2, 4, 8)), "Opus 6 kbit/s", "Opus 12 kbit/s",
        ]  # fmt: skip
        lines = sections[table["data"]].splitlines()
        for row in table["rows"]:
            (line,) = [line for line in lines if line.startswith(f"| {row['system']} |")]
            cells = [cell.strip() for cell in line.split("|")[2:-1]]
            assert cells[0] == f"{row['bitrate'] / 1000:.2f}"
            assert cells[1] == ("-" if row["entropy_bitrate"] is None else f"{row['entropy_bitrate'] / 1000:.2f}")
            assert cells[4].split(" ±")[0] == f"{row['figures']['si_sdr']['mean']:.2f}"
            assert cells[-1] == ("-" if row["codebooks"] is None else f"{row['decode_speed']:.1f}")
            assert len(cells) == (9 if table["speech"] else 7)
        assert f"{table['files']} files, {table['seconds']:,.0f} s" in card
    uses = [line for line in card.splitlines() if re.match(r"\| [1-8] \|", line)]
    assert len(uses) == 8
    assert uses[7].endswith(f"| {100 * tables[2]['codebooks'][7]['entropy_share']:.1f} % |")
    # The figures are those of these files.
    wave = soundfile.read(toy.places.data / "music" / "tracks" / "eval" / "piece-1.flac", dtype="float32")[0]
    few = codec.with_codebooks(2)
    found = [si_sdr(wave, few.decode(few.encode(wave, 24000)))]
    wave = soundfile.read(toy.places.data / "music" / "tracks" / "eval" / "piece-0.flac", dtype="float32")[0]
    found.append(si_sdr(wave, few.decode(few.encode(wave, 24000))))
    assert tables[1]["rows"][0]["figures"]["si_sdr"]["mean"] == pytest.approx(np.mean(found), abs=1e-3)


def test_the_card_says_where_it_comes_from(toy):
    card, credit = toy.asset("README.md").read_text(), toy.asset("CREDITS.md").read_text()
    codec = speechtok.load(toy.asset())
    held_out = toy.record().entries["codec-mini"]["facts"]["held_out"][0]
    hours = [share_alike(toy.places.data / place) for place in codec_models.OTHER]
    assert hours == pytest.approx([1.5 / 3600, 2 * 0.2 / 3600, 0])  # a track, two drums
    alike = sum(hours)
    for said in (
        "recipe `codec-mini-toy`", "seed 0", "6 steps", "](curves.png)", "make models", "num_filters 4", "codebooks 8",
        codec.fingerprint, codec.decoder_fingerprint, "2400 nominal with all codebooks, 300 of each", "here Opus",
        "| music/tracks | 2 |", "| music/notes |", "| noise | 1 |", "| librispeech | 2 |", "CC BY-SA 4.0, CC0 1.0",
        f"{alike:.2f} h of it are under CC BY-SA", "openslr.org/12",
        "In the last 50 % of the steps a discriminator takes part; by then encoder and codebooks are finished",
        f"at step 6: mel loss {held_out['mel']:.3f}, {held_out['mel_books4']:.3f} with 4 of the codebooks",
        "--tokenizer codec-mini --codebooks 2", "speechtok synth OUT -o WAVS", "nothing above 12 kHz", "up to 6 dB",
    ):  # fmt: skip
        assert said in card, said
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert toy.asset(picture).read_bytes().startswith(b"\x89PNG")
    assert {"speech-eval.png", "music-tracks.png"} <= {path.name for path in toy.asset().iterdir()}
    assert "## music/tracks\n\n- CC BY-SA 4.0, by way of someone/music: train band (train piece 0)\n" in credit
    assert "train maker" in credit
    assert "valid" not in credit
    assert "test" not in credit
    # Where the toy lies is nobody's business.
    told = card + credit + json.dumps(toy.tables()) + json.dumps(toy.record().entries)
    assert str(toy.places.root.parent) not in told


def test_nothing_is_done_twice(toy):
    assert toy.plan() == {}
    assert toy.run() == []
    # The run is not shipped; without it nothing has to be trained again.
    moved = toy.places.runs.rename(toy.places.runs.with_name("elsewhere"))
    assert toy.plan() == {}
    moved.rename(toy.places.runs)


def test_each_change_reaches_what_depends_on_it(toy):
    toy.recipe.write_text(RECIPE.replace("steps = 6", "steps = 7"))
    assert toy.plan() == {
        "codec-mini": "settings changed (recipe)", "codec_codec-mini": "after codec-mini",
        "card_codec-mini": "after codec-mini",
    }  # fmt: skip
    toy.recipe.write_text(RECIPE)
    listing = toy.places.data / "noise" / "metadata.jsonl"
    text = listing.read_text()
    # A noise of another split is trained on from now on; another maker changes the credits only.
    listing.write_text(text.replace('"valid"', '"train"'))
    assert toy.plan()["codec-mini"] == "data changed (noise)"
    listing.write_text(text.replace("train maker", "someone else"))
    assert set(toy.plan()) == {"card_codec-mini"}
    listing.write_text(text)
    for place, name, changed in (
        ("music/tracks/eval", "piece-0.flac", STEPS[1:]),
        ("speech/eval/librispeech", "librispeech-7367-86737-0000.opus", STEPS[1:]),
        ("speech/train/librispeech", "librispeech-1688-142285-0004.flac", STEPS),
        ("speech/dev/librispeech", "librispeech-6415-100596-0000.opus", []),
    ):
        file = toy.places.data / place / name
        content = file.read_bytes()
        file.write_bytes(content + b"\0")
        assert list(toy.plan()) == list(changed), place
        file.write_bytes(content)
    (toy.places.data / "music" / "notes" / "drums" / "kick_0.flac").rename(toy.places.data / "kick")
    with pytest.raises(InputError, match=r"kick_0.*cannot be read.*part of the data"):
        toy.plan()
    (toy.places.data / "kick").rename(toy.places.data / "music" / "notes" / "drums" / "kick_0.flac")
    assert toy.plan() == {}


def test_a_codec_is_given(copied, tmp_path):
    (trained,) = copied.places.runs.glob("codec-mini-toy-*")
    given = tmp_path / "better" / "codec"
    shutil.copytree(trained, given.parent)
    # Another decoder: the units stay, all that was measured and written does not.
    weights = load_file(given / "decoder.safetensors")
    other = speechtok.load(given)
    save_file({name: -tensor for name, tensor in weights.items()}, given / "decoder.safetensors")
    description = json.loads((given / "tokenizer.json").read_text())
    changed = {name: -tensor for name, tensor in other.decoder.state_dict().items()}
    other.decoder.load_state_dict(changed)
    description["decoder_fingerprint"] = speechtok.Tokenizer(
        other.encoder, other.quantizer, decoder=other.decoder, name="x"
    ).decoder_fingerprint
    (given / "tokenizer.json").write_text(json.dumps(description))
    before = speechtok.load(copied.asset())
    assert copied.plan(given)["codec-mini"] == "another decoder.safetensors is given"
    assert copied.run(given=given) == STEPS
    after = speechtok.load(copied.asset())
    assert after.fingerprint == before.fingerprint
    assert after.decoder_fingerprint == description["decoder_fingerprint"] != before.decoder_fingerprint
    for file in BUNDLE[1:]:
        assert file_hash(copied.asset(file)) == file_hash(given / file)
    # Its run says that it followed the recipe, so it is not replaced when it is not given again.
    assert copied.plan() == copied.plan(given) == {}
    # What a run wrote before its end is not what the recipe makes.
    shutil.copytree(given, given.parent / "codec-3")
    with pytest.raises(InputError, match="not the end of a run of"):
        copied.plan(given.parent / "codec-3")
    metrics = (given.parent / "metrics.jsonl").read_text()
    (given.parent / "metrics.jsonl").write_text("".join(metrics.splitlines(keepends=True)[:1]))
    with pytest.raises(InputError, match="finish the run"):
        copied.plan(given)
    (given.parent / "metrics.jsonl").write_text(metrics)
    # Of a codec without a run nothing is known: the recipe would replace it.
    (given.parent / "config.json").unlink()
    assert copied.run("codec-mini", given=given) == ["codec-mini"]
    assert copied.plan(given).keys() == {"codec_codec-mini", "card_codec-mini"}
    assert copied.plan()["codec-mini"].startswith("settings changed")
    (given / "quantizer.safetensors").unlink()
    with pytest.raises(InputError, match="no quantizer.safetensors; give the folder 'codec' of a finished run"):
        copied.plan(given)


def test_the_card_refuses_tables_of_another_codec(copied, tmp_path):
    table = copied.places.root / "benchmarks" / "results" / "codec_codec-mini.json"

    def write() -> None:
        codec_card.write_card(copied.asset(), table, [], 0.0, "make models", Origin("toy", {}, {}), [])

    write()  # a codec of which nothing is known
    assert "recipe `toy`. Weights" in copied.asset("README.md").read_text()
    tables = json.loads(table.read_text())
    for name in ("fingerprint", "decoder_fingerprint"):
        table.write_text(json.dumps([*tables[:2], tables[2] | {name: "123"}]))
        with pytest.raises(FormatError, match="made with another codec; make them anew"):
            write()
    for content in ("[]", "{", '[{"fingerprint": 1}]'):
        table.write_text(content)
        with pytest.raises(FormatError, match="no tables of a codec"):
            write()


def test_a_split_without_files_is_told(toy):
    with pytest.raises(InputError, match="split='eval': one of train, valid, test"):
        splits.listed(toy.places.data, "noise", "eval")
    empty = toy.places.data / "empty"
    empty.mkdir()
    (empty / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match="names no file of split 'test'"):
        splits.listed(toy.places.data, "empty", "test")
    shutil.rmtree(empty)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_shipped_codecs_are_small_enough(size):
    recipe = Recipe.read(f"codec-mini-{size}", "codec")
    config = section(SeanetConfig, recipe.model, "model")
    objective = section(CodecObjectiveConfig, recipe.objective, "objective")
    assert max(codec_models.BOOKS) == objective.codebooks
    numbers = sum(p.numel() for part in (SeanetEncoder(config), SeanetDecoder(config)) for p in part.parameters())
    assert 2 * (numbers + objective.codebooks * objective.codes * config.hidden_size) < 8e6  # in bfloat16
