"""Batched equals single: a file's units do not depend on its batch mates, the batch size or the threads."""

import numpy as np
import pytest
import torch

from speechtok.tokenizer import Tokenizer

from ..conftest import tiny_tokenizer


def in_batches(tokenizer: Tokenizer, jobs, size):
    parts = {}
    ties = 0
    for begin in range(0, len(jobs), size):
        batch = jobs[begin : begin + size]
        for (index, _, _), encoded in zip(
            batch, tokenizer.encode_batch_of_windows([j[1:] for j in batch]), strict=True
        ):
            parts.setdefault(index, []).append(encoded)
            ties += encoded.ties
    return [tokenizer.assemble(parts[i]) for i in sorted(parts)], ties


@pytest.fixture(params=["mfcc", "hubert", "wavlm", "w2v_bert"])
def any_tokenizer(request, tokenizer, clip_wave):
    return tokenizer if request.param == "mfcc" else tiny_tokenizer(request.param, clip_wave)


def test_real_files_in_batches_of_1_4_16(any_tokenizer, speech_files, record_property):
    jobs = [(i, window, wave) for i, path in enumerate(speech_files) for window, wave in any_tokenizer.windows(path)]
    single, ties = in_batches(any_tokenizer, jobs, 1)
    record_property("near-ties", ties)
    for size in (4, 16):
        batched, _ = in_batches(any_tokenizer, jobs, size)
        different = [speech_files[i].name for i, (a, b) in enumerate(zip(single, batched, strict=True)) if a != b]
        assert not different
    frames = sum(len(units) for units in single)
    # Frames of the random encoder lie close together; real ones are a hundred times less often near a border.
    assert ties < 0.05 * frames, "the near-tie rule must stay the exception"


def test_threads_and_pools_do_not_matter(any_tokenizer, clips):
    files = sorted(clips.iterdir())
    expected = [any_tokenizer.encode(path) for path in files]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert [any_tokenizer.encode(path) for path in files] == expected
    finally:
        torch.set_num_threads(threads)
    for seconds in (0.1, 3.0, 500.0):
        assert any_tokenizer.encode_batch(files, batch_seconds=seconds) == expected


def test_near_ties_are_decided_alike(bidirectional, clip_wave):
    """Centroids made so that many frames lie within rounding of a border: every batch still agrees."""
    from speechtok.quantizers.kmeans import KMeans

    with torch.inference_mode():
        frames = bidirectional.encoder(torch.from_numpy(clip_wave[:32000])[None]).features[0]
    rng = np.random.default_rng(0)
    # Pairs of centroids at equal distance from a real frame: the frame sits on the border between them.
    direction = rng.standard_normal((len(frames), frames.shape[1])).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) * 100
    pairs = np.concatenate([frames.numpy() + direction, frames.numpy() - direction])
    tied = Tokenizer(bidirectional.encoder, KMeans(pairs), name="tied", window=bidirectional.window)
    jobs = [(i, *next(iter(tied.windows(clip_wave[: 32000 - 320 * i], 16000)))) for i in range(5)]
    single, ties = in_batches(tied, jobs, 1)
    assert ties > 50
    for size in (2, 5):
        assert in_batches(tied, jobs, size)[0] == single


def test_long_files_do_not_depend_on_memory_or_batch(bidirectional, tokenizer, clips):
    """The window grid is fixed; only batch_seconds may vary."""
    from speechtok.audio.decode import load

    wave = np.concatenate([load(path, 16000) for path in sorted(clips.iterdir())] * 2)
    for each in (bidirectional, tokenizer):
        expected = each.encode(wave, 16000)
        for seconds in (1.0, 1000.0):
            assert each.encode_batch([wave, wave[:9000]], 16000, batch_seconds=seconds)[0] == expected
