"""Fixtures that many tests share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechtok.audio.compat import import_torchaudio

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# transformers imports torchaudio, which may need help to load.
import_torchaudio()


def pytest_collection_modifyitems(items):
    """Make order and threads boring: one test module never inherits another one's thread count."""
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real speech, music and noise; not part of a checkout."""
    if not (SHARED / "speech").is_dir():
        pytest.skip("the shared data folder with real speech is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def torchrun() -> Callable[[str], None]:
    """Runs code in two processes of a gloo group; `Path` is imported."""

    def run(code: str) -> None:
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-c"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        whole = [sys.executable, "-m", *command, f"from pathlib import Path; {code}"]
        done = subprocess.run(whole, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-8000:]

    return run


@pytest.fixture(scope="session")
def clips() -> Path:
    return ROOT / "assets" / "clips"


@pytest.fixture(scope="session")
def clip(clips) -> Path:
    return clips / "librispeech-1688-142285-0004.flac"


@pytest.fixture(scope="session")
def clip_wave(clip) -> np.ndarray:
    return soundfile.read(clip, dtype="float32")[0]


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped default."""
    import speechtok

    return speechtok.load("mfcc-k100")


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
STEM = {"conv_dim": [24] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def tiny_encoder(kind: str, seed: int = 0):
    """A small random bidirectional encoder: hubert and wavlm have the group-norm front end."""
    import torch

    from speechtok.encoders.pretrained import build

    torch.manual_seed(seed)
    encoder = build(kind, TINY | ({} if kind == "w2v_bert" else STEM), TINY["num_hidden_layers"])
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.uniform_(0.2, 1.0)
    return encoder


def tiny_tokenizer(kind: str, wave: np.ndarray):
    """A tokenizer whose frames depend on the whole window: a random encoder and 50 of its frames as centroids."""
    import torch

    from speechtok.frames import WindowRule
    from speechtok.quantizers.kmeans import KMeans
    from speechtok.tokenizer import Tokenizer

    encoder = tiny_encoder(kind)
    with torch.inference_mode():
        frames = encoder(torch.from_numpy(wave)[None]).features[0]
    return Tokenizer(encoder, KMeans(frames[::4][:50].numpy()), name=f"tiny-{kind}", window=WindowRule(2.0, 0.3))


@pytest.fixture(scope="session")
def bidirectional(clip_wave):
    return tiny_tokenizer("hubert", clip_wave)


CHUNKED = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_depthwise_kernel_size": 15,
    "normalization": "stored",
    "attention_chunk": 8,
    "attention_past": 16,
    "look_ahead": 3,
}


def chunked_tokenizer(wave: np.ndarray, seconds: float = 5.0, kind=None, **changes):
    """A tokenizer that streams exactly: a random encoder in chunks and 200 of its frames as centroids."""
    import torch

    from speechtok.encoders.w2v_bert import W2vBertEncoder
    from speechtok.encoders.w2v_bert_config import W2vBertConfig
    from speechtok.frames import WindowRule
    from speechtok.quantizers.kmeans import KMeans
    from speechtok.tokenizer import Tokenizer

    torch.manual_seed(0)
    encoder = (kind or W2vBertEncoder)(W2vBertConfig(**(CHUNKED | changes))).eval()
    with torch.inference_mode():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.uniform_(0.2, 1.0)
        mel = encoder.filter_bank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))[0][0]
        encoder.feature_mean.copy_(mel.mean(0))
        encoder.feature_scale.copy_(1 / mel.std(0))
        frames = encoder(torch.from_numpy(wave)[None]).features[0].numpy()
    chosen = np.random.default_rng(0).permutation(len(frames))[:200]
    return Tokenizer(encoder, KMeans(frames[chosen]), name="tiny-chunked", window=WindowRule(seconds, 0.3))


@pytest.fixture(scope="session")
def chunked(clip_wave):
    return chunked_tokenizer(clip_wave)


def frames_of(encoder, wave: np.ndarray) -> np.ndarray:
    """Frames of a whole wave in one pass, float32 [T, D]."""
    import torch

    with torch.inference_mode():
        frames: np.ndarray = encoder(torch.from_numpy(wave)[None]).features[0].numpy()
    return frames


def segmented(base, wave: np.ndarray, kind: str = "greedy", *, silence_gap=1, spherical=False, window=None):
    """A segment tokenizer with the encoder of another; thresholds and centroids are drawn from the frames of a wave."""
    from speechtok.quantizers.kmeans import KMeans
    from speechtok.segmenters import Greedy, NormPeaks
    from speechtok.segmenters.pool import pool
    from speechtok.tokenizer import Tokenizer

    frames = frames_of(base.encoder, wave)
    norms = np.linalg.norm(frames, axis=1)
    alike = (frames[1:] * frames[:-1]).sum(1) / (norms[1:] * norms[:-1])
    # No whole share: a threshold that is one of the frames' own values would make a tie of it.
    greedy = Greedy(float(np.quantile(norms, 0.513)), float(np.quantile(alike, 0.313)))
    segmenter = greedy if kind == "greedy" else NormPeaks()
    means = pool(frames, segmenter.segment(frames)[0])[:80]
    if spherical:
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    return Tokenizer(
        base.encoder, KMeans(means, spherical=spherical), name=f"{base.name}-{kind}", segmenter=segmenter,
        silence_gap=silence_gap if kind == "greedy" else None, window=window or base.window,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bases(clip_wave):
    """An encoder of each kind: bounded context, chunks, unbounded context."""
    from speechtok.encoders.mfcc import MfccEncoder
    from speechtok.frames import WindowRule
    from speechtok.quantizers.kmeans import KMeans
    from speechtok.tokenizer import Tokenizer

    mfcc = Tokenizer(MfccEncoder(), KMeans(np.zeros((2, 39))), name="mfcc", window=WindowRule(5.0, 0.3))
    return {
        "mfcc": mfcc,
        "chunked": chunked_tokenizer(clip_wave),
        "bidirectional": tiny_tokenizer("hubert", clip_wave),
    }


@pytest.fixture(scope="session", params=["mfcc", "chunked", "bidirectional"])
def any_base(request, bases):
    return bases[request.param]


@pytest.fixture(scope="session", params=["greedy", "norm_peaks"])
def by_segments(request, any_base, clip_wave):
    """Segment tokenizers of every kind of encoder."""
    return segmented(any_base, clip_wave, request.param)


@pytest.fixture(scope="session")
def long_wave(clips) -> np.ndarray:
    """All clips one behind the other, 23 s."""
    from speechtok.audio.decode import load

    return np.concatenate([load(path, 16000) for path in sorted(clips.iterdir())])


@pytest.fixture(scope="session")
def speech_files(shared) -> list[Path]:
    """200 real files of mixed length and corpus, the same in every run."""
    files = sorted(
        path for path in (shared / "speech" / "eval").rglob("*") if path.suffix in {".flac", ".opus", ".mp3"}
    )
    chosen = np.random.default_rng(0).permutation(len(files))[:200]
    return [files[i] for i in sorted(chosen)]
