"""Loading of checkpoints: layouts, keys and shapes of published sizes, refusals."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechtok.encoders import pretrained
from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.encoders.pretrained import build, expected_shapes, from_pretrained, load_checkpoint, read_tensors
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.wavlm import WavLMConfig, WavLMEncoder
from speechtok.errors import CheckpointError, InputError, UnknownNameError
from tests.parity.test_hubert import (
    SMALL,
    TOLERANCE,
    VARIANTS,
    difference,
    padded,
    randomize,
    reference,
    transformers,
    waves,
)

STYLES = {
    "plain": (),
    "old": ("weight_g", "weight_v"),
    "new": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}
PUBLISHED = {
    "hubert_base": ("HubertModel", {}, None, None),
    "hubert_large": (
        "HubertModel",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "feat_extract_norm": "layer",
            "conv_bias": True,
            "do_stable_layer_norm": True,
        },
        None,
        None,
    ),
    "mhubert_25hz": (
        "HubertModel",
        {
            "conv_pos_batch_norm": True,
            "conv_dim": [512] * 8,
            "conv_kernel": [10, 3, 3, 3, 3, 2, 2, 2],
            "conv_stride": [5, 2, 2, 2, 2, 2, 2, 2],
        },
        None,
        None,
    ),
    "mert_95m": ("HubertModel", {"model_type": "mert_model", "sample_rate": 24000}, 211, 94_371_712),
    "mert_330m": (
        "HubertModel",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "do_stable_layer_norm": True,
        },
        403,
        315_428_992,
    ),
    "sylber": ("HubertModel", {"num_hidden_layers": 9}, None, None),
    "wav2vec2_large": (
        "Wav2Vec2Model",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        None,
        None,
    ),
    "wavlm_base": ("WavLMModel", {}, None, None),
    "wavlm_large": (
        "WavLMModel",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
        },
        None,
        None,
    ),
}


def restyle(tensors, style):
    """Write the weight norm of a transformers state dict in another way."""
    new = tuple(f"encoder.pos_conv_embed.conv.{name}" for name in STYLES["new"])
    out = {name: tensor for name, tensor in tensors.items() if name not in new}
    if style == "plain":
        return out | {"encoder.pos_conv_embed.conv.weight": torch._weight_norm(tensors[new[1]], tensors[new[0]], 2)}
    return out | {
        f"encoder.pos_conv_embed.conv.{name}": tensors[old] for name, old in zip(STYLES[style], new, strict=True)
    }


@pytest.fixture
def model():
    return randomize(transformers.HubertModel(transformers.HubertConfig(**SMALL)))


@pytest.fixture
def config(model):
    return HubertConfig.from_hf(model.config.to_dict(), None)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(encoder, model):
    wave = waves(4711)[0][None]
    with torch.inference_mode():
        assert difference(encoder.hidden_states(wave), reference(model, wave)[: encoder.layer + 1]) <= TOLERANCE


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_of_published_sizes(name):
    kind, settings, count, parameters = PUBLISHED[name]
    hf_class = getattr(transformers, kind)
    known = {key: value for key, value in settings.items() if key != "model_type"}
    with torch.device("meta"):
        theirs = hf_class(hf_class.config_class(**known)).state_dict()
    if count is not None:
        assert (len(theirs), sum(x.numel() for x in theirs.values())) == (count, parameters)
    shapes = {key: tuple(x.shape) for key, x in theirs.items() if key != "masked_spec_embed"}
    conv = "encoder.pos_conv_embed.conv."
    if conv + STYLES["new"][0] in shapes:
        del shapes[conv + STYLES["new"][0]]
        shapes[conv + "weight"] = shapes.pop(conv + STYLES["new"][1])
    config_class, encoder_class = (WavLMConfig, WavLMEncoder) if kind == "WavLMModel" else (HubertConfig, HubertEncoder)
    described = {"model_type": hf_class.config_class.model_type} | settings
    assert expected_shapes(encoder_class, config_class.from_hf(described, None)) == shapes


@pytest.mark.parametrize("style", STYLES)
def test_all_weight_norm_keys_load_to_the_same_output(model, config, style):
    tensors = model.state_dict()
    encoder = load_checkpoint(HubertEncoder, config, None, restyle(tensors, style))
    weight = encoder.encoder.pos_conv_embed.conv.weight
    assert torch.allclose(weight, model.encoder.pos_conv_embed.conv.weight, rtol=0, atol=1e-7)
    same(encoder, model)


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "pickle", "sharded_pickle", "prefixed", "file"])
def test_layouts_of_a_folder(model, folder, layout, tmp_path):
    path, whole = folder, folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = {"a": {n: tensors[n] for n in names[:20]}, "b": {n: tensors[n] for n in names[20:]}}
    if layout == "prefixed":
        heads = {"lm_head.weight": torch.ones(2), "lm_head.bias": torch.ones(2), "classifier.bias": torch.ones(1)}
        save_file({f"hubert.{n}": x for n, x in tensors.items()} | heads, whole)
    elif layout == "file":
        path = whole
    elif layout != "safetensors":
        whole.unlink()
    if layout == "sharded":
        for part, content in parts.items():
            save_file(content, folder / f"model-{part}.safetensors")
        places = {n: f"model-{part}.safetensors" for part, content in parts.items() for n in content}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    elif layout == "pickle":
        torch.save(restyle(model.state_dict(), "old"), folder / "pytorch_model.bin")
    elif layout == "sharded_pickle":
        for part, content in parts.items():
            torch.save(content, folder / f"pytorch_model-{part}.bin")
        places = {n: f"pytorch_model-{part}.bin" for part, content in parts.items() for n in content}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    encoder = from_pretrained(path, 2)
    assert (encoder.type, encoder.layer, encoder.training, encoder.dim) == ("hubert", 2, False, 48)
    same(encoder, model)
    shutil.rmtree(folder)
    same(encoder, model)  # nothing is read lazily


def test_sharded_by_transformers(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    same(from_pretrained(str(tmp_path)), model)


@pytest.mark.parametrize(("model_type", "kind"), [("wav2vec2", "Wav2Vec2Model"), ("wavlm", "WavLMModel")])
def test_model_types(model_type, kind, tmp_path):
    hf_class = getattr(transformers, kind)
    model = randomize(hf_class(hf_class.config_class(**SMALL)))
    model.save_pretrained(tmp_path)
    encoder = from_pretrained(tmp_path)
    assert encoder.type == ("wavlm" if model_type == "wavlm" else "hubert")
    same(encoder, model)


def test_mert_and_preprocessor(model, folder):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "mert_model", "sample_rate": 24000}))
    encoder = from_pretrained(folder)
    assert (encoder.sample_rate, encoder.config.do_normalize) == (24000, False)
    same(encoder, model)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 24000}))
    assert from_pretrained(folder).config.do_normalize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(model, config, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    encoder = load_checkpoint(HubertEncoder, config, None, tensors)
    assert {x.dtype for x in encoder.state_dict().values()} == {torch.float32}
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    same(encoder, model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_configuration_builds_the_same_encoder(variant):
    model = randomize(transformers.HubertModel(transformers.HubertConfig(**(SMALL | VARIANTS[variant]))))
    config = HubertConfig.from_hf(model.config.to_dict(), None)
    for layer in (None, 2):
        encoder = load_checkpoint(HubertEncoder, config, layer, model.state_dict())
        again = build(encoder.type, json.loads(json.dumps(encoder.config_dict())), encoder.layer)
        again.load_state_dict(encoder.state_dict(), strict=True)
        assert again.config == encoder.config
        assert not again.training
        same(again, model)


@pytest.mark.parametrize("form", ["flat.ckpt", "lightning.ckpt", "flat.safetensors", "flat.pt", "half.bin"])
def test_sylber_file(form, tmp_path):
    settings = SMALL | {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = randomize(transformers.HubertModel(transformers.HubertConfig(**settings)))
    tensors = restyle(model.state_dict(), "old" if form == "flat.ckpt" else "new")
    path = tmp_path / form
    if form == "flat.safetensors":
        save_file(tensors, path)
    elif form == "lightning.ckpt":
        stats = {f"net.thresholder.{name}": torch.ones(1) for name in ("signal_mean", "noise_var")}
        prefixed = {f"net.speech_model.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"state_dict": prefixed | stats, "epoch": 3, "global_step": 7}, path)
    else:
        torch.save({n: x.bfloat16() for n, x in tensors.items()} if form == "half.bin" else tensors, path)
        if form == "half.bin":
            model.load_state_dict({n: x.bfloat16().float() for n, x in tensors.items()})
    encoder = from_pretrained(path)
    assert encoder.config == HubertConfig.from_hf(model.config.to_dict(), None)
    wave = waves(4711)[0][None]
    with torch.inference_mode():
        assert difference(encoder.hidden_states(wave), reference(model, wave)) <= TOLERANCE
    assert from_pretrained(path, 2).layer == 2


def test_sylber_of_published_size(tmp_path):
    """Standardised or not, alone or in a batch: last_hidden_state of the 9-layer model for each wave alone."""
    model, path = (
        randomize(transformers.HubertModel(transformers.HubertConfig(num_hidden_layers=9))),
        tmp_path / "a.ckpt",
    )
    torch.save(restyle(model.state_dict(), "old"), path)
    rows = waves(16000, 9999, 720)
    batch, lengths = padded(rows, extra=777)
    found = {}
    for normalize in (None, False, True):
        encoder = from_pretrained(path, normalize=normalize)
        assert (encoder.layer, encoder.dim, len(encoder.encoder.layers)) == (9, 768, 9)
        assert encoder.config.do_normalize is bool(normalize)
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=bool(normalize))
        with torch.inference_mode():
            together = encoder(batch, lengths)
            for row, wave in enumerate(rows):
                count = encoder.grid.num_frames(len(wave))
                alone = encoder(wave[None]).features
                values = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values
                theirs = model(values).last_hidden_state
                assert int(together.lengths[row]) == count == theirs.shape[1]
                assert difference([alone], [theirs]) <= TOLERANCE
                assert difference([together.features[row, :count]], [alone[0]]) <= TOLERANCE
        found[normalize] = together.features
        silent = encoder(torch.zeros(1, 16000)).features
        assert bool(silent.isfinite().all())
    assert torch.equal(found[None], found[False])
    # The package divides by the unbiased deviation; group norm takes level and offset out again.
    wave = rows[0]
    with torch.inference_mode():
        package = model(((wave - wave.mean()) / wave.std())[None]).last_hidden_state[0]
    assert difference([found[True][0, : len(package)]], [package]) <= 1e-3
    assert 0 < difference([found[True]], [found[False]]) <= 0.02


@pytest.mark.parametrize("layout", ["flat", "lightning"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layers.3.attention.q_proj.weight": None}, r"1 missing: encoder\.layers\.3\.attention\.q_proj"),
        ({"encoder.layers.11.layer_norm.bias": torch.ones(128)}, r"unexpected: encoder\.layers\.11"),
        (
            {"encoder.pos_conv_embed.conv.weight_g": None},
            r"no HuBERT state dict: encoder\.pos_conv_embed\.conv\.weight is",
        ),
        (
            {"feature_extractor.conv_layers.6.conv.weight": torch.ones(2)},
            r"state dict: feature_extractor\.conv_layers\.6",
        ),
        ({"encoder.strange": torch.ones(1)}, r"1 unexpected: encoder\.strange"),
    ],
)
def test_sylber_files_that_do_not_fit_are_refused(layout, change, message, tmp_path):
    small = SMALL | {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = transformers.HubertModel(transformers.HubertConfig(**small))
    tensors = restyle(model.state_dict(), "old") | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if layout == "lightning":
        tensors = {"state_dict": {f"net.speech_model.{name}": tensor for name, tensor in tensors.items()}}
    torch.save(tensors, tmp_path / "sylber.ckpt")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "sylber.ckpt")


def test_what_else_a_training_checkpoint_may_hold(model, tmp_path):
    tensors = {f"net.speech_model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": tensors | {"net.teacher.weight": torch.ones(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"1 unexpected beside net\.speech_model\.\*: net\.teacher\.weight"):
        from_pretrained(tmp_path / "a.ckpt")


def test_normalisation_is_the_callers_choice(model, folder, tmp_path):
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    found = [from_pretrained(folder, normalize=choice).config.do_normalize for choice in (None, False, True)]
    assert found == [True, False, True]
    save_encoder(from_pretrained(folder), tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").config.do_normalize
    assert not from_pretrained(tmp_path / "saved", normalize=False).config.do_normalize
    with pytest.raises(InputError, match="mfcc encoders cannot normalise"):
        from_pretrained("mfcc", normalize=True)


@pytest.mark.parametrize("settings", [{"feat_extract_norm": "layer"}, {"hidden_size": 1024}])
def test_a_bare_file_of_another_kind_needs_its_configuration(settings, tmp_path):
    small = SMALL | {"hidden_size": 128, "num_attention_heads": 2, "do_stable_layer_norm": True} | settings
    model = transformers.HubertModel(transformers.HubertConfig(**small))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_pretrained(tmp_path / "model.pt")


def spoil(tensors, how):
    name = "encoder.layers.1.attention.q_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "unexpected":
        tensors["encoder.layers.9.attention.q_proj.weight"] = tensors[name]
    elif how == "many":
        for i in range(30):
            tensors[f"encoder.extra.{i}"] = torch.ones(1)
    elif how == "shape":
        tensors[name] = tensors[name][:-1]
    elif how == "nan":
        tensors[name][0, 0] = torch.nan
    elif how == "infinite behind the layer":
        tensors["encoder.layers.2.final_layer_norm.bias"][3] = torch.inf
    elif how == "norm pair broken":
        del tensors["encoder.pos_conv_embed.conv.parametrizations.weight.original0"]
    elif how == "norm of wrong size":
        key = "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
        tensors[key] = tensors[key][..., 1:]
    elif how == "zero direction":
        tensors["encoder.pos_conv_embed.conv.parametrizations.weight.original1"].zero_()
    elif how == "twice":
        tensors["encoder.pos_conv_embed.conv.weight"] = torch.ones(48, 12, 16)
    elif how == "quantised":
        tensors[name] = tensors[name].to(torch.int8)
    elif how == "beside the prefix":
        bare = dict(tensors)
        tensors.clear()
        tensors.update({f"hubert.{n}": x for n, x in bare.items() if n != name} | {name: bare[name]})
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing: encoder\.layers\.1\.attention\.q_proj\.weight"),
        ("unexpected", r"1 unexpected: encoder\.layers\.9\."),
        ("many", r"30 unexpected: encoder\.extra\.0.*, \.\.\."),
        ("shape", r"1 wrongly shaped: .*\(47, 48\) instead of \(48, 48\)"),
        ("nan", "1 tensors hold NaN or infinity: encoder.layers.1"),
        ("infinite behind the layer", "NaN or infinity: encoder.layers.2"),
        ("norm pair broken", "1 missing: encoder.pos_conv_embed.conv.weight; 1 unexpected"),
        ("norm of wrong size", "does not fit"),
        ("zero direction", "NaN or infinity: encoder.pos_conv_embed"),
        ("twice", "is there twice"),
        ("quantised", "has type torch.int8"),
        ("beside the prefix", "1 unexpected beside hubert"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(model, config, how, message):
    tensors = spoil({name: tensor.clone() for name, tensor in model.state_dict().items()}, how)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(HubertEncoder, config, 1, tensors)
    assert str(caught.value).count("encoder.extra") in (0, 10)


def test_the_message_names_the_file(folder):
    tensors = spoil(load_file(folder / "model.safetensors"), "missing")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{folder}.*1 missing"):
        from_pretrained(folder)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sylber.ckpt", "sylber.pt"])
def test_pickles_with_code_are_refused(model, folder, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = folder if name == "pytorch_model.bin" else tmp_path
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict() | {"masked_spec_embed": Malicious()}, target / name)
    with pytest.raises(CheckpointError, match="not unpickled"):
        from_pretrained(folder if target == folder else target / name)
    assert not (tmp_path / "attacked").exists()


def test_folders_that_are_no_checkpoints(folder, tmp_path):
    description = (folder / "config.json").read_text()
    for content, message in (
        ("{", "cannot be read"),
        ("[1]", "JSON object"),
        ('{"model_type": "bert"}', "model_type='bert'"),
        ("{}", "model_type=None"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        from_pretrained(folder)
    (folder / "config.json").write_text(description)
    with pytest.raises(InputError, match=r"0 \.\.\. 3"):
        from_pretrained(folder, 4)
    whole = folder / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_pretrained(folder)
    whole.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no state dict"):
        from_pretrained(folder)
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match="unknown kind of file"):
        from_pretrained(tmp_path / "weights.h5")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no HuBERT state dict"):
        from_pretrained(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "is missing"),
        ({"weight_map": {"a": "part.safetensors"}}, "does not hold the keys"),
    ],
)
def test_bad_shard_indices(index, message, tmp_path):
    save_file({"b": torch.ones(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_builds_by_type():
    assert build("hubert", {}, 0).dim == 768
    with pytest.raises(UnknownNameError, match="cqt, hubert, lipcot, mfcc, seanet, w2v_bert, wavlm"):
        build("hubrt", {}, None)
    with pytest.raises(CheckpointError, match="unknown fields colour"):
        build("hubert", {"colour": 1}, None)
    with pytest.raises(CheckpointError, match="hidden_size"):
        build("hubert", {"hidden_size": 0}, None)


def test_the_other_encoders_are_found():
    mfcc = build("mfcc", {"sample_rate": 16000}, None)
    assert (mfcc.type, mfcc.layer, mfcc.state_dict()) == ("mfcc", None, {})
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    encoder = build("w2v_bert", small, 1)
    assert (encoder.type, encoder.layer) == ("w2v_bert", 1)


def test_w2v_bert_folder(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = randomize(transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**small)))
    model.save_pretrained(tmp_path)
    encoder = from_pretrained(tmp_path, 1)
    assert (encoder.type, encoder.layer) == ("w2v_bert", 1)
    assert from_pretrained(tmp_path).layer == 2
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_names_that_are_no_paths(monkeypatch, tmp_path, folder):
    with pytest.raises(UnknownNameError, match="neither an existing path"):
        from_pretrained("no-such-thing")
    with pytest.raises(CheckpointError, match="does not exist"):
        from_pretrained(tmp_path / "nothing")
    import huggingface_hub

    calls = []

    def snapshot(repository, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert from_pretrained("somebody/model", 1, revision="v1").layer == 1
    assert [call[:2] for call in calls] == [("somebody/model", "v1")]
    assert not any("bin" in pattern for pattern in calls[0][2])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    assert pretrained.download("somebody/model") == folder
    (folder / "pytorch_model.bin").unlink()
    calls.clear()
    pretrained.download("somebody/model")
    assert len(calls) == 2
    assert any("pytorch_model" in pattern for pattern in calls[1][2])


def test_what_the_hub_refuses(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for raised, expected in (
        (HFValidationError("bad"), UnknownNameError),
        (LocalEntryNotFoundError("offline"), CheckpointError),
        (ConnectionError("no network"), CheckpointError),
    ):

        def fail(*arguments, error=raised, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(expected, match="somebody/model"):
            from_pretrained("somebody/model")


def test_offline_mode_reads_the_cache_only(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        from_pretrained("somebody/model")


def test_full_size_hubert_base(tmp_path):
    model = randomize(transformers.HubertModel(transformers.HubertConfig(attn_implementation="eager")))
    model.save_pretrained(tmp_path)
    encoder = from_pretrained(tmp_path, 9)
    wave = waves(16000)[0][None]
    with torch.inference_mode():
        states = encoder.hidden_states(wave)
    assert difference(states, reference(model, wave)[:10]) <= TOLERANCE
