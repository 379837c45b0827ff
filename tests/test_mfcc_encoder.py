"""MFCC as an encoder: frame counts, batches, and the claim about its context."""

import pytest
import torch

from speechtok.encoders.mfcc import MfccConfig, MfccEncoder
from speechtok.errors import AudioError, InputError
from speechtok.frames import Context


@pytest.fixture
def encoder() -> MfccEncoder:
    return MfccEncoder()


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))


def test_facts(encoder: MfccEncoder) -> None:
    assert (encoder.type, encoder.dim, encoder.layer, encoder.context) == ("mfcc", 39, None, Context(4, 4))
    assert (encoder.sample_rate, encoder.hop, encoder.receptive_field, encoder.look_ahead) == (16000, 160, 400, 640)
    assert encoder.exact_stream
    assert encoder.config_dict() == {"sample_rate": 16000}
    assert not encoder.state_dict()


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 0), (399, 0), (400, 1), (401, 1), (559, 1), (560, 2)])
def test_frame_counts(encoder: MfccEncoder, samples: int, frames: int) -> None:
    out = encoder(noise(samples))
    assert out.features.shape == (1, frames, 39)
    assert out.lengths.tolist() == [frames] == [encoder.grid.num_frames(samples)]
    assert out.features.isfinite().all()


def test_a_row_is_the_same_alone_and_in_a_batch(encoder: MfccEncoder) -> None:
    lengths = [16000, 9999, 1000, 400, 399, 0]
    batch = torch.full((len(lengths), 16000), 9.0)
    for row, length in enumerate(lengths):
        batch[row, :length] = noise(length, row)[0]
    out = encoder(batch, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = encoder(noise(length, row))
        count = int(alone.lengths)
        assert out.lengths[row] == count
        assert torch.allclose(out.features[row, :count], alone.features[0], rtol=0, atol=1e-5)
        assert out.features[row, count:].abs().sum() == 0


@pytest.mark.parametrize("frame", [0, 3, 20, 57])
def test_a_frame_depends_on_nothing_beyond_its_context(encoder: MfccEncoder, frame: int) -> None:
    wave = noise(encoder.grid.num_samples(58))
    first = max(0, frame - encoder.context.left) * encoder.hop
    last = min(57, frame + encoder.context.right) * encoder.hop + encoder.receptive_field
    other = noise(wave.shape[1], seed=1)
    other[:, first:last] = wave[:, first:last]
    changed = (encoder(other).features - encoder(wave).features)[0].abs().amax(-1)
    assert changed[frame] <= 1e-6
    if frame == 20:  # one frame further there is a dependence: the claim is not too wide
        other[:, first : first + encoder.hop] += 0.1 * torch.randn(160, generator=torch.Generator().manual_seed(2))
        assert (encoder(other).features - encoder(wave).features)[0, frame].abs().max() > 1e-4


def test_windows_with_context_give_the_frames_of_the_whole(encoder: MfccEncoder) -> None:
    total, core = 98, 25
    wave = noise(encoder.grid.num_samples(total))
    whole = encoder(wave).features[0]
    pieces = []
    for first in range(0, total, core):
        begin, end = max(0, first - encoder.context.left), min(total, first + core + encoder.context.right)
        window = wave[:, begin * encoder.hop : (end - 1) * encoder.hop + encoder.receptive_field]
        pieces.append(encoder(window).features[0, first - begin : first - begin + core])
    assert torch.allclose(torch.cat(pieces), whole, rtol=0, atol=1e-5)


def test_errors_say_what_to_do(encoder: MfccEncoder) -> None:
    with pytest.raises(InputError, match="no layers"):
        MfccEncoder(layer=1)
    with pytest.raises(InputError, match="resample"):
        MfccConfig(sample_rate=8000)
    with pytest.raises(AudioError):
        encoder(torch.zeros(400))
