"""The trainable residual quantizer: identities, moving averages, gradients, dead codes, dropout, resume, processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

from speechtok.errors import InputError
from speechtok.nn.codebooks import kmeans
from speechtok.nn.residual_vq import ResidualVQ, codebook_use


def frames(seed, batch=4, length=64, dim=8):
    """Frames float32 [B, T, D] that are not one Gaussian: rows of a fixed random map of a few factors."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3, dim, generator=torch.Generator().manual_seed(99))
    return torch.randn(batch, length, 3, generator=generator).tanh() @ mixing + 0.1 * torch.randn(
        batch, length, dim, generator=generator
    )


def trained(steps=40, *, dim=8, codebooks=4, codes=16, **options):
    torch.manual_seed(0)
    vq = ResidualVQ(dim, codebooks, codes, **options)
    for step in range(steps):
        torch.manual_seed(step)
        vq(frames(step, dim=dim))
    return vq


# -- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code_dim", [None, 3])
def test_codes_and_what_is_left_make_the_frame(code_dim):
    vq = trained(code_dim=code_dim).eval()
    x = frames(1000)
    out = vq(x)
    assert out.ids.dtype == torch.int32 and out.ids.shape == (4, 4, 64)
    assert torch.equal(vq.encode(x), out.ids)
    torch.testing.assert_close(vq.decode(out.ids), out.quantized, rtol=0, atol=1e-6)
    total, left = torch.zeros_like(x), x
    for n in range(1, 5):
        # What book n adds, found from its ids alone, with the ids of the others held at 0.
        zero = torch.zeros_like(out.ids[:, :n])
        alone = torch.cat((zero[:, :-1], out.ids[:, n - 1 : n]), 1)
        code = vq.decode(alone) - (vq.decode(zero[:, :-1]) if n > 1 else 0)
        total, left = total + code, left - code
        assert torch.equal(vq.encode(x, n), out.ids[:, :n])
        torch.testing.assert_close(vq.decode(out.ids[:, :n]), total, rtol=0, atol=3e-6)
        torch.testing.assert_close(vq(x, use=torch.full((4,), n)).quantized, total, rtol=0, atol=3e-6)
    torch.testing.assert_close(x - out.quantized, left, rtol=0, atol=3e-6)


def test_every_book_brings_the_sum_nearer():
    vq = trained(60, codebooks=6).eval()
    for x, allowed in ((frames(59), 0.0), (frames(1000), 0.01)):
        ids = vq.encode(x)
        errors = torch.stack([(vq.decode(ids[:, :n]) - x).square().mean() for n in range(1, 7)])
        assert bool((errors[1:] < errors[:-1] * (1 + allowed)).all())
        assert errors[0] < x.var() and errors[-1] < 0.3 * errors[0]


# -- moving averages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_one_step_is_the_closed_form(decay):
    vq = trained(3, decay=decay, dead=0.0)
    before = {name: value.clone().double() for name, value in vq.books.state_dict().items()}
    x = frames(77)
    ids = vq.encode(x).transpose(0, 1).flatten(1).long()  # [K, N]
    vq(x)
    left = x.flatten(0, 1).double()
    for book in range(4):
        taken = torch.nn.functional.one_hot(ids[book], 16).double()
        size = decay * before["cluster_size"][book] + (1 - decay) * taken.sum(0)
        total = decay * before["embed_avg"][book] + (1 - decay) * taken.T @ left
        smoothed = (size + 1e-5) / (size.sum() + 16 * 1e-5) * size.sum()
        for name, expected in (
            ("cluster_size", size),
            ("embed_avg", total),
            ("codebook", total / smoothed[:, None]),
        ):
            torch.testing.assert_close(getattr(vq.books, name)[book].double(), expected, rtol=1e-4, atol=1e-5)
        if decay == 0:
            used = taken.sum(0) > 0
            means = (taken.T @ left)[used] / taken.sum(0)[used, None]
            torch.testing.assert_close(vq.books.codebook[book][used].double(), means, rtol=1e-3, atol=1e-4)
        # Quantized first, then updated: the next book saw what the old codes left over.
        left = left - before["codebook"][book][ids[book]]


def test_evaluation_changes_nothing():
    vq = trained().eval()
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq(frames(5))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_half_precision_around_it_has_no_say():
    vq, cast = trained(), trained()
    x = frames(5)
    out = vq(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = cast(x)
    assert other.quantized.dtype == torch.float32
    assert torch.equal(other.quantized, out.quantized) and torch.equal(other.commitment, out.commitment)
    assert all(torch.equal(value, cast.state_dict()[name]) for name, value in vq.state_dict().items())


# -- gradients -----------------------------------------------------------------------------------------------------


def test_commitment_of_every_book_reaches_the_frames():
    vq = trained().eval()
    norms, published = [], []
    for book in range(4):
        x = frames(1000).requires_grad_()
        counted = torch.ones(4, 4, 64, dtype=torch.bool)
        errors = vq.books(x, counted[..., 0], counted)[2]
        (gradient,) = torch.autograd.grad(errors[book].mean(), x)
        # Closed form: the mean square of what the book leaves over; codes are constants.
        left = x.detach() - vq.decode(vq.encode(x)[:, : book + 1])
        torch.testing.assert_close(gradient, 2 * left / x.numel(), rtol=1e-4, atol=1e-8)
        norms.append(float(gradient.norm()))
        # As published, every book passes its code straight through.
        residual = x
        for entries, ids in zip(vq.books.codebook[: book + 1], vq.encode(x).transpose(0, 1).long(), strict=False):
            codes = entries[ids]
            error = (residual - codes).square().mean()
            residual = residual - (residual + (codes - residual).detach())
        published.append(float(torch.autograd.grad(error, x)[0].norm()))
    assert all(norm > 0.1 * norms[0] for norm in norms), norms
    assert published[0] == pytest.approx(norms[0], rel=1e-4) and published[1:] == [0, 0, 0], published


def test_straight_through_once():
    vq = trained().eval()
    x = frames(1000).requires_grad_()
    weight = torch.randn(4, 64, 8)
    (vq(x, use=torch.tensor([1, 2, 3, 4])).quantized * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_losses_are_means_over_frames_and_books_in_use():
    vq = trained().eval()
    x, use = frames(1000), torch.tensor([1, 2, 4, 3])
    valid = torch.ones(4, 64, dtype=torch.bool)
    valid[1, 40:], valid[3] = False, False
    out = vq(x, valid, use)
    ids = vq.encode(x)
    for row in range(4):
        errors = [(vq.decode(ids[:, :n]) - x)[row][valid[row]].square().mean() for n in range(1, int(use[row]) + 1)]
        expected = torch.stack(errors).mean() if row != 3 else torch.tensor(0.0)
        torch.testing.assert_close(out.commitment[row], expected, rtol=1e-5, atol=1e-7)
    assert out.codebook.tolist() == [0, 0, 0, 0]
    assert out.counts.sum(1).tolist() == [64 + 40 + 64, 40 + 64, 64, 64]


def test_frames_and_books_that_do_not_count_teach_nothing():
    """Padding and rows above their number of books leave the averages as if they had not been there."""
    vq, other = trained(), trained()
    x, use = frames(7), torch.tensor([1, 2, 4, 3])
    valid = torch.ones(4, 64, dtype=torch.bool)
    valid[2, 20:] = False
    vq(x, valid, use)
    noise = x.clone()
    noise[2, 20:] = 100.0
    other(noise, valid, use)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in vq.state_dict().items())
    # The last book follows the third row alone.
    last = trained()
    last(x[2:3, :20])
    torch.testing.assert_close(last.books.cluster_size[3], vq.books.cluster_size[3])
    torch.testing.assert_close(last.books.codebook[3], vq.books.codebook[3])
    # A book that nobody uses stays as it is, age included.
    alone = trained()
    before = {name: value[1:].clone() for name, value in alone.books.state_dict().items() if value.ndim > 1}
    alone(x, use=torch.ones(4, dtype=torch.int64))
    for name in ("codebook", "cluster_size", "embed_avg", "age"):
        assert torch.equal(getattr(alone.books, name)[1:], before[name]), name


# -- start ---------------------------------------------------------------------------------------------------------


def test_kmeans_start_on_vectors_of_several_batches():
    torch.manual_seed(0)
    vq = ResidualVQ(8, 2, 100)  # starts on 400 vectors; a batch has 256, 250 of them valid
    valid = torch.ones(4, 64, dtype=torch.bool)
    valid[0, -6:] = False
    first, second = frames(0), frames(1)
    first[0, -6:] = 1e6
    out = vq(first, valid)
    assert torch.equal(out.quantized, first) and not out.ids.any() and not out.counts.any()
    assert not out.commitment.any() and not vq.books.codebook.any()
    with pytest.raises(InputError, match="150 of 400 vectors"):
        vq.encode(first)
    with pytest.raises(InputError, match="not been started"):
        vq.eval()(first)
    out = vq.train()(second, valid)
    assert out.counts.sum(1).tolist() == [250, 250]
    rows = vq.books.start_rows
    given = torch.cat((first[valid], second[valid]))
    assert bool((rows[:, None] == given).all(-1).any(1).all()) and len(rows.unique(dim=0)) == 400
    # Each book lowers the error on what it was started on, the second one on what the first left over.
    errors = []
    for n in (1, 2):
        errors.append(float((vq.decode(vq.encode(rows[None], n)) - rows).square().mean()))
    assert errors[0] < 0.5 * float(rows.var(0).mean()) and errors[1] < 0.5 * errors[0]


def test_kmeans_is_near_the_best_of_sklearn():
    from sklearn.cluster import KMeans

    rows = frames(3, 8, 200).flatten(0, 1)
    best = KMeans(40, n_init=10, random_state=0).fit(rows.numpy()).inertia_
    torch.manual_seed(1)
    centres, ids = kmeans(rows, 40)
    assert float((rows - centres[ids]).square().sum()) < 1.1 * best
    assert len(ids.unique()) == 40


def test_kmeans_of_rows_that_repeat():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(10, 1)
    centres, ids = kmeans(rows, 5)
    torch.testing.assert_close(centres[ids], rows)


# -- dead codes ----------------------------------------------------------------------------------------------------


def tight(generator, centre, count=256):
    """Four tight clusters around `centre`: float32 [1, count, 8]."""
    corners = 3 * torch.eye(8)[:4]
    picks = torch.randint(4, (count,), generator=generator)
    return (centre + corners[picks] + 0.05 * torch.randn(count, 8, generator=generator))[None]


def used_after_a_move(vq, steps):
    """Share of 64 codes in use after the data have moved away from where the codes were."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        torch.manual_seed(step)
        vq(tight(generator, 0.0 if step < 5 else 20.0))
    counts = sum(vq.eval()(tight(generator, 20.0)).counts for _ in range(8))
    return float(codebook_use(counts).usage[0])


def test_dead_codes_come_back():
    """300 steps on four tight clusters; without revival most codes stay dead."""
    assert used_after_a_move(ResidualVQ(8, 1, 64, decay=0.9, min_age=20), 300) > 0.95
    assert used_after_a_move(ResidualVQ(8, 1, 64, decay=0.9, min_age=20, dead=0.0), 300) < 0.15


def test_what_is_dead_is_a_share_of_the_mean_and_of_age():
    """Rare codes of a large book are not dead, though their counts are far below 1; young ones are spared."""
    torch.manual_seed(0)
    vq = ResidualVQ(2, 1, 512, min_age=10, decay=0.9)
    for step in range(200):
        torch.manual_seed(step)
        vq(torch.rand(1, 64, 2))  # 1/8 of a vector for each code
    assert float((vq.books.age > 50).float().mean()) > 0.6  # all would be younger than 20 below a count of 1
    # A code without any count dies at the tenth update and not before.
    vq.books.codebook[0, 7], vq.books.embed_avg[0, 7], vq.books.cluster_size[0, 7] = 1e3, 1e-3, 1e-6
    vq.books.age[0, 7] = 5
    far = []
    for _ in range(6):
        vq(torch.rand(1, 64, 2))
        far.append(float(vq.books.codebook[0, 7].max()) > 2)
    assert far == [True] * 4 + [False] * 2


def test_revived_codes_are_vectors_of_their_own_book_and_stay():
    vq = trained(60, min_age=100)
    vq.books.age[:] = 0
    vq.books.age[2, 3] = 1000
    vq.books.codebook[2, 3], vq.books.embed_avg[2, 3], vq.books.cluster_size[2, 3] = 1e3, 1e-3, 1e-6
    x = frames(5)
    left = (x - vq.decode(vq.encode(x)[:, :2])).flatten(0, 1)
    vq(x)
    assert float((left - vq.books.codebook[2, 3]).norm(dim=1).min()) < 1e-5
    assert int(vq.books.age[2, 3]) == 0
    mean = vq.books.cluster_size[2].mean()
    torch.testing.assert_close(vq.books.cluster_size[2, 3], 0.1 * mean, rtol=0.02, atol=0)
    torch.testing.assert_close(
        vq.books.embed_avg[2, 3] / vq.books.cluster_size[2, 3], vq.books.codebook[2, 3], rtol=1e-5, atol=1e-6
    )
    # In the published code the averages, which are untouched, bring the old row back with the next update.
    revived = vq.books.codebook[2, 3].clone()
    assert vq(torch.full((4, 64, 8), -30.0)).counts[2, 3] == 0
    torch.testing.assert_close(vq.books.codebook[2, 3], revived, rtol=1e-3, atol=1e-3)


# -- resume and processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 30])
def test_a_resumed_run_is_the_same_to_the_bit(stop):
    """Stopped while vectors for the start are collected, and later."""
    options = {"dim": 8, "codebooks": 3, "codes": 128, "min_age": 5, "dead": 0.3}
    whole, part = ResidualVQ(**options), ResidualVQ(**options)
    for step in range(60):
        torch.manual_seed(step)
        expected = whole(frames(step))
        if step == stop:
            state = {name: value.clone() for name, value in part.state_dict().items()}
            torch.rand(17)
            part = ResidualVQ(**options)
            part.load_state_dict(state)
        torch.manual_seed(step)
        found = part(frames(step))
        assert torch.equal(found.quantized, expected.quantized)
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in whole.state_dict().items())
    assert int(whole.books.age.min()) < int(whole.books.age.max()), "no code was revived: nothing was shown"


PROCESSES = """
import os, torch, torch.distributed
from speechtok.nn.residual_vq import ResidualVQ
from tests.test_residual_vq import frames
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
folder = Path({folder!r})
# Start, averages and revival, each process with draws of its own: the books stay the same in all of them.
vq = ResidualVQ(8, 3, 128, min_age=5, dead=0.3)
for step in range(40):
    torch.manual_seed(100 * step + rank)
    out = vq(frames(step)[rank::2], use=torch.tensor([3, 1 + rank]))
torch.save(vq.state_dict(), folder / f"rank{{rank}}.pt")
# From the same books, two halves of a batch teach what the whole batch does.
vq = ResidualVQ(8, 3, 128, dead=0.0)
vq.load_state_dict(torch.load(folder / "start.pt"))
for step in range(5):
    vq(frames(step)[rank::2])
torch.save(vq.state_dict(), folder / f"halves{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_hold_the_same_books(tmp_path: Path, torchrun):
    start = ResidualVQ(8, 3, 128, dead=0.0)
    for step in range(50, 55):
        torch.manual_seed(step)
        start(frames(step))
    torch.save(start.state_dict(), tmp_path / "start.pt")
    torchrun(PROCESSES.format(folder=str(tmp_path)))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert int(one["books.age"].min()) < 30 and int(one["books.age"].max()) > 30
    for step in range(5):
        start(frames(step))
    halves = torch.load(tmp_path / "halves0.pt")
    for name, value in start.state_dict().items():
        torch.testing.assert_close(halves[name], value, rtol=1e-5, atol=1e-5)


# -- dropout and use -----------------------------------------------------------------------------------------------


def test_draws_of_use_are_uniform():
    vq = ResidualVQ(4, 8, 4)
    generator = np.random.default_rng(0)
    drawn = vq.draw_use(8000, generator)
    assert drawn.dtype == torch.int64 and drawn.shape == (8000,)
    counts = np.bincount(drawn.numpy(), minlength=9)
    assert counts[0] == 0 and chisquare(counts[1:]).pvalue > 0.01
    counts = np.bincount(vq.draw_use(6000, generator, (2, 4, 8)).numpy(), minlength=9)
    assert counts.sum() == counts[[2, 4, 8]].sum() and chisquare(counts[[2, 4, 8]]).pvalue > 0.01
    counts = np.bincount(vq.draw_use(8000, generator, full=0.5).numpy(), minlength=9)[1:]
    assert chisquare(counts, 8000 * (np.full(8, 0.5 / 8) + 0.5 * np.eye(8)[7])).pvalue > 0.01
    again = [vq.draw_use(50, np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_report():
    counts = torch.tensor([[10.0, 10, 10, 10], [40, 0, 0, 0], [20, 20, 0, 0], [0, 0, 0, 0]])
    use = codebook_use(counts)
    torch.testing.assert_close(use.perplexity, torch.tensor([4.0, 1, 2, 0]))
    torch.testing.assert_close(use.entropy, torch.tensor([1.0, 0, 0.5, 0]))
    torch.testing.assert_close(use.usage, torch.tensor([1, 0.25, 0.5, 0]))
    assert use.as_dict("held_out_")["held_out_book3_perplexity"] == pytest.approx(2)
    assert codebook_use(torch.ones(1, 1)).entropy.tolist() == [0]
    vq = trained().eval()
    out = vq(frames(3))
    counts = torch.stack([torch.bincount(ids, minlength=16) for ids in out.ids.transpose(0, 1).flatten(1)])
    assert torch.equal(out.counts, counts.float())


# -- codes by gradient ---------------------------------------------------------------------------------------------


def dac_of(vq):
    """transformers' DAC quantizer with the same weights."""
    config = DacConfig(
        hidden_size=vq.dim,
        codebook_dim=vq.code_dim,
        codebook_size=vq.codes,
        n_codebooks=vq.codebooks,
        quantizer_dropout=0,
    )
    theirs = DacResidualVectorQuantizer(config)
    for book, layer in enumerate(theirs.quantizers):
        layer.codebook.weight.data.copy_(vq.books.codebook[book])
        for conv, linear in ((layer.in_proj, vq.books.project_in[book]), (layer.out_proj, vq.books.project_out[book])):
            conv.weight.data.copy_(linear.weight[..., None])
            conv.bias.data.copy_(linear.bias)
    return theirs.eval()


def test_factorized_form_equals_transformers():
    torch.manual_seed(0)
    vq = ResidualVQ(12, 4, 32, code_dim=5)
    theirs = dac_of(vq)
    x, y = frames(0, dim=12).requires_grad_(), frames(0, dim=12).requires_grad_()
    out = vq(x)
    quantized, ids, _, commitment, codebook = theirs(y.transpose(1, 2))
    assert torch.equal(out.ids.long(), ids)
    torch.testing.assert_close(out.quantized, quantized.transpose(1, 2), rtol=1e-5, atol=1e-5)
    # Theirs are sums over books, ours means.
    torch.testing.assert_close(4 * out.commitment.mean(), commitment.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(4 * out.codebook.mean(), codebook.mean(), rtol=1e-5, atol=1e-6)
    weight = torch.randn(4, 64, 12)
    ((out.quantized * weight).sum() + 4 * out.commitment.mean() + 4 * out.codebook.mean()).backward()
    ((quantized.transpose(1, 2) * weight).sum() + commitment.mean() + codebook.mean()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for book, layer in enumerate(theirs.quantizers):
        torch.testing.assert_close(vq.books.codebook.grad[book], layer.codebook.weight.grad, rtol=1e-4, atol=1e-6)


def test_factorized_form_learns():
    torch.manual_seed(0)
    vq = ResidualVQ(8, 3, 32, code_dim=4)
    optimizer = torch.optim.Adam(vq.parameters(), 1e-2)

    def error():
        with torch.no_grad():
            return float((vq.eval()(frames(1000)).quantized - frames(1000)).square().mean())

    before = error()
    for step in range(150):
        x, use = frames(step), vq.draw_use(4, np.random.default_rng(step))
        out = vq.train()(x, use=use)
        loss = (out.quantized - x).square().mean() + out.codebook.mean() + 0.25 * out.commitment.mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in vq.parameters()) or int(use.max()) < 3
        optimizer.step()
    assert error() < 0.3 * before


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "positive"),
        ({"codebooks": 0}, "positive"),
        ({"code_dim": 0}, "positive"),
        ({"decay": 1.0}, "decay"),
        ({"dead": -0.1}, "dead"),
        ({"min_age": 0}, "min_age"),
        ({"start": 3}, "start"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ResidualVQ(**{"dim": 4, "codebooks": 2, "codes": 8, **options})


def test_bad_input_is_refused():
    vq = trained().eval()
    x = frames(0)
    for call, message in (
        (lambda: vq(x[0]), r"\[B, T, 8\]"),
        (lambda: vq(x[..., :5]), r"\[B, T, 8\]"),
        (lambda: vq(x, torch.ones(4, 63, dtype=torch.bool)), "valid"),
        (lambda: vq(x, use=torch.tensor([0, 1, 1, 1])), "from 1 to 4"),
        (lambda: vq(x, use=torch.tensor([5, 1, 1, 1])), "from 1 to 4"),
        (lambda: vq(x, use=torch.tensor([1])), "4 rows"),
        (lambda: vq.encode(x, 0), "there are 4"),
        (lambda: vq.encode(x, 5), "there are 4"),
        (lambda: vq.decode(torch.zeros(1, 5, 3, dtype=torch.int64)), "from 1 to 4"),
        (lambda: vq.decode(torch.full((1, 4, 3), 16)), "from 0 to 15"),
        (lambda: vq.decode(torch.full((1, 4, 3), -1)), "from 0 to 15"),
        (lambda: vq.draw_use(3, np.random.default_rng(0), (0, 1)), "choices"),
        (lambda: vq.draw_use(3, np.random.default_rng(0), ()), "choices"),
        (lambda: vq.draw_use(3, np.random.default_rng(0), (1, 5)), "choices"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_description():
    vq = ResidualVQ(4, 2, 8, decay=0.9)
    assert ResidualVQ(**vq.config_dict()).config_dict() == vq.config_dict()
    assert "codes=8" in repr(vq)
