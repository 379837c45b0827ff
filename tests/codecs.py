"""Small random codecs for tests."""

import numpy as np
import torch

from speechtok.codecs.seanet import SeanetWaves
from speechtok.encoders.seanet import SeanetFrames
from speechtok.frames import WindowRule
from speechtok.nn.seanet import SeanetConfig
from speechtok.quantizers.residual import ResidualQuantizer
from speechtok.tokenizer import Tokenizer

WINDOW = WindowRule(1.0, 0.1)
# Frames of a bounded past, as codec-mini has; and as published: an LSTM, and mirrored padding.
CAUSAL = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 0, "pad_mode": "constant"}
PUBLISHED = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 2, "pad_mode": "reflect"}


def codec(*, codebooks=4, name="tiny-codec", window=WINDOW, seed=0, decoder=True, **config):
    """A codec with random weights whose codebooks are noise, ever finer, around what its frames are."""
    torch.manual_seed(seed)
    settings = SeanetConfig(**{**CAUSAL, **config})
    encoder, waves = SeanetFrames(settings), SeanetWaves(settings)
    with torch.inference_mode():
        frames = encoder(torch.randn(1, 24000) * 0.1).features[0]
        books = [
            frames.mean(0) * (book == 0) + frames.std(0) * torch.randn(32, 16) * 0.7**book for book in range(codebooks)
        ]
    quantizer = ResidualQuantizer(torch.stack(books))
    return Tokenizer(encoder, quantizer, decoder=waves if decoder else None, name=name, window=window)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a slow envelope, float32 [samples]."""
    wave = np.random.default_rng(seed).standard_normal(samples) * (0.15 + 0.1 * np.sin(np.arange(samples) / 2000))
    return wave.astype(np.float32)
