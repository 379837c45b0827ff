"""Code HiFi-GAN against the published description, written down again with plain torch functions.

Checkpoints are written in the published layouts with random weights.
"""

import json
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from speechtok.errors import CheckpointError, InputError
from speechtok.vocoders.code_hifigan import CodeHifiGan, CodeHifiGanConfig
from speechtok.vocoders.durations import duration_loss
from speechtok.vocoders.published import (
    from_tensors,
    fuse_weight_norm,
    published_state,
    put_on_weight_norm,
    read_code_hifigan,
    read_config,
)

# What the published configurations have in common.
FULL = {
    "resblock": "1",
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 512,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_embeddings": 100,
    "embedding_dim": 128,
    "model_in_dim": 128,
    "segment_size": 8960,
    "code_hop_size": 320,
    "f0": False,
    "num_mels": 80,
    "n_fft": 1024,
    "hop_size": 256,
    "sampling_rate": 16000,
}
SMALL = FULL | {"upsample_initial_channel": 64, "embedding_dim": 16, "model_in_dim": 16}
DURATIONS = {
    "dur_prediction_weight": 1.0,
    "dur_predictor_params": {
        "encoder_embed_dim": 16, "var_pred_hidden_dim": 24, "var_pred_kernel_size": 3, "var_pred_dropout": 0.5,
    },
}  # fmt: skip
F0_VQ = {"f0_vq_params": {"l_bins": 20, "emb_width": 128, "mu": 0.99, "levels": 1}}
LAYOUTS = {
    # speech-resynthesis: LJSpeech, VCTK with F0, speech-to-speech translation, Expresso
    "lut": SMALL,
    "lut-f0": SMALL
    | {"f0": True, "multispkr": "_", "model_in_dim": 48, "f0_quantizer": F0_VQ, "f0_quantizer_path": "x"},
    "durations": SMALL | DURATIONS,
    "expresso": SMALL | {"multispkr": "from_input_file", "multistyle": "from_input_file", "model_in_dim": 48},
    # textless, whose layout slamkit has, too
    "textless": SMALL
    | DURATIONS
    | {"multispkr": True, "num_speakers": 4, "multistyle": True, "num_styles": 7, "model_in_dim": 48},
    "textless-f0": SMALL | {"f0": True, "f0_quant_num_bin": 32, "model_in_dim": 32},
    "embedder": SMALL | {"multispkr": True, "embedder_params": {"x": 1}, "embedder_dim": 10, "model_in_dim": 32},
    "25 Hz": SMALL
    | {"upsample_rates": [5, 4, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 8, 4], "code_hop_size": 640},
}


def written(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under all keys of the published layout, straight from the description."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def conv(name: str, *shape: int, bias: int) -> None:
        out[f"{name}.bias"] = draw(bias, scale=0.1)
        out[f"{name}.weight_v"] = draw(*shape)
        gain = {"conv_pre": 1.0, "ups": 1.5, "resblocks": 0.5, "conv_post": 0.5}[name.split(".")[0]]
        out[f"{name}.weight_g"] = (torch.rand(shape[0], 1, 1, generator=generator) + 0.5) * gain

    size = config["embedding_dim"]
    out["dict.weight"] = draw(config["num_embeddings"], size)
    if config.get("embedder_params"):
        out["spkr.weight"], out["spkr.bias"] = draw(size, config["embedder_dim"]), draw(size)
    elif config.get("multispkr"):
        out["spkr.weight"] = draw(config.get("num_speakers", 200), size)
    if config.get("multistyle"):
        out["style.weight"] = draw(config.get("num_styles", 100), size)
    if "f0_quantizer" in config:
        out["f0_dict.weight"] = draw(20, size)
        out["quantizer.vq.level_blocks.0.k"] = draw(20, 128)
        out["quantizer.encoder.level_blocks.0.model.0.0.weight"] = draw(32, 1, 4)
    elif config["f0"]:
        out["f0_quant_embed.weight"] = draw(config["f0_quant_num_bin"], size)
    if "dur_predictor_params" in config:
        hidden = config["dur_predictor_params"]["var_pred_hidden_dim"]
        for name, inputs in (("1", size), ("2", hidden)):
            out[f"dur_predictor.conv{name}.0.weight"] = draw(hidden, inputs, 3, scale=0.2)
            out[f"dur_predictor.conv{name}.0.bias"] = draw(hidden)
            out[f"dur_predictor.ln{name}.weight"], out[f"dur_predictor.ln{name}.bias"] = draw(hidden), draw(hidden)
        out["dur_predictor.proj.weight"], out["dur_predictor.proj.bias"] = draw(1, hidden, scale=0.2), draw(1)
    width = config["upsample_initial_channel"]
    conv("conv_pre", width, config["model_in_dim"], 7, bias=width)
    count = 0
    for index, kernel in enumerate(config["upsample_kernel_sizes"]):
        conv(f"ups.{index}", width, width // 2, kernel, bias=width // 2)
        width //= 2
        for odd in config["resblock_kernel_sizes"]:
            for part in ("convs1", "convs2"):
                for each in range(3):
                    conv(f"resblocks.{count}.{part}.{each}", width, width, odd, bias=width)
            count += 1
    conv("conv_post", 1, width, 7, bias=1)
    return out


def fused(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    direction = tensors[f"{name}.weight_v"]
    norm = direction.square().sum((1, 2), keepdim=True).sqrt()
    return tensors[f"{name}.weight_g"] * direction / norm, tensors[f"{name}.bias"]


def reference(config: dict, w: dict[str, Tensor], units, speaker=None, style=None, f0=None) -> Tensor:
    """Section 1 of the description."""
    parts = [w["dict.weight"][units]]
    if f0 is not None:
        parts.append(w["f0_dict.weight" if "f0_dict.weight" in w else "f0_quant_embed.weight"][f0])
    if speaker is not None:
        table = w["spkr.weight"]
        parts.append((speaker @ table.T + w["spkr.bias"] if "spkr.bias" in w else table[speaker])[:, None])
    if style is not None:
        parts.append(w["style.weight"][style][:, None])
    frames = max(part.shape[1] for part in parts)
    x = torch.cat([part.repeat_interleave(frames // part.shape[1], 1) for part in parts], 2).mT
    weight, bias = fused(w, "conv_pre")
    x = F.conv1d(x, weight, bias, padding=3)
    for stage, (rate, kernel) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True)):
        weight, bias = fused(w, f"ups.{stage}")
        x = F.conv_transpose1d(F.leaky_relu(x, 0.1), weight, bias, stride=rate, padding=(kernel - rate) // 2)
        total = torch.zeros_like(x)
        for block in range(3):
            y = x
            for pair, dilation in enumerate((1, 3, 5)):
                weight, bias = fused(w, f"resblocks.{3 * stage + block}.convs1.{pair}")
                odd = weight.shape[2]
                z = F.conv1d(
                    F.leaky_relu(y, 0.1), weight, bias, padding=(odd * dilation - dilation) // 2, dilation=dilation
                )
                weight, bias = fused(w, f"resblocks.{3 * stage + block}.convs2.{pair}")
                y = y + F.conv1d(F.leaky_relu(z, 0.1), weight, bias, padding=odd // 2)
            total += y
        x = total / 3
    weight, bias = fused(w, "conv_post")
    return F.conv1d(F.leaky_relu(x, 0.01), weight, bias, padding=3).tanh()[:, 0]


def told(config: dict, rows: int, units: int) -> dict[str, Tensor]:
    """Whatever a layout needs besides units."""
    torch.manual_seed(1)
    out = {}
    if config.get("embedder_params"):
        out["speaker"] = torch.randn(rows, config["embedder_dim"])
    elif config.get("multispkr"):
        out["speaker"] = torch.randint(config.get("num_speakers", 200), (rows,))
    if config.get("multistyle"):
        out["style"] = torch.randint(config.get("num_styles", 100), (rows,))
    if "f0_quantizer" in config:
        out["f0"] = torch.randint(20, (rows, units // 4))
    elif config["f0"]:
        out["f0"] = torch.randint(config["f0_quant_num_bin"], (rows, 2 * units))
    return out


def on_disk(folder: Path, config: dict, tensors: dict[str, Tensor], suffix: str = ".pt") -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / f"g_00400000{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"generator": tensors}, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_published_layouts(tmp_path: Path, layout: str, suffix: str) -> None:
    config = LAYOUTS[layout]
    tensors = written(config)
    model = read_code_hifigan(on_disk(tmp_path, config, tensors, suffix))
    assert not model.training
    assert not any("weight_g" in name or "parametrizations" in name for name in model.state_dict())
    units = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(2))
    more = told(config, 2, 12)
    wanted = reference(config, tensors, units, **more)
    got = model(units, **more)
    assert got.shape == (2, max(12, more["f0"].shape[1] if "f0" in more else 0) * prod(config["upsample_rates"]))
    assert wanted.std() > 0.05
    assert wanted.abs().mean() < 0.7  # not all of it where tanh is flat
    assert (got - wanted).abs().max() <= 1e-5


@torch.inference_mode()
def test_full_size(tmp_path: Path) -> None:
    config = FULL | {"dur_predictor_params": {**DURATIONS["dur_predictor_params"], "encoder_embed_dim": 128}}
    tensors = written(config)
    model = read_code_hifigan(on_disk(tmp_path, config, tensors))
    generator = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("dur_predictor"))
    assert 13e6 < generator < 14e6
    units = torch.tensor([[3, 99, 0, 7, 7, 50]])
    wanted = reference(config, tensors, units)
    assert wanted.std() > 0.05
    assert (model(units) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("rates", "kernels", "hop"),
    [
        ((5, 4, 4, 2, 2), (11, 8, 8, 4, 4), 320),
        ((5, 4, 4, 4, 2), (11, 8, 8, 8, 4), 640),
        ((5, 4, 4, 3, 2), (11, 8, 8, 7, 4), 480),
    ],
)
@torch.inference_mode()
def test_lengths_are_exact(rates: tuple, kernels: tuple, hop: int) -> None:
    config = CodeHifiGanConfig(10, 4, rates, kernels, 32, (3,), ((1,),))
    model, units = CodeHifiGan(config).eval(), torch.zeros(1, 200, dtype=torch.int64)
    assert model.hop == hop
    assert model(units[:, :7]).shape == (1, 7 * hop)
    # Residual blocks keep the length, as just seen, and take most of the time.
    model.resblocks = torch.nn.ModuleList(torch.nn.Identity() for _ in rates)
    counts = range(1, 201) if hop == 320 else (1, 2, 50, 199, 200)
    with torch.backends.mkldnn.flags(enabled=False):  # which compiles for every new length
        assert [model(units[:, :count]).shape[1] for count in counts] == [hop * count for count in counts]


@torch.inference_mode()
def test_durations_of_the_published_layout() -> None:
    config = LAYOUTS["durations"]
    w = written(config)
    model = from_tensors(read_config(config), w)
    units = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(4))
    x = w["dict.weight"][units]
    for part in ("1", "2"):
        x = F.conv1d(x.mT, w[f"dur_predictor.conv{part}.0.weight"], w[f"dur_predictor.conv{part}.0.bias"], padding=1)
        x = F.layer_norm(x.relu().mT, (24,), w[f"dur_predictor.ln{part}.weight"], w[f"dur_predictor.ln{part}.bias"])
    logs = (x @ w["dur_predictor.proj.weight"].T + w["dur_predictor.proj.bias"])[..., 0]
    assert (model.log_durations(units) - logs).abs().max() <= 1e-5
    frames = model.durations(units)
    assert torch.equal(frames, (logs.exp() - 1).round().long().clamp(min=1))
    assert int(frames.max()) > 1
    lengths = torch.tensor([9, 1, 4])
    for row, length in enumerate(lengths.tolist()):
        alone = model.log_durations(units[row : row + 1, :length])
        assert (model.log_durations(units, lengths)[row, :length] - alone).abs().max() <= 1e-6
    with pytest.raises(InputError, match="no durations"):
        from_tensors(read_config(SMALL), written(SMALL)).durations(units)


# ---- training


def test_weight_norm_is_kept_for_training(tmp_path: Path) -> None:
    config, units = LAYOUTS["durations"], torch.randint(100, (1, 6))
    tensors = written(config)
    model = read_code_hifigan(on_disk(tmp_path, config, tensors), training=True)
    assert model.training
    state = published_state(model)
    assert set(state) == set(tensors)
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    wave = model(units)
    assert (wave - reference(config, tensors, units)).abs().max() <= 1e-5
    loss = wave.abs().mean() + duration_loss(model.log_durations(units), units + 1, torch.tensor([6])).sum()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    torch.save({"generator": published_state(model)}, tmp_path / "trained.pt")
    model.eval()
    again = read_code_hifigan(tmp_path / "trained.pt", tmp_path / "config.json")
    with torch.no_grad():
        trained = model(units)
        assert (trained - wave).abs().max() > 1e-3
        assert (again(units) - trained).abs().max() <= 1e-5
        fuse_weight_norm(model)
        assert set(model.state_dict()) == set(again.state_dict())
        assert (model(units) - trained).abs().max() <= 1e-5


def test_weight_norm_of_plain_weights() -> None:
    torch.manual_seed(0)
    config, units = read_config(SMALL), torch.randint(100, (1, 6))
    plain = CodeHifiGan(config).eval()
    model = from_tensors(config, plain.state_dict(), training=True)
    with torch.no_grad():
        assert (model(units) - plain(units)).abs().max() <= 1e-6
        put_on_weight_norm(plain)
        assert plain.state_dict().keys() == model.state_dict().keys()
    # First weights as published: deviation 0.01 behind the first convolution.
    fresh = CodeHifiGan(CodeHifiGanConfig(100))
    for conv in (fresh.ups[1], fresh.resblocks[4].convs2[1]):
        assert 0.009 < float(conv.weight.detach().std()) < 0.011


def test_a_configuration_goes_through_json() -> None:
    config, units = read_config(LAYOUTS["durations"]), torch.tensor([[3, 4, 5]])
    tensors = written(LAYOUTS["durations"])
    model = from_tensors(config, tensors)
    again = CodeHifiGanConfig(**json.loads(json.dumps(model.config_dict())))
    assert again == config
    with torch.no_grad():
        assert torch.equal(CodeHifiGan(again, weights=tensors).eval()(units), model(units))


# ---- what does not fit


def test_keys_and_shapes_are_held_to_account(tmp_path: Path) -> None:
    tensors = written(SMALL)
    changed = dict(tensors)
    changed["spkr.weight"] = torch.zeros(200, 16)
    del changed["resblocks.14.convs2.2.bias"]
    changed["dict.weight"] = torch.zeros(101, 16)
    with pytest.raises(CheckpointError) as raised:
        read_code_hifigan(on_disk(tmp_path, SMALL, changed))
    for part in ("g_00400000.pt", "1 missing: resblocks.14.convs2.2.bias", "1 unexpected: spkr.weight",
                 "dict.weight (101, 16) instead of (100, 16)"):  # fmt: skip
        assert part in str(raised.value)
    # The network that made F0 codes may be beside a model that takes some, and no other.
    with pytest.raises(CheckpointError, match=r"unexpected: quantizer\.vq"):
        from_tensors(read_config(SMALL), tensors | {"quantizer.vq.level_blocks.0.k": torch.zeros(20, 128)})
    f0 = written(LAYOUTS["textless-f0"])
    with pytest.raises(CheckpointError, match="two tables"):
        from_tensors(read_config(LAYOUTS["textless-f0"]), f0 | {"f0_dict.weight": f0["f0_quant_embed.weight"]})
    half = tensors | {"conv_pre.weight_v": tensors["conv_pre.weight_v"] * float("nan")}
    with pytest.raises(CheckpointError, match="NaN"):
        from_tensors(read_config(SMALL), half)
    single = {name: tensor for name, tensor in tensors.items() if name != "ups.0.weight_g"}
    with pytest.raises(CheckpointError, match=r"missing: ups\.0\.weight;.*unexpected: ups\.0\.weight_v"):
        from_tensors(read_config(SMALL), single)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = on_disk(tmp_path, SMALL, written(SMALL))
    torch.save({"generator": {"x": print}}, path)
    with pytest.raises(CheckpointError, match="not unpickled"):
        read_code_hifigan(path)
    torch.save({"generator": written(SMALL), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_code_hifigan(path)
    with pytest.raises(CheckpointError, match="is missing"):
        read_code_hifigan(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is missing"):
        read_code_hifigan(path, tmp_path / "other.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"resblock": "2"}, "resblock"),
        ({"model_in_dim": 32}, "model_in_dim=32"),
        ({"num_embeddings": None}, "vocab_size=None"),
        ({"upsample_kernel_sizes": [10, 8, 8, 4, 4]}, "kernels"),
        ({"upsample_kernel_sizes": [11, 8]}, "kernels"),
        ({"upsample_initial_channel": 40}, "channels=40"),
        ({"resblock_kernel_sizes": [3, 7]}, "residual_dilations"),
        ({"resblock_kernel_sizes": [3, 7, 8]}, "residual_kernels"),
        ({"f0": True}, "f0 without codes"),
        ({"lambda_commit": 0.02}, "lambda_commit"),
        ({"dur_predictor_params": {"var_pred_hidden_dim": 8, "encoder_embed_dim": 8}}, "encoder_embed_dim=8"),
        ({"dur_predictor_params": {"encoder_embed_dim": 16}}, "var_pred_hidden_dim is missing"),
    ],
)
def test_configurations_that_are_not_supported(changes: dict, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_config(SMALL | changes)


def test_a_setting_is_missing() -> None:
    with pytest.raises(CheckpointError, match="upsample_rates is missing"):
        read_config({name: value for name, value in SMALL.items() if name != "upsample_rates"})


def test_inputs_that_do_not_fit() -> None:
    model = CodeHifiGan(CodeHifiGanConfig(10, 4, channels=32, speakers=3, f0_bins=5))
    units, speaker, f0 = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([2]), torch.zeros(1, 2, dtype=torch.int64)
    model(units, speaker=speaker, f0=f0)
    for changes, match in (
        ({"speaker": None}, "needs a speaker"),
        ({"style": torch.tensor([1])}, "needs no style"),
        ({"units": units + 10}, "has 10"),
        ({"units": units.float()}, "integers"),
        ({"units": units[:, :0]}, "no units"),
        ({"speaker": torch.tensor([3])}, "has 3"),
        ({"speaker": torch.tensor([1, 2])}, "2 sounds for 1"),
        ({"f0": f0[:, :1].expand(1, 3)}, "multiple"),
        ({"f0": f0[:, :0]}, "multiple"),
    ):
        with pytest.raises(InputError, match=match):
            model(**{"units": units, "speaker": speaker, "f0": f0} | changes)
    vectors = CodeHifiGan(CodeHifiGanConfig(10, 4, channels=32, speaker_dim=6))
    with pytest.raises(InputError, match=r"\[1, 6\]"):
        vectors(units, speaker=torch.zeros(6))
