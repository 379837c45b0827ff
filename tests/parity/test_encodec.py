"""EnCodec from the same random weights here and in transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from speechtok.codecs.encodec import EncodecConfig, read_encodec
from speechtok.codecs.seanet import SeanetWaves
from speechtok.encoders.seanet import SeanetFrames
from speechtok.errors import AudioError, CheckpointError, FormatError, InputError, UnknownNameError
from speechtok.nn.edges import Edges

SMALL = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "target_bandwidths": [1.5, 3.0, 6.0]}
STEREO = {
    **SMALL,
    "sampling_rate": 48000,
    "audio_channels": 2,
    "use_causal_conv": False,
    "norm_type": "time_group_norm",
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "target_bandwidths": [3.0, 6.0],
}
LENGTHS = [1, 2, 5, 319, 320, 321, 639, 641, 2559, 2561, 5000, 24000, 24001]


def published(folder, **changes):
    """A random `EncodecModel` on disk; its codebooks are noise of the size of its frames (they begin at zero)."""
    from transformers import EncodecConfig as HfConfig
    from transformers import EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(HfConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        noise = torch.randn(1, model.config.audio_channels, 4800) * 0.1
        spread = model.encoder(noise).std()
        for book, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.normal_(0, float(spread) * 0.9**book)
        for name, parameter in model.named_parameters():
            if name.endswith("original0"):  # else the folded weight is the direction itself
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            if "norm." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def mono(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mono")
    return published(folder), read_encodec(folder), folder


@pytest.fixture(scope="module")
def stereo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stereo")
    return published(folder, **STEREO), read_encodec(folder), folder


def sound(channels, length, seed=0):
    """Noise with a slow envelope."""
    rng = np.random.default_rng(seed)
    envelope = 0.2 + 0.2 * np.sin(np.arange(length) / 900)
    return torch.from_numpy((rng.standard_normal((channels, length)) * envelope).astype(np.float32))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_24_khz(mono, length):
    theirs, ours, _ = mono
    wave = sound(1, length)
    frames = theirs.encoder(wave[None])
    assert frames.shape[-1] == -(-length // 320)
    assert (ours.encoder(wave[None]) - frames).abs().max() <= 1e-5
    encoded = theirs.encode(wave[None], bandwidth=6.0)
    codes = encoded.audio_codes[0, 0]
    chunks = ours.encode(wave)
    assert len(chunks) == 1
    assert chunks[0].scale is None
    assert torch.equal(chunks[0].ids, codes.int())
    assert codes.unique().numel() > min(10, codes.numel() // 4)
    expected = theirs.decode(encoded.audio_codes, encoded.audio_scales).audio_values[0]
    assert (ours.decode(chunks) - expected).abs().max() <= 1e-4 * float(expected.abs().max().clamp_min(1))
    some = ours.encode(wave, codebooks=ours.config.books_for(3.0))[0].ids
    assert torch.equal(some, theirs.encode(wave[None], bandwidth=3.0).audio_codes[0, 0].int())


def test_75_frames_in_a_second(mono):
    assert mono[1].encode(sound(1, 24000))[0].ids.shape == (mono[1].config.codebooks, 75)


@pytest.mark.parametrize("length", [1, 320, 321, 47519, 47520, 47521, 48000, 48001, 95520, 100000])
@torch.inference_mode()
def test_48_khz(stereo, length):
    theirs, ours, _ = stereo
    wave = sound(2, length)
    encoded = theirs.encode(wave[None], bandwidth=6.0)
    chunks = ours.encode(wave)
    assert len(chunks) == len(encoded.audio_codes)
    for ours_chunk, codes, scale in zip(chunks, encoded.audio_codes, encoded.audio_scales, strict=True):
        count = ours_chunk.ids.shape[1]
        assert torch.equal(ours_chunk.ids, codes[0, :, :count].int())
        assert ours_chunk.scale == pytest.approx(float(scale), rel=1e-5)
    pads = encoded.last_frame_pad_length
    expected = theirs.decode(encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=pads).audio_values[0]
    got = ours.decode(chunks)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * float(expected.abs().max().clamp_min(1))


@torch.inference_mode()
def test_48_khz_with_two_short_chunks(stereo):
    """transformers cannot stack the chunks of such a sound; chunk by chunk it can."""
    theirs, ours, _ = stereo
    wave = sound(2, 95041)
    chunks = ours.encode(wave)
    assert [chunk.ids.shape[1] for chunk in chunks] == [150, 149, 1]
    for at, chunk in zip(range(0, 95041, 47520), chunks, strict=True):
        assert torch.equal(chunk.ids, theirs._encode_frame(wave[None, :, at : at + 48000], 6.0)[0][0].int())
    assert ours.decode(chunks).shape == (2, 2 * 47520 + 320)


@torch.inference_mode()
def test_48_khz_frames(stereo):
    theirs, ours, _ = stereo
    wave = sound(2, 48000)[None]
    assert (ours.encoder(wave) - theirs.encoder(wave)).abs().max() <= 1e-5


@torch.inference_mode()
def test_rows_of_a_batch_are_what_they_are_alone(mono):
    """transformers pads behind the end instead, so that a file's codes depend on its batch there."""
    theirs, ours, _ = mono
    waves = sound(len(LENGTHS), max(LENGTHS))
    frames = ours.encoder(waves[:, None], Edges(torch.tensor(LENGTHS)))
    for row, length, wave in zip(frames, LENGTHS, waves, strict=True):
        alone = theirs.encoder(wave[None, None, :length])[0]
        assert (row[:, : alone.shape[1]] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("plain", [False, True], ids=["weight_g", "plain"])
@torch.inference_mode()
def test_spellings_of_weight_norm(mono, plain, tmp_path):
    _, ours, folder = mono
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("original0")]:
        stem = name.removesuffix("parametrizations.weight.original0")
        g, v = tensors.pop(name), tensors.pop(name.replace("original0", "original1"))
        if plain:
            tensors[stem + "weight"] = torch._weight_norm(v, g, 0)
        else:
            tensors |= {stem + "weight_g": g, stem + "weight_v": v}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    wave = sound(1, 5000)
    other = read_encodec(tmp_path)
    assert relative(other.encoder(wave[None]), ours.encoder(wave[None])) < 1e-6
    assert torch.equal(other.encode(wave)[0].ids, ours.encode(wave)[0].ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("quantizer.layers.1.codebook.embed_avg"), "1 missing: quantizer.layers.1.codebook.embed_avg"),
        (lambda t: t.pop("encoder.layers.0.conv.bias"), "1 missing: encoder.layers.0.conv.bias"),
        (lambda t: t.update(other=torch.zeros(1)), "1 unexpected: other"),
        (
            lambda t: t.update({"quantizer.layers.0.codebook.embed": torch.zeros(3, 16)}),
            r"wrongly shaped: quantizer.layers.0.codebook.embed \(3, 16\) instead of \(32, 16\)",
        ),
        (lambda t: t["decoder.layers.0.conv.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_weights_that_do_not_fit(mono, change, message, tmp_path):
    folder = mono[2]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        read_encodec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "hubert"}, "is not encodec"),
        ({"codebook_size": 1000}, "power of 2"),
        ({"codebook_dim": 8}, "codebook_dim=8"),
        ({"target_bandwidths": []}, "malformed"),
        ({"target_bandwidths": [0.001]}, "do not make an EnCodec"),
        ({"chunk_length_s": 1.0}, "do not make an EnCodec"),
        ({"chunk_length_s": 0.0, "overlap": 0.01}, "do not make an EnCodec"),
        ({"chunk_length_s": -1.0, "overlap": 0.01}, "do not make an EnCodec"),
        ({"chunk_length_s": 1.0, "overlap": 1.0}, "do not make an EnCodec"),
        ({"upsampling_ratios": 4}, "malformed"),
        ({"num_filters": 0}, "num_filters=0"),
    ],
)
def test_configurations_that_are_refused(mono, change, message):
    description = json.loads((mono[2] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        EncodecConfig.from_hf(description | change)


def test_what_cannot_be_encoded(mono, stereo, tmp_path):
    with pytest.raises(AudioError, match=r"waves \[2, samples\]"):
        stereo[1].encode(sound(1, 100))
    with pytest.raises(AudioError, match="samples"):
        mono[1].encode(sound(1, 0))
    with pytest.raises(InputError, match="codebooks=99"):
        mono[1].encode(sound(1, 100), codebooks=99)
    with pytest.raises(InputError, match="kbit/s"):
        mono[1].config.books_for(1000.0)
    with pytest.raises(FormatError, match="0 chunks"):
        mono[1].decode([])
    with pytest.raises(FormatError, match="2 chunks"):
        mono[1].decode(mono[1].encode(sound(1, 100)) * 2)
    with pytest.raises(UnknownNameError, match="neither"):
        read_encodec(tmp_path / "nowhere at all")


def test_48_khz_is_no_tokenizer(stereo):
    for part in (SeanetFrames, SeanetWaves):
        with pytest.raises(CheckpointError, match="2 channels, its convolutions look ahead, its norms"):
            part(stereo[1].config.seanet)


@pytest.mark.slow
@torch.inference_mode()
def test_full_size(tmp_path):
    theirs = published(tmp_path, num_filters=32, hidden_size=128, codebook_size=1024, target_bandwidths=[24.0])
    ours = read_encodec(tmp_path)
    assert ours.config.codebooks == 32
    wave = sound(1, 24001)
    assert (ours.encoder(wave[None]) - theirs.encoder(wave[None])).abs().max() <= 1e-5
    encoded = theirs.encode(wave[None], bandwidth=24.0)
    assert torch.equal(ours.encode(wave)[0].ids, encoded.audio_codes[0, 0].int())
    expected = theirs.decode(encoded.audio_codes, encoded.audio_scales).audio_values[0]
    assert (ours.decode(ours.encode(wave)) - expected).abs().max() <= 1e-4
