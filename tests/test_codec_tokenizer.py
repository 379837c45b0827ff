"""Codecs as tokenizers: last frames, streams, decoding, fewer codebooks, bundles."""

import json
import pickle
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import speechtok
from speechtok import hub
from speechtok.audio.resample import resample
from speechtok.codecs.seanet import SeanetWaves
from speechtok.encoders.seanet import SeanetFrames
from speechtok.errors import (
    AudioError,
    CheckpointError,
    FingerprintError,
    FormatError,
    InputError,
    OutputError,
    UnknownNameError,
)
from speechtok.evaluation.verify import in_batches, random_pieces, streamed_together
from speechtok.frames import FrameGrid, WindowRule
from speechtok.nn.residual_vq import ResidualVQ
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder
from speechtok.quantizers.kmeans import KMeans
from speechtok.quantizers.mlp import MlpQuantizer, UnitMlp
from speechtok.quantizers.residual import ResidualQuantizer
from speechtok.segmenters import Greedy
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

from .codecs import CAUSAL, PUBLISHED, codec, noise

EDGES = [0, 1, 319, 320, 321, 639, 640, 641, 2559, 2560, 2561]


@pytest.fixture(scope="module")
def causal():
    return codec()


@pytest.fixture(scope="module", params=["causal", "published"])
def each(request, causal):
    return causal if request.param == "causal" else codec(name="tiny-published", **PUBLISHED)


@pytest.fixture(scope="module")
def waves():
    """One window each, several, and lengths around whole frames."""
    return [noise(n, seed) for seed, n in enumerate([1, 500, 2560, 2561, 23999, 24000, 24001, 60000, 72345])]


def test_a_partial_frame_counts():
    grid = FrameGrid(24000, 320, 320, partial=True)
    assert [grid.num_frames(n) for n in EDGES] == [0, 1, 1, 1, 2, 2, 2, 3, 8, 8, 9]
    assert [grid.whole_frames(n) for n in EDGES] == [0, 0, 0, 1, 1, 1, 2, 2, 7, 8, 8]
    assert grid.offset == 0
    assert grid.num_samples(8) == 2560


@pytest.mark.parametrize("samples", EDGES)
def test_frames_and_sound_end_with_the_sound(each, samples):
    units = each.encode(noise(samples), 24000)
    assert units.ids.shape == (4, -(-samples // 320))
    assert units.starts.tolist() == list(range(0, samples, 320))
    assert units.ends.tolist() == [*range(320, samples, 320), *([samples] if samples else [])]
    wave = each.decode(units)
    assert (wave.shape, wave.dtype) == ((samples,), np.float32)


def test_frames_of_a_batch_and_their_lengths(causal):
    wave = torch.from_numpy(noise(5000))[None].repeat(3, 1)
    frames = causal.encoder(wave, torch.tensor([5000, 321, 0]))
    assert frames.lengths.tolist() == [16, 2, 0]
    assert frames.features.shape == (3, 16, 16)
    assert not frames.features[1, 2:].any()
    with torch.inference_mode():
        alone = causal.encoder(wave[1:2, :321]).features[0]
    torch.testing.assert_close(frames.features[1, :2], alone, rtol=0, atol=1e-6)


def test_units_are_the_nearest_codes(causal):
    """An oracle in float64: the frames of the whole sound in one pass, then book by book."""
    wave = noise(20000)
    with torch.inference_mode():
        rest = causal.encoder(torch.from_numpy(wave)[None]).features[0].double().numpy()
    expected = []
    for book in causal.quantizer.vectors.double().numpy():
        expected.append(((rest[:, None] - book[None]) ** 2).sum(-1).argmin(1))
        rest = rest - book[expected[-1]]
    assert np.array_equal(causal.encode(wave, 24000).ids, expected)


def test_batched_is_single(each, waves):
    single = [each.encode(wave, 24000) for wave in waves]
    assert each.encode_batch(waves, 24000) == single
    for size in (3, 16):
        assert in_batches(each, [(wave, 24000) for wave in waves], size)[0] == single


def test_batched_is_single_with_near_ties(waves):
    """Twice the same code in a book: one of the two is nearest only by rounding, if at all."""
    tied = codec()
    with torch.no_grad():
        tied.quantizer.vectors[1, 1::2] = tied.quantizer.vectors[1, ::2] * (1 + 1e-6)
    single = [tied.encode(wave, 24000) for wave in waves]
    units, ties = in_batches(tied, [(wave, 24000) for wave in waves], 16)
    assert units == single
    assert ties > 100
    streams, ties = streamed_together(tied, [(wave, 24000) for wave in waves], 4, random.Random(0))
    assert streams == single
    assert ties > 100


@pytest.mark.parametrize("rate", [24000, 16000, 44100])
def test_streamed_is_offline(each, waves, rate):
    chance = random.Random(rate)
    for wave in waves:
        sound = wave if rate == 24000 else resample(wave, 24000, rate)
        with each.stream(rate) as stream:
            parts = [stream.push(piece) for piece in random_pieces(sound, rate, chance)]
            parts.append(stream.flush())
        assert Units.concatenate(parts) == each.encode(sound, rate)


def test_many_streams_are_offline(each, waves):
    units, _ = streamed_together(each, [(wave, 24000) for wave in waves], 4, random.Random(0))
    assert units == [each.encode(wave, 24000) for wave in waves]


def test_streams_wait_for_one_chunk(each):
    wave, chunk = noise(9000), 8 * 320
    with each.stream(24000) as stream:
        assert stream.latency_seconds == pytest.approx(chunk / 24000)
        assert len(stream.push(wave[: chunk - 1])) == 0
        assert len(stream.push(wave[chunk - 1 : chunk])) == 8
        assert len(stream.push(wave[chunk : 2 * chunk + 5])) == 8
        rest = stream.flush()
    assert rest.ends.tolist() == [2 * chunk + 5]


def test_a_stream_can_be_saved(each, waves):
    wave = waves[-1]
    stream = each.stream(24000)
    parts = [stream.push(wave[:10001])]
    saved = pickle.loads(pickle.dumps(stream.state()))
    lost = stream.push(wave[10001:])
    again = each.stream(24000)
    again.restore(saved)
    assert again.push(wave[10001:]) == lost
    parts += [lost, again.flush()]
    assert Units.concatenate(parts) == each.encode(wave, 24000)


# decoding


@torch.inference_mode()
def test_decoding_is_the_decoder_on_the_sum_of_codes(each):
    units = each.encode(noise(24001), 24000)
    frames = sum(book[ids] for book, ids in zip(each.quantizer.vectors, units.ids, strict=True))
    whole = each.decoder(frames[None])[0].numpy()
    assert whole.shape == (76 * 320,)
    assert np.abs(each.decode(units) - whole[:24001]).max() <= 1e-6 * np.abs(whole).max()


def test_streamed_sound_is_the_same_to_the_bit(each, waves):
    chance = random.Random(1)
    for wave in waves:
        units = each.encode(wave, 24000)
        stream, parts, at = each.decoder_stream(), [], 0
        while at < len(units):
            size = chance.randint(1, 20)
            piece = slice(at, at + size)
            part = Units(units.ids[:, piece], units.starts[piece], units.ends[piece], 24000, 32, units.fingerprint)
            parts.append(stream.push(part))
            other = each.decoder_stream()
            other.restore(pickle.loads(pickle.dumps(stream.state())))
            stream, at = other, at + size
        parts.append(stream.flush())
        assert np.array_equal(np.concatenate(parts), each.decode(units))


def test_sound_of_a_stream_comes_block_by_block(each):
    wave = noise(10000)
    stream, back = each.stream(24000), each.decoder_stream()
    sizes = [len(back.push(stream.push(wave[at : at + 1000]))) for at in range(0, 10000, 1000)]
    assert sizes == [0, 0, 2560, 0, 0, 2560, 0, 2560, 0, 0]
    assert len(back.push(stream.flush())) + len(back.flush()) == 10000 - 3 * 2560


def test_decoding_is_causal(causal):
    """Units from frame 16 on leave the sound of the frames before as it is, to the bit."""
    units = causal.encode(noise(10000), 24000)
    other = units.ids.copy()
    other[:, 16:] = (other[:, 16:] + 1) % 32
    changed = Units(other, units.starts, units.ends, 24000, 32, units.fingerprint)
    before, after = causal.decode(units), causal.decode(changed)
    assert np.array_equal(before[: 16 * 320], after[: 16 * 320])
    assert not np.array_equal(before[16 * 320 :], after[16 * 320 :])


def test_streams_of_sound_refuse(causal):
    units = causal.encode(noise(1000), 24000)
    with causal.decoder_stream() as stream:
        stream.push(units)
        with pytest.raises(InputError, match="ended with the units before"):
            stream.push(units)
        with pytest.raises(FingerprintError, match="take the tokenizer that made them"):
            stream.push(causal.with_codebooks(2).encode(noise(640), 24000))
        assert len(stream.flush()) == 1000
        with pytest.raises(InputError, match="open a new one"):
            stream.flush()
    with causal.decoder_stream() as stream:  # what was refused leaves no trace
        first, rest = (
            replace(units, ids=units.ids[:, part], starts=units.starts[part], ends=units.ends[part])
            for part in (slice(2), slice(2, None))
        )
        wave = stream.push(first)
        with pytest.raises(FormatError, match=f"an id is {causal.vocab_size}"):
            stream.push(replace(rest, ids=rest.ids * 0 + causal.vocab_size, vocab_size=2 * causal.vocab_size))
        with pytest.raises(FingerprintError, match="units of 2 codebooks"):
            stream.push(replace(rest, ids=rest.ids[:2]))
        wave = np.concatenate([wave, stream.push(rest), stream.flush()])
    assert np.array_equal(wave, causal.decode(units))
    other = codec(seed=1)
    with pytest.raises(FingerprintError, match="another tokenizer"):
        other.decoder_stream().restore(causal.decoder_stream().state())
    with pytest.raises(FingerprintError, match="tiny-codec"):
        other.decode(units)
    with pytest.raises(InputError, match="open a new one"):
        stream.push(units)


def test_tokenizers_without_decoder_say_so(tokenizer, clip_wave):
    units = tokenizer.encode(clip_wave, 16000)
    with pytest.raises(FormatError, match="mfcc-k100 has no decoder"):
        tokenizer.decode(units)
    with pytest.raises(FormatError, match="no decoder"):
        tokenizer.decoder_stream()
    with pytest.raises(FormatError, match="no decoder"):
        codec(decoder=False).decode(units)


def test_an_interrupted_push_ends_the_stream(causal, monkeypatch):
    units = causal.encode(noise(5120), 24000)
    stream = causal.decoder_stream()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(causal.decoder, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.push(units)
    with pytest.raises(InputError, match="a push failed"):
        stream.push(units)


# codebooks


def test_fewer_codebooks(causal):
    wave = noise(9999)
    units, two, one = (causal.with_codebooks(n).encode(wave, 24000) for n in (4, 2, 1))
    assert causal.with_codebooks(4) is causal
    assert np.array_equal(two.ids, units.ids[:2])
    assert np.array_equal(one.ids, units.ids[0])
    assert len({units.fingerprint, two.fingerprint, one.fingerprint}) == 3
    assert [causal.with_codebooks(n).bitrate for n in (1, 2, 4)] == [375, 750, 1500]
    assert causal.with_codebooks(2).name == "tiny-codec"
    assert causal.with_codebooks(3).with_codebooks(2).fingerprint == two.fingerprint
    for few, found in ((2, two), (1, one)):
        assert np.array_equal(causal.with_codebooks(few).decode(found), causal.decode(found))
    assert not np.array_equal(causal.decode(two), causal.decode(units))
    with pytest.raises(FingerprintError, match="4 codebooks"):
        causal.with_codebooks(2).decode(units)


@pytest.mark.parametrize("count", [0, 5, -1])
def test_impossible_numbers_of_codebooks(causal, count):
    with pytest.raises(InputError, match="4 codebooks"):
        causal.with_codebooks(count)


def test_one_codebook_is_all_there_is(tokenizer):
    assert tokenizer.with_codebooks(1) is tokenizer
    with pytest.raises(InputError, match="1 codebooks"):
        tokenizer.with_codebooks(2)


# bundles


def test_a_bundle_holds_the_whole_codec(each, tmp_path):
    each.save(tmp_path / "codec")
    names = {"tokenizer.json", "encoder.safetensors", "quantizer.safetensors", "decoder.safetensors"}
    assert {path.name for path in (tmp_path / "codec").iterdir()} == names
    again = hub.load(tmp_path / "codec")
    units = again.encode(noise(5000), 24000)
    assert units == each.encode(noise(5000), 24000)
    assert np.array_equal(again.decode(units), each.decode(units))
    assert again.describe() == each.describe()
    few = each.with_codebooks(2)
    few.save(tmp_path / "few")
    again = hub.load(tmp_path / "few")
    assert (again.fingerprint, again.codebooks) == (few.fingerprint, 2)


def test_units_do_not_depend_on_the_decoder(causal, tmp_path):
    without = codec(decoder=False)
    assert without.fingerprint == causal.fingerprint
    assert "decoder" not in without.describe()
    other = codec()
    with torch.no_grad():
        other.decoder.network.layers[0].conv.bias.add_(1)
    retrained = Tokenizer(other.encoder, other.quantizer, decoder=other.decoder, name="other", window=other.window)
    assert retrained.fingerprint == causal.fingerprint
    assert retrained.decoder_fingerprint != causal.decoder_fingerprint
    units = without.encode(noise(3000), 24000)
    assert not np.array_equal(retrained.decode(units), causal.decode(units))
    # In a folder that holds one of them the others are no replacement.
    causal.save(tmp_path / "bundle")
    for another in (retrained, without):
        with pytest.raises(OutputError, match="holds another tokenizer"):
            another.save(tmp_path / "bundle")
    assert speechtok.load(tmp_path / "bundle").decoder_fingerprint == causal.decoder_fingerprint


def test_damaged_bundles(causal, tmp_path):
    whole = causal.save(tmp_path / "whole")
    retrained = codec()
    with torch.no_grad():
        retrained.decoder.network.layers[0].conv.bias.add_(1)

    def copy(name):
        return shutil.copytree(whole, tmp_path / name)

    exchanged = copy("exchanged")
    retrained.save(tmp_path / "retrained")
    shutil.copy(tmp_path / "retrained" / "decoder.safetensors", exchanged)
    with pytest.raises(FingerprintError, match="decoder_fingerprint"):
        hub.load(exchanged)
    missing = copy("missing")
    (missing / "decoder.safetensors").unlink()
    with pytest.raises(FormatError, match=r"decoder.safetensors cannot be read"):
        hub.load(missing)
    for change, message in (
        ({"decoder": "hifigan"}, "no decoder has the type 'hifigan'"),
        ({"decoder": 3}, "malformed"),
        ({"decoder_config": {"colour": 1}}, "unknown fields colour"),
        ({"decoder_config": {"upsampling_ratios": 4}}, "cannot be built"),
        ({"decoder_config": {}}, "missing"),
        ({"quantizer_config": []}, "quantizer_config"),
        ({"quantizer_config": {"codebooks": 9}}, "9"),
        ({"encoder_config": {"num_filters": 0}}, "num_filters=0"),
    ):
        folder = copy(f"changed{random.random()}")
        text = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(text | change))
        with pytest.raises((FormatError, CheckpointError), match=message):
            hub.load(folder)


def test_made_of_trained_parts(tmp_path):
    """Networks with weight norm and a quantizer as training leaves them."""
    torch.manual_seed(0)
    config = SeanetConfig(**CAUSAL)
    encoder, decoder = SeanetEncoder(config), SeanetDecoder(config)
    vq = ResidualVQ(16, 2, 8)
    wave = torch.from_numpy(noise(24000))
    vq(encoder(wave[None, None]).transpose(1, 2))  # starts the codebooks
    plain = SeanetFrames(config, weights=encoder.state_dict())
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            torch.nn.utils.parametrizations.weight_norm(module)
    made = Tokenizer(
        SeanetFrames(config, weights=encoder.state_dict()), ResidualQuantizer.freeze(vq),
        decoder=SeanetWaves(config, weights=decoder.state_dict()), name="made",
    )  # fmt: skip
    with torch.inference_mode():
        expected = encoder.eval()(wave[None, None]).transpose(1, 2)
        torch.testing.assert_close(made.encoder(wave[None]).features, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(plain(wave[None]).features, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(made.decoder(expected), decoder.eval()(expected.transpose(1, 2))[:, 0])
    made.save(tmp_path)
    assert hub.load(tmp_path).fingerprint == made.fingerprint
    with pytest.raises(CheckpointError, match="missing"):
        SeanetFrames(config, weights=decoder.state_dict())


def test_parts_that_do_not_fit(causal):
    quantizer = causal.quantizer
    wider = SeanetWaves(SeanetConfig(**{**CAUSAL, "hidden_size": 8}))
    slower = SeanetWaves(SeanetConfig(**CAUSAL, upsampling_ratios=(8, 5, 4)))
    other_rate = SeanetWaves(SeanetConfig(**CAUSAL, sample_rate=16000))
    for decoder, message in ((wider, "frame size 16, the decoder 8"), (slower, "hop"), (other_rate, "sample rate")):
        with pytest.raises(FormatError, match=message):
            Tokenizer(causal.encoder, quantizer, decoder=decoder, name="x")
    directions = KMeans(np.eye(16, dtype=np.float32), spherical=True)
    torch.manual_seed(0)
    for quantizer in (directions, MlpQuantizer(UnitMlp(16, (4,), 3))):
        with pytest.raises(FormatError, match="do not tell whole frames"):
            Tokenizer(causal.encoder, quantizer, decoder=causal.decoder, name="x")
        with pytest.raises(FormatError, match="frame"):
            quantizer.decode(torch.zeros(1, 1, 4, dtype=torch.int32))
    for encoder, decoder in ((causal.encoder, causal.decoder), (codec(**PUBLISHED).encoder, None)):
        with pytest.raises(FormatError, match="segments"):
            Tokenizer(encoder, ResidualQuantizer(np.ones((1, 2, 16))), segmenter=Greedy(), decoder=decoder, name="x")
    with pytest.raises(InputError, match="no layers"):
        SeanetFrames(SeanetConfig(**CAUSAL), 3)
    for config in (
        {"audio_channels": 2},
        {"use_causal_conv": False},
        {"norm_type": "time_group_norm"},
        {"trim_right_ratio": 0.0},
    ):
        with pytest.raises(CheckpointError, match="cannot be part of a tokenizer"):
            SeanetWaves(SeanetConfig(**config))


def test_windows_of_recurrent_encoders_come_in_order():
    published = codec(**PUBLISHED)
    windows = list(published.windows(noise(60000), 24000))
    assert len(windows) > 1
    with pytest.raises(InputError, match="encode_windows"):
        published.encode_batch_of_windows(windows)
    assert published.encoder.exact_stream
    assert published.encoder.chunked
    assert (
        codec(window=WindowRule(30.0, 3.0), **PUBLISHED).encode(noise(60000), 24000).ids.tolist()
        == published.encode(noise(60000), 24000).ids.tolist()
    )


def test_nan_weights_are_told(causal):
    broken = codec()
    with torch.no_grad():
        broken.encoder.network.layers[0].conv.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        broken.encode(noise(1000), 24000)
    with pytest.raises(AudioError, match="NaN"):
        causal.encode(np.array([0, np.nan], np.float32), 24000)


# published codecs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    small = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "target_bandwidths": [1.5]}
    model = EncodecModel(EncodecConfig(**small)).eval()
    for book, layer in enumerate(model.quantizer.layers):
        layer.codebook.embed.normal_(0, 0.1 * 0.7**book)
    folder = tmp_path_factory.mktemp("encodec")
    model.save_pretrained(folder)
    return folder, model


@torch.inference_mode()
def test_published_encodec_by_name(checkpoint, monkeypatch):
    folder, model = checkpoint
    asked = []
    monkeypatch.setattr("speechtok.codecs.encodec.download", lambda *args: asked.append(args) or folder)
    loaded = hub.load("facebook/encodec_24khz")
    assert asked == [("facebook/encodec_24khz", "main")]
    assert (loaded.name, loaded.codebooks, loaded.encoder.recurrent) == ("facebook/encodec_24khz", 4, True)
    wave = noise(24001)
    units = loaded.encode(wave, 24000)
    encoded = model.encode(torch.from_numpy(wave)[None, None], bandwidth=1.5)
    assert np.array_equal(units.ids, encoded.audio_codes[0, 0].numpy())
    expected = model.decode(encoded.audio_codes, encoded.audio_scales).audio_values[0, 0].numpy()
    assert np.abs(loaded.decode(units) - expected[:24001]).max() <= 1e-4


def test_a_folder_of_encodec_is_a_tokenizer(checkpoint, tmp_path):
    folder, _ = checkpoint
    loaded = hub.load(folder)
    assert loaded.name == str(folder)
    two = loaded.with_codebooks(2)
    two.save(tmp_path / "bundle")
    assert hub.load(tmp_path / "bundle").encode(noise(5000), 24000) == two.encode(noise(5000), 24000)
    stereo = tmp_path / "stereo"
    shutil.copytree(folder, stereo)
    description = json.loads((stereo / "config.json").read_text())
    change = {"chunk_length_s": 1.0, "overlap": 0.01, "normalize": True}
    (stereo / "config.json").write_text(json.dumps(description | change))
    with pytest.raises(CheckpointError, match="need scales"):
        hub.load(stereo)


def test_known_names_hold_the_codecs():
    with pytest.raises(UnknownNameError, match="facebook/encodec_24khz"):
        hub.load("encodec_nonsense")
