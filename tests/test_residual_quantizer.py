"""The frozen residual quantizer: ids, margins and frames of ids, in both forms."""

import json

import numpy as np
import pytest
import torch
from transformers import DacConfig, EncodecConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

from speechtok.errors import FormatError, InputError
from speechtok.metrics.bitrate import nominal
from speechtok.nn.residual_vq import ResidualVQ
from speechtok.quantizers.kmeans import KMeans
from speechtok.quantizers.residual import ResidualQuantizer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain(k=4, v=30, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ResidualQuantizer(torch.randn(k, v, d, generator=generator) * 0.7 ** torch.arange(k)[:, None, None])


def factorized(k=4, v=30, d=6, c=3, seed=0):
    torch.manual_seed(seed)
    return ResidualQuantizer.freeze(ResidualVQ(d, k, v, code_dim=c))


FORMS = pytest.mark.parametrize("make", [plain, factorized])


def test_equals_transformers_encodec():
    torch.manual_seed(0)
    theirs = EncodecResidualVectorQuantizer(EncodecConfig())
    for layer in theirs.layers:  # zeros by default, where nothing would be compared
        layer.codebook.embed.copy_(torch.randn(1024, 128))
    ours = ResidualQuantizer(torch.stack([layer.codebook.embed for layer in theirs.layers]))
    x = 2 * torch.randn(2, 50, 128)
    for books, bandwidth in ((32, 24.0), (8, 6.0)):
        codes = theirs.encode(x.transpose(1, 2), bandwidth)
        ids = ours.first(books)(x).ids
        assert ids.dtype == torch.int32 and torch.equal(ids.long().transpose(0, 1), codes)
        torch.testing.assert_close(ours.decode(ids), theirs.decode(codes).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_equals_transformers_dac():
    torch.manual_seed(0)
    theirs = DacResidualVectorQuantizer(DacConfig(hidden_size=32, n_codebooks=5, codebook_size=200)).eval()
    layers = theirs.quantizers
    ours = ResidualQuantizer(
        *[
            torch.stack(tensors).detach()
            for tensors in (
                [q.codebook.weight for q in layers],
                [q.in_proj.weight[..., 0] for q in layers],
                [q.in_proj.bias for q in layers],
                [q.out_proj.weight[..., 0] for q in layers],
                [q.out_proj.bias for q in layers],
            )
        ]
    )
    x = 3 * torch.randn(2, 70, 32)
    with torch.no_grad():
        quantized, codes, *_ = theirs(x.transpose(1, 2))
    found = ours(x)
    assert torch.equal(found.ids.long(), codes)
    torch.testing.assert_close(ours.decode(found.ids), quantized.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("code_dim", [None, 3])
def test_frozen_is_what_was_trained(code_dim):
    torch.manual_seed(0)
    vq = ResidualVQ(6, 4, 16, code_dim=code_dim)
    x = torch.randn(3, 40, 6)
    if code_dim is None:
        with pytest.raises(InputError, match="not been started"):
            ResidualQuantizer.freeze(vq)
    for _ in range(5):
        vq(torch.randn(3, 40, 6))
    quantizer = ResidualQuantizer.freeze(vq)
    codes = quantizer(x)
    assert torch.equal(codes.ids, vq.encode(x)) and codes.margins.shape == (3, 40)
    torch.testing.assert_close(quantizer.decode(codes.ids), vq.decode(codes.ids), rtol=0, atol=1e-6)
    # A copy: training goes on without it.
    before = quantizer.decode(codes.ids)
    with torch.no_grad():
        vq.books.codebook += 1
    assert torch.equal(quantizer.decode(codes.ids), before)
    assert ResidualQuantizer.freeze(vq, 2).codebooks == 2


def test_one_book_is_kmeans():
    torch.manual_seed(0)
    centroids, x = torch.randn(20, 5), torch.randn(2, 100, 5)
    one, kmeans = ResidualQuantizer(centroids[None])(x), KMeans(centroids)(x)
    assert torch.equal(one.ids, kmeans.ids)
    torch.testing.assert_close(one.margins, kmeans.margins)


@FORMS
def test_first_books(make):
    quantizer = make()
    x = torch.randn(2, 60, 6)
    codes = quantizer(x)
    for n in (1, 3, 4):
        fewer = quantizer.first(n)
        found = fewer(x)
        assert fewer.codebooks == n and torch.equal(found.ids, codes.ids[:, :n])
        assert bool((found.margins >= codes.margins).all())
        torch.testing.assert_close(fewer.decode(found.ids), quantizer.decode(codes.ids[:, :n]))
    for n in (0, 5):
        with pytest.raises(FormatError, match="there are 4"):
            quantizer.first(n)


@FORMS
def test_ids_are_decoded_book_by_book(make):
    quantizer = make()
    ids = torch.randint(30, (2, 4, 9))
    total = sum(
        quantizer.decode(torch.cat((torch.zeros_like(ids[:, :q]), ids[:, q : q + 1]), 1))
        - (quantizer.decode(torch.zeros_like(ids[:, :q])) if q else 0)
        for q in range(4)
    )
    assert quantizer.decode(ids).dtype == torch.float32
    torch.testing.assert_close(quantizer.decode(ids), total, rtol=1e-5, atol=1e-5)
    assert quantizer.decode(ids[..., :0]).shape == (2, 0, 6)


@FORMS
def test_margins_are_what_a_frame_can_move(make):
    """No change below the margin flips an id of any book; the margins are not idle either."""
    quantizer = make()
    torch.manual_seed(5)
    x = torch.randn(1, 500, 6) * torch.logspace(-1, 1, 500)[None, :, None]
    codes = quantizer(x)
    room = codes.margins[0] * x[0].norm(dim=1)
    flipped = torch.zeros(500, dtype=torch.bool)
    for _ in range(60):
        way = torch.nn.functional.normalize(torch.randn(500, 6), dim=1) * room[:, None]
        assert torch.equal(quantizer(x + 0.999 * way).ids, codes.ids)
        flipped |= (quantizer(x + 6 * way).ids != codes.ids).any((0, 1))
    assert flipped.float().mean() > 0.6


def test_margins_know_how_far_projections_lengthen_a_move():
    """The same frames, a thousandth as long, behind projections that undo it: the relative margins stay."""
    one = factorized()
    tensors = dict(one.state_dict())
    tensors["in_weight"] = tensors["in_weight"] * 1000
    tensors["out_weight"], tensors["out_bias"] = tensors["out_weight"] / 1000, tensors["out_bias"] / 1000
    x = torch.randn(2, 50, 6)
    expected, found = one(x), ResidualQuantizer.from_tensors(tensors)(x / 1000)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.margins, expected.margins, rtol=1e-3, atol=1e-6)


@FORMS
def test_a_frame_does_not_depend_on_its_batch(make):
    quantizer = make()
    x = torch.randn(5, 80, 6)
    whole = quantizer(x).ids
    for row in range(5):
        assert torch.equal(quantizer(x[row : row + 1, 10:50]).ids[0], whole[row, :, 10:50])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x).ids, whole)
    assert quantizer(x[:, :0]).ids.shape == (5, 4, 0)


@FORMS
def test_saved_and_rebuilt(make):
    quantizer = make()
    config = json.loads(json.dumps(quantizer.config_dict()))
    again = ResidualQuantizer.from_tensors(dict(quantizer.state_dict()), **config)
    x = torch.randn(2, 40, 6)
    assert torch.equal(again(x).ids, quantizer(x).ids) and torch.equal(again(x).margins, quantizer(x).margins)
    assert again.config_dict() == config and set(again.state_dict()) == set(quantizer.state_dict())
    assert f"dim={quantizer.dim}" in repr(again)
    for wrong in ({"codebooks": 3}, {"codes": 31}, {"dim": 7}, {"code_dim": 4}, {"other": 1}):
        with pytest.raises(FormatError, match="the configuration says"):
            ResidualQuantizer.from_tensors(dict(quantizer.state_dict()), **wrong)


def test_eight_books_of_1024_codes_are_6_kilobits():
    quantizer = plain(8, 1024, 4)
    assert nominal(75, quantizer.vocab_size, quantizer.codebooks) == 6000
    assert nominal(75, quantizer.vocab_size, quantizer.first(2).codebooks) == 1500


PARTS = {name: tensor.numpy() for name, tensor in factorized(2, 5, 4, 3).state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": np.zeros((2, 5))}, "codebooks has shape"),
        ({"vectors": np.zeros((2, 0, 3))}, "codebooks has shape"),
        ({"vectors": np.full((2, 5, 3), np.nan)}, "NaN"),
        ({"vectors": np.zeros((2, 5, 4))}, "in_weight has shape"),
        ({"in_weight": np.zeros((1, 3, 4))}, "in_weight has shape"),
        ({"in_bias": np.zeros((2, 4))}, "in_bias has shape"),
        ({"out_weight": np.zeros((2, 3, 4))}, "out_weight has shape"),
        ({"out_bias": np.full((2, 4), np.inf)}, "out_bias holds"),
        ({"out_bias": None}, "go together"),
    ],
)
def test_bad_tensors_are_refused(changes, message):
    parts = {**PARTS, **changes}
    with pytest.raises(FormatError, match=message):
        ResidualQuantizer(parts.pop("vectors"), **parts)


def test_bad_frames_ids_and_files_are_refused():
    quantizer = plain()
    for call, message in (
        (lambda: quantizer(torch.zeros(1, 4, 5)), "dimensions"),
        (lambda: quantizer.decode(torch.zeros(1, 5, 3, dtype=torch.int64)), "at most 4"),
        (lambda: quantizer.decode(torch.zeros(4, 3, dtype=torch.int64)), "at most 4"),
        (lambda: quantizer.decode(torch.full((1, 4, 3), 30)), "from 0 to 29"),
        (lambda: quantizer.decode(torch.full((1, 4, 3), -1)), "from 0 to 29"),
        (lambda: ResidualQuantizer.from_tensors({"other": torch.zeros(2, 2)}), "holds 'vectors'"),
        (lambda: ResidualQuantizer(np.zeros((2, 3, 4)), used=3), "there are 2"),
    ):
        with pytest.raises(FormatError, match=message):
            call()
