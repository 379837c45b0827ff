"""Training a codec: first weights, losses, the parts that learn, the run, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechtok.cli import app
from typer.testing import CliRunner

import speechtok
from speechtok.errors import InputError, OutputError
from speechtok.metrics.signal import si_sdr
from speechtok.nn.cosine_start import begin_as_cosine_transform
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder
from speechtok.training import codec as codec_module
from speechtok.training.codec import CodecObjective
from speechtok.training.codec_config import CodecObjectiveConfig
from speechtok.training.compression import train_codec
from speechtok.training.recipe import Recipe, section

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "assets" / "clips"
RECIPE = """kind = "codec"

[model]
num_filters = 4
hidden_size = 16
upsampling_ratios = [2, 4, 5, 8]
pad_mode = "constant"
num_lstm_layers = 0

[objective]
codebooks = 3
codes = 16
adversarial_from = 0.5
decoder_from = 0.75
discriminator_windows = [256, 128]
discriminator_filters = 2

[data]
crop_seconds = [0.5]
batch_seconds = 3.0

[optimizer]
weight_decay = 0.0

[run]
steps = 8
precision = "float32"
log_every = 1
evaluate_every = 4
checkpoint_every = 2
"""
TINY = SeanetConfig(
    num_filters=4, hidden_size=16, upsampling_ratios=(2, 4, 5, 8), pad_mode="constant", num_lstm_layers=0
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def lines(run: Path, split: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def batch(rows: int, samples: int = 6400, books: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "wave": 0.1 * torch.randn(rows, samples, generator=generator),
        "frames": torch.full((rows,), samples // 320),
        "use": torch.full((rows,), books),
    }


def objective(**changes) -> CodecObjective:
    torch.manual_seed(0)
    config = {"codebooks": 2, "codes": 8, "discriminator_windows": (256, 128), "discriminator_filters": 2}
    return CodecObjective(TINY, CodecObjectiveConfig(**config | changes))


# -- first weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_first_codec_passes_what_its_coefficients_hold(shortcut: bool) -> None:
    """A tone in the lowest of the kept cosine coefficients comes back, one far above them does not."""
    config = SeanetConfig(
        num_filters=16, hidden_size=64, upsampling_ratios=(2, 4, 5, 8), pad_mode="constant", num_lstm_layers=0,
        use_conv_shortcut=shortcut,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder, decoder = SeanetEncoder(config), SeanetDecoder(config)
    begin_as_cosine_transform(encoder, decoder)
    time = torch.arange(9600) / 24000
    with torch.no_grad():
        for frequency, least, most in ((150.0, 15.0, 99.0), (9000.0, -99.0, 0.0)):
            tone = 0.01 * torch.sin(2 * torch.pi * frequency * time)
            decoded = decoder(encoder(tone[None, None]))[0, 0]
            assert least < si_sdr(tone.numpy(), decoded.numpy()) < most


def test_without_a_narrow_place_the_first_codec_is_the_identity() -> None:
    """As many coefficients as samples: what is left is the bend of the activations, which small sound does not see."""
    config = SeanetConfig(
        num_filters=4, hidden_size=8, upsampling_ratios=(4, 2), pad_mode="constant", num_lstm_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder, decoder = SeanetEncoder(config), SeanetDecoder(config)
    begin_as_cosine_transform(encoder, decoder, level=0.01)
    wave = 0.01 * torch.randn(2, 1, 800)
    with torch.no_grad():
        decoded = decoder(encoder(wave))
    assert (decoded - wave).abs().max() < 1e-3 * wave.abs().max()


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_gradients_are_the_balanced_ones() -> None:
    """Of the decoder's last bias: the sum over samples of the balanced gradient of the reconstruction losses."""
    model = objective()
    data = batch(3)
    while model.quantizer.books.missing():
        model(data, 3, 0.0)
    model.zero_grad()
    torch.manual_seed(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss, figures = model(data, 3, 0.0)
    loss.backward()
    model.load_state_dict(state)
    with torch.no_grad():
        coded = model.quantizer(model.encoder(data["wave"][:, None]).transpose(1, 2), None, data["use"])
    decoded = model.decoder(coded.quantized.transpose(1, 2))[:, 0].detach().requires_grad_()
    expected = torch.zeros_like(decoded)
    for name, value in (("wave", (decoded - data["wave"]).abs().mean(1)), ("mel", model.mel(decoded, data["wave"]))):
        (gradient,) = torch.autograd.grad(value.sum(), decoded)
        before = dict(zip(model.balancer.weights, state["balancer.norms"].tolist(), strict=True))[name]
        seen = dict(zip(model.balancer.weights, state["balancer.seen"].tolist(), strict=True))[name]
        norm = (0.99 * before + 0.01 * gradient.norm(dim=1).mean()) / (0.99 * seen + 0.01)
        expected += gradient / norm * model.balancer.weights[name] / sum(model.balancer.weights.values())
        assert float(figures[name]) == pytest.approx(float(value.detach().sum()), rel=1e-5)
    bias = model.decoder.layers[-1].conv.bias.grad
    assert float(bias) == pytest.approx(float(expected.sum()) / 3, rel=1e-3)
    quantizer = float(coded.commitment.sum()) / 3
    assert float(loss.detach()) == pytest.approx(float(figures["mel"]) / 3 + quantizer, rel=1e-4)


def test_each_part_learns_by_its_own_loss() -> None:
    model = objective(adversarial_from=0.5, decoder_from=0.8)
    data = batch(3)
    while model.quantizer.books.missing():
        model(data, 3, 0.0)

    def moved(progress: float) -> set[str]:
        model.zero_grad()
        model(data, 3, progress)[0].backward()
        parts = ("encoder", "decoder", "discriminator")
        return {part for part in parts if any(p.grad is not None for p in getattr(model, part).parameters())}

    assert moved(0.4) == {"encoder", "decoder"}
    assert moved(0.6) == {"encoder", "decoder", "discriminator"}
    books = model.quantizer.books.codebook.clone()
    assert moved(0.9) == {"decoder", "discriminator"}
    assert torch.equal(model.quantizer.books.codebook, books)
    # The discriminator's gradient is that of its hinge loss, whatever the codec is told.
    from speechtok.nn.discriminators import hinge_loss

    with torch.no_grad():
        coded = model.quantizer.eval()(model.encoder(data["wave"][:, None]).transpose(1, 2), None, data["use"])
        decoded = model.decoder(coded.quantized.transpose(1, 2))[:, 0]
    real, false = model.discriminator(data["wave"])[0], model.discriminator(decoded)[0]
    weights = list(model.discriminator.parameters())
    expected = torch.autograd.grad(hinge_loss(real, false).mean(), weights)
    for parameter, gradient in zip(weights, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_held_out_figures_use_all_books_and_move_nothing() -> None:
    model = objective()
    while model.quantizer.books.missing():
        model(batch(3), 3, 0.0)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        loss, figures = model(batch(3), 3, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    summary = model.summary({**figures, "loss": loss * 3})
    assert {"mel", "mel_books1", "si_sdr", "book1_entropy", "book2_entropy", "loss"} <= set(summary)
    assert float(figures["counts"].sum()) == 3 * 20 * 2
    fine = {f"book{book}_entropy": 0.9 for book in (1, 2)}
    assert model.alarms(fine) == []
    assert model.alarms({**fine, "book2_entropy": 0.3}) == [
        "codebook 2 collapses: its entropy is 30% of the bits of a code"
    ]


def test_before_there_are_codes_encoder_and_decoder_are_watched() -> None:
    model = objective().eval()
    with torch.no_grad():
        loss, figures = model(batch(3), 3, 1.0)
    summary = model.summary({**figures, "loss": loss * 3})
    assert {"si_sdr", "mel", "loss"} <= set(summary)
    assert not [name for name in summary if "book" in name]
    assert model.alarms(summary) == []


def test_figures_of_the_discriminator_are_of_what_it_judged() -> None:
    model = objective(adversarial_from=0.5)
    before, after = (model(batch(4), 4, progress)[1] for progress in (0.1, 0.9))
    window = {name: before.get(name, 0) + value for name, value in after.items()}
    alone, told = model.summary(after), model.summary(window)
    for name in ("judging", "adversarial", "feature", "norm_adversarial", "norm_feature"):
        assert told[name] == pytest.approx(alone[name]), name
    assert told["mel"] == pytest.approx((float(before["mel"]) + float(after["mel"])) / 8)


def test_held_out_si_sdr_is_the_metric() -> None:
    wave = batch(4)["wave"] + 0.05
    decoded = wave + 0.1 * torch.randn(4, 6400, generator=torch.Generator().manual_seed(1)) * torch.rand(4, 1) + 0.1
    wanted = [si_sdr(one, two) for one, two in zip(wave.double().numpy(), decoded.double().numpy(), strict=True)]
    assert codec_module._si_sdr(wave, decoded).tolist() == pytest.approx(wanted, abs=1e-3)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_tokenizer(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = train_codec(recipe, CLIPS, run, held_out=CLIPS, name="tiny")
    assert folder == run / "codec"
    assert [line["step"] for line in lines(run)] == list(range(1, 9))
    assert ["judging" in line for line in lines(run)] == [False] * 4 + [True] * 4
    assert [line["step"] for line in lines(run, "held out")] == [4, 8]
    tokenizer = speechtok.load(folder)
    assert (tokenizer.name, tokenizer.quantizer.codebooks, tokenizer.sample_rate) == ("tiny", 3, 24000)
    assert tokenizer.bitrate == 75 * 3 * 4
    wave, rate = soundfile.read(next(CLIPS.glob("*.flac")), dtype="float32")
    units = tokenizer.encode(wave, rate)
    assert tokenizer.decode(units).shape == (units.ends[-1],)
    # Nothing is lost where weights are stored as bfloat16.
    weights = [*tokenizer.encoder.parameters(), *tokenizer.quantizer.buffers()]
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)


def test_a_resumed_run_is_the_uninterrupted_one(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_codec(recipe, CLIPS, whole)

    class Killed(Exception):
        pass

    def kill(at: int):
        def tell(event) -> None:
            if event.stage == "train" and event.done == at:
                raise Killed

        return tell

    for at in (3, 7):  # before and after discriminator and decoder are on their own
        with pytest.raises(Killed):
            train_codec(recipe, CLIPS, broken, on_event=kill(at))
    train_codec(recipe, CLIPS, broken)
    assert [line["loss"] for line in lines(broken)] == [line["loss"] for line in lines(whole)]
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_units_stay_when_only_the_decoder_learns(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    class Killed(Exception):
        pass

    def kill(event) -> None:
        if event.stage == "train" and event.done == 7:
            raise Killed

    with pytest.raises(Killed):
        train_codec(recipe, CLIPS, run, on_event=kill)
    before = torch.load(run / "checkpoint.pt", weights_only=True)  # of step 6, the first one of the decoder alone
    assert before["step"] == 6
    train_codec(recipe, CLIPS, run)
    after = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    same = {name for name, value in before["model"].items() if torch.equal(value, after[name])}
    assert {name for name in after if name.startswith(("encoder.", "quantizer."))} <= same
    assert not any(name.startswith("decoder.layers.0.conv.weight") for name in same)


def test_two_processes_see_the_batch_of_one(recipe: Path, tmp_path: Path, torchrun) -> None:
    """With codes by gradient: k-means starts on other draws where the frames of a step lie in two processes."""
    alone, both, changes = tmp_path / "alone", tmp_path / "both", {"objective.code_dim": 4}
    train_codec(recipe, CLIPS, alone, changes=changes)
    torchrun(
        "from speechtok.training.compression import train_codec; "
        f"train_codec({str(recipe)!r}, {str(CLIPS)!r}, Path({str(both)!r}), changes={changes!r})"
    )
    one, two = ([line["loss"] for line in lines(run)] for run in (alone, both))
    assert one == pytest.approx(two, rel=2e-3)


def test_a_run_goes_on_with_its_own_sound_only(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_codec(recipe, CLIPS, run, changes={"run.steps": 2, "objective.adversarial_from": 1.0})
    other = tmp_path / "other"
    other.mkdir()
    soundfile.write(other / "a.wav", np.random.default_rng(0).normal(0, 0.1, 48000), 24000)
    with pytest.raises(OutputError, match="began with another train"):
        train_codec(recipe, other, run, changes={"run.steps": 2, "objective.adversarial_from": 1.0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.audio_channels": 2}, "2 channels"),
        ({"model.trim_right_ratio": 0.5}, "trim_right_ratio"),
        ({"model.num_lstm_layers": 1}, "cosine_start"),
        ({"objective.adversarial_from": 1.5}, "shares of 1"),
        ({"objective.mel_weight": 0.0}, "mel_weight"),
        ({"objective.gain_db": -1.0}, "gain_db"),
        ({"objective.discriminator_filters": 0}, "discriminator_filters"),
    ],
)
def test_what_cannot_be_trained_is_refused(recipe: Path, tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        train_codec(recipe, CLIPS, tmp_path / "run", changes=change)
    assert not (tmp_path / "run").exists()


def test_crops_shorter_than_a_window_are_refused_at_once(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shorter than a window of the discriminator"):
        train_codec(recipe, CLIPS, tmp_path / "run", changes={"objective.discriminator_windows": [24000]})


def test_an_evaluation_may_come_before_the_codes(recipe: Path, tmp_path: Path) -> None:
    changes = {"run.evaluate_every": 1, "objective.codes": 128, "objective.adversarial_from": 1.0}
    train_codec(recipe, CLIPS, tmp_path / "run", held_out=CLIPS, changes=changes)
    told = lines(tmp_path / "run", "held out")
    assert "book1_entropy" not in told[0] and "book1_entropy" in told[-1]
    assert all("si_sdr" in line for line in told)


def test_the_shipped_recipe_is_whole() -> None:
    recipe = Recipe.read("codec-mini-cpu", "codec")
    model = CodecObjective(
        section(SeanetConfig, recipe.model, "model"), section(CodecObjectiveConfig, recipe.objective, "objective")
    )
    assert model.model.bounded
    assert model.model.sample_rate / model.model.hop * model.config.codebooks * np.log2(model.config.codes) == 6000
    assert recipe.restart is not None
    assert recipe.run.steps * model.config.decoder_from == pytest.approx(recipe.restart.step, abs=1)


def test_a_few_seconds_are_learned_by_heart(clip_wave: np.ndarray) -> None:
    """R9 in small: without a discriminator, a codec learns a short sound, and uses its books."""
    torch.manual_seed(0)
    model_config = SeanetConfig(
        num_filters=8, hidden_size=32, upsampling_ratios=(2, 4, 5, 8), pad_mode="constant", num_lstm_layers=0,
        use_conv_shortcut=False,
    )  # fmt: skip
    config = CodecObjectiveConfig(codebooks=8, codes=64, full=1.0, wave_weight=1.0, mel_weight=1.0)
    model = CodecObjective(model_config, config)
    rows = torch.from_numpy(clip_wave[: 8 * 8640].reshape(8, -1).copy())  # at 16 kHz, which is as good here
    data = {"wave": rows, "frames": torch.full((8,), rows.shape[1] // 320), "use": torch.full((8,), 8)}
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(150):
        loss, _ = model(data, 8, 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        summary = model.summary({**model(data, 8, 1.0)[1], "loss": torch.tensor(0.0)})
    assert summary["si_sdr"] > 8
    assert min(summary[f"book{book}_usage"] for book in range(1, 9)) > 0.5


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = CliRunner().invoke(
        app,
        ["train", "codec", "--recipe", str(recipe), "--data", str(CLIPS), "-o", str(run), "--set", "run.steps=2",
         "--set", "objective.adversarial_from=1.0", "--log", "plain"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith(str(run / "codec"))
    assert (run / "codec" / "decoder.safetensors").is_file()
