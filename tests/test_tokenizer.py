"""Bundles, fingerprints, names, and the Python interface."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import speechtok
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import (
    AudioError,
    CheckpointError,
    FingerprintError,
    FormatError,
    InputError,
    OutputError,
    SpeechtokError,
    UnknownNameError,
)
from speechtok.frames import WindowRule
from speechtok.quantizers.kmeans import KMeans
from speechtok.registry import DEFAULT, PUBLISHED, describe_all, fetch, resolve, shipped
from speechtok.tokenizer import Tokenizer

from .conftest import chunked_tokenizer


def test_encode_path_array_stream_and_tensor_agree(tokenizer, clip, clip_wave):
    units = tokenizer.encode(clip)
    assert units == tokenizer.encode(clip_wave, 16000)
    assert units == tokenizer.encode(torch.from_numpy(clip_wave), 16000)
    assert units == tokenizer.encode((clip_wave * 32768).astype(np.int16), 16000)
    with clip.open("rb") as file:
        assert units == tokenizer.encode(file)
    assert units == tokenizer.encode_batch([clip, clip_wave[:5000]], 16000)[0]
    assert len(units) == (len(clip_wave) - 400) // 160 + 1
    assert units.ids.dtype == np.int32
    assert units.fingerprint == tokenizer.fingerprint
    # Frame i covers offset + i * hop to offset + (i + 1) * hop.
    facts = tokenizer.describe()
    assert units.starts_seconds[7] == pytest.approx(facts["offset_seconds"] + 7 * facts["hop_seconds"])
    assert units.ends_seconds[7] == pytest.approx(facts["offset_seconds"] + 8 * facts["hop_seconds"])


def test_short_sound_has_no_units(tokenizer):
    assert len(tokenizer.encode(np.zeros(399, np.float32), 16000)) == 0
    assert len(tokenizer.encode(np.zeros(0, np.float32), 16000)) == 0
    assert len(tokenizer.encode(np.zeros(400, np.float32), 16000)) == 1


def test_arrays_need_a_rate(tokenizer):
    with pytest.raises(AudioError, match="sample_rate"):
        tokenizer.encode(np.zeros(1000, np.float32))


def test_save_and_load(tmp_path, tokenizer, bidirectional, chunked, clip):
    for original in (tokenizer, bidirectional, chunked):
        folder = original.save(tmp_path / original.name)
        again = Tokenizer.load(folder)
        assert again.fingerprint == original.fingerprint
        assert again.encode(clip) == original.encode(clip)
        assert again.window == original.window
        assert speechtok.load(folder).name == original.name
        original.save(folder)  # the same tokenizer may be saved again


def test_weights_that_are_bfloat16_take_half_the_space(tmp_path, clip_wave, clip):
    rounded = chunked_tokenizer(clip_wave)
    full = rounded.save(tmp_path / "full")
    with torch.no_grad():
        for parameter in rounded.encoder.parameters():
            parameter.copy_(parameter.bfloat16())
    rounded = Tokenizer(rounded.encoder, rounded.quantizer, name="rounded")
    folder = rounded.save(tmp_path / "rounded")
    sizes = [(path / "encoder.safetensors").stat().st_size for path in (full, folder)]
    assert 1.9 < sizes[0] / sizes[1] < 2.0
    stored = load_file(folder / "encoder.safetensors")
    assert stored["feature_projection.projection.weight"].dtype == torch.bfloat16
    assert stored["feature_mean"].dtype == torch.float32, "what would lose something is left as it is"
    again = Tokenizer.load(folder)
    assert again.fingerprint == rounded.fingerprint
    for part in ("encoder", "quantizer"):
        tensors = getattr(again, part).state_dict()
        for name, tensor in getattr(rounded, part).state_dict().items():
            assert tensors[name].dtype == tensor.dtype == torch.float32
            assert torch.equal(tensors[name], tensor)
    assert again.encode(clip) == rounded.encode(clip)


def test_the_fingerprint_sees_everything_that_decides_units(bidirectional):
    base = bidirectional.fingerprint

    def other(**changes):
        parts = {
            "encoder": bidirectional.encoder,
            "quantizer": bidirectional.quantizer,
            "name": "x",
            "window": bidirectional.window,
        }
        return Tokenizer(**(parts | changes)).fingerprint

    assert other() == base, "a name is only a name"
    assert other(window=WindowRule(3.0, 0.3)) != base
    centroids = bidirectional.quantizer.centroids.numpy().copy()
    centroids[0, 0] += 1e-3
    assert other(quantizer=KMeans(centroids)) != base
    assert other(quantizer=KMeans(bidirectional.quantizer.centroids, np.zeros(32), np.ones(32))) != base


def test_damaged_bundles_are_refused(tmp_path, tokenizer, bidirectional):
    good = bidirectional.save(tmp_path / "good")

    def copy():
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return shutil.copytree(good, tmp_path / "bad")

    weights = load_file(good / "quantizer.safetensors")
    save_file({"centroids": weights["centroids"] + 1}, copy() / "quantizer.safetensors")
    with pytest.raises(FingerprintError, match=bidirectional.fingerprint):
        Tokenizer.load(tmp_path / "bad")
    (copy() / "quantizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(FormatError, match="cannot be read"):
        Tokenizer.load(tmp_path / "bad")
    (copy() / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="lacks the fields"):
        Tokenizer.load(tmp_path / "bad")
    (copy() / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="cannot be read"):
        Tokenizer.load(tmp_path / "bad")
    for change, error in [
        ({"format": 99}, FormatError),
        ({"quantizer": "magic"}, FormatError),
        ({"encoder": "magic"}, UnknownNameError),
        ({"encoder_config": {"magic": 1}}, CheckpointError),
        ({"window": {"magic": 1}}, FormatError),
        ({"layer": 1}, FormatError),
    ]:
        folder = copy()
        facts = json.loads((folder / "tokenizer.json").read_text()) | change
        (folder / "tokenizer.json").write_text(json.dumps(facts))
        with pytest.raises(error):
            Tokenizer.load(folder)
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(OutputError, match="another tokenizer"):
        tokenizer.save(good)


def test_encoder_weights_can_be_left_to_a_bundle_beside(tmp_path, tokenizer, bidirectional, clip):
    bidirectional.save(tmp_path / "base")
    other = Tokenizer(bidirectional.encoder, KMeans(np.eye(3, bidirectional.encoder.dim)), name="other")
    folder = other.save(tmp_path / "other", base="base")
    whole = other.save(tmp_path / "whole")
    assert json.loads((folder / "tokenizer.json").read_text())["encoder_base"] == "base"
    assert not (folder / "encoder.safetensors").exists()
    again = Tokenizer.load(folder)
    assert again.fingerprint == other.fingerprint == Tokenizer.load(whole).fingerprint
    np.testing.assert_array_equal(again.encode(clip).ids, other.encode(clip).ids)
    again.save(tmp_path / "copy")  # without a base it is whole
    with torch.no_grad():
        again.encoder.feature_projection.projection.bias += 1
    changed = Tokenizer(again.encoder, again.quantizer, name="changed")
    partly = changed.save(tmp_path / "partly", base="base")
    assert load_file(partly / "encoder.safetensors").keys() == {"feature_projection.projection.bias"}
    assert Tokenizer.load(partly).fingerprint == changed.fingerprint != other.fingerprint
    shutil.rmtree(tmp_path / "base")
    assert Tokenizer.load(tmp_path / "copy").fingerprint == other.fingerprint
    with pytest.raises(FormatError, match="must lie beside it"):
        Tokenizer.load(folder)
    tokenizer.save(tmp_path / "base")  # of another encoder
    with pytest.raises(FormatError):
        Tokenizer.load(folder)
    with pytest.raises(SpeechtokError):
        other.save(tmp_path / "none", base="base")
    for bad in ("../other", "", "..", 3):
        edited = json.loads((folder / "tokenizer.json").read_text()) | {"encoder_base": bad}
        (folder / "tokenizer.json").write_text(json.dumps(edited))
        with pytest.raises(FormatError, match="encoder_base"):
            Tokenizer.load(folder)


def test_parts_must_fit(tokenizer):
    with pytest.raises(FormatError, match="dimensions"):
        Tokenizer(MfccEncoder(), KMeans(np.zeros((2, 3))), name="x")


def test_broken_weights_are_noticed(clip_wave):
    from .conftest import tiny_encoder

    encoder = tiny_encoder("hubert")
    with torch.no_grad():
        encoder.feature_projection.projection.bias[0] = torch.nan
    broken = Tokenizer(encoder, KMeans(np.zeros((2, 32))), name="x")
    with pytest.raises(CheckpointError, match="NaN"):
        broken.encode(clip_wave, 16000)


@pytest.mark.parametrize("device", ["cuda:99", "vulkan", "hpu", "meta", "nonsense", ""])
def test_devices_that_cannot_be_used(tokenizer, device):
    """Torch refuses each in its own way; "meta" it does not refuse."""
    with pytest.raises(InputError, match="cannot be used here"):
        tokenizer.to(device)


def test_names(tmp_path, tokenizer):
    assert DEFAULT in shipped()
    assert resolve(DEFAULT) == shipped()[DEFAULT]
    assert resolve("hubert-base-ls960-l9-km500") is PUBLISHED["hubert-base-ls960-l9-km500"]
    with pytest.raises(UnknownNameError, match=DEFAULT):
        resolve("nonsense")
    # A path wins over a name.
    folder = tmp_path / DEFAULT
    folder.mkdir()
    assert resolve(folder) == folder
    rows = {row["name"]: row for row in describe_all()}
    assert rows[DEFAULT]["status"] == "shipped"
    assert rows[DEFAULT]["rate"] == 50
    assert rows["mhubert-base-25hz-l11-km500"]["rate"] == 25
    assert rows["mhubert-base-25hz-l11-km500"]["status"] in {"cached", "to download"}
    for entry in PUBLISHED.values():
        assert len(entry.sha256) == 64
        assert entry.layer
        assert entry.licence


def test_downloads_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHTOK_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "km.bin"
    source.write_bytes(b"centroids")
    address = source.as_uri()
    digest = "ff6ac9c1cd0e2a9e2ba6cabc0e6d39c6b5ff9f4bbd4a2b8c0b1d5d55dd2a7c07"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        fetch(address, digest)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(address, digest)
    import hashlib

    digest = hashlib.sha256(b"centroids").hexdigest()
    path = fetch(address, digest)
    assert path.read_bytes() == b"centroids"
    assert path == fetch(address, digest)
    path.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(address, digest)
    assert not list(path.parent.glob(".km.bin*"))


def test_published_tokenizer_end_to_end(tmp_path, monkeypatch, clip):
    """The loading code of published names on a checkpoint of that layout with random weights."""
    import hashlib
    import pickle
    from dataclasses import replace

    from sklearn.cluster import MiniBatchKMeans
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = HubertModel(config).eval()
    model.save_pretrained(tmp_path / "hubert")
    (tmp_path / "hubert" / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": True, "sampling_rate": 16000})
    )
    centroids = MiniBatchKMeans(5, n_init=1, random_state=0).fit(np.random.default_rng(0).standard_normal((50, 32)))
    data = pickle.dumps(centroids)
    monkeypatch.setenv("SPEECHTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "km.bin").write_bytes(data)
    entry = replace(
        PUBLISHED["hubert-base-ls960-l9-km500"],
        repository=str(tmp_path / "hubert"),
        layer=2,
        centroids=(tmp_path / "km.bin").as_uri(),
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=5,
    )
    monkeypatch.setitem(PUBLISHED, "test-km5", entry)
    tokenizer = speechtok.load("test-km5")
    units = tokenizer.encode(clip)
    # These models were trained without standardised waves, whatever the preprocessor file says.
    import soundfile

    wave = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
    with torch.inference_mode():
        hidden = model(wave[None], output_hidden_states=True).hidden_states[2][0].numpy()
    expected = centroids.predict(hidden.astype(centroids.cluster_centers_.dtype))
    assert (units.ids == expected).mean() > 0.995
    monkeypatch.setitem(PUBLISHED, "test-km5", replace(entry, vocab_size=6))
    with pytest.raises(FormatError, match="5 clusters"):
        speechtok.load("test-km5")
