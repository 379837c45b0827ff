"""What `speechtok models` says of tokenizers whose units are segments."""

import numpy as np
from speechtok.cli import app
from typer.testing import CliRunner

from speechtok import registry
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.quantizers.kmeans import KMeans
from speechtok.segmenters import Greedy
from speechtok.tokenizer import Tokenizer


def test_segments_have_no_rate(tmp_path, monkeypatch):
    quantizer = KMeans(np.eye(39, dtype=np.float32)[:8])
    for name, segmenter in (("segments", Greedy()), ("frames", None)):
        gap = None if segmenter is None else 7
        tokenizer = Tokenizer(MfccEncoder(), quantizer, name=name, segmenter=segmenter, silence_gap=gap)
        tokenizer.save(tmp_path / name)
    monkeypatch.setattr(registry, "shipped", lambda: {name: tmp_path / name for name in ("segments", "frames")})
    segments, frames, *_ = registry.describe_all()
    assert (segments["rate"], segments["bitrate"], segments["vocab_size"]) == (None, None, 9)
    assert (frames["rate"], frames["bitrate"], frames["vocab_size"]) == (100, 300, 8)
    shown = CliRunner().invoke(app, ["models"], catch_exceptions=False)
    assert shown.exit_code == 0
    (line,) = [line for line in shown.stdout.splitlines() if "segments" in line]
    assert line.count(" - ") >= 3  # layer, rate, bit rate
