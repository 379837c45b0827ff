"""sigmaReparam: the spectral norm is gamma, nothing changes at the start, folding, gradients; attention entropy."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from speechtok.errors import InputError
from speechtok.nn.sigma_reparam import (
    SigmaReparam,
    apply_sigma_reparam,
    attention_entropy,
    entropy_bound,
    fold_sigma_reparam,
    frozen_sigma,
    gammas,
)


class Net(nn.Module):
    """Two linears, a convolution of width 1 and one of each kind that must be left alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 24)
        self.body = nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)})
        self.point = nn.Conv1d(24, 24, 1)
        self.depth = nn.Conv1d(24, 24, 3, groups=24, padding=1)
        self.gate = nn.Conv1d(24, 24, 1, groups=4)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 7)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.body["down"](F.gelu(self.body["up"](self.norm(x))))
        x = x.transpose(1, 2)
        x = x + self.gate(self.depth(self.point(x)))
        return self.head(x.transpose(1, 2))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def ids():
    return torch.randint(7, (3, 11), generator=torch.Generator().manual_seed(1))


def norm_of(weight) -> float:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2).item()


def scale_of(module) -> SigmaReparam:
    return module.parametrizations.weight[0]


def test_linear_maps_are_found(net):
    assert apply_sigma_reparam(net, skip=["head"]) == ["body.up", "body.down", "point"]
    assert not parametrize.is_parametrized(net.head)
    assert len(gammas(net)) == 3 and all(gamma.ndim == 0 for gamma in gammas(net))
    lone = nn.Linear(3, 4)
    assert apply_sigma_reparam(lone) == [""]


@pytest.mark.parametrize(
    ("skip", "taken"),
    [
        (["body"], ["point", "head"]),
        (["*.up"], ["body.down", "point", "head"]),
        (["bod?", "head"], ["point"]),
        ([], ["body.up", "body.down", "point", "head"]),
    ],
)
def test_skip(net, skip, taken):
    assert apply_sigma_reparam(net, skip=skip) == taken


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes_at_the_start(net, ids, training):
    net.train(training)
    expected = net(ids)
    apply_sigma_reparam(net)
    assert torch.allclose(net(ids), expected, atol=1e-5)
    assert scale_of(net.point).gamma.item() == pytest.approx(norm_of(net.point.weight), rel=1e-5)


def test_gamma_of_one(net):
    apply_sigma_reparam(net, gamma="one")
    for module in (net.body["up"], net.point):
        assert scale_of(module).gamma.item() == 1.0
        assert norm_of(module.weight) == pytest.approx(1.0, rel=1e-5)


def train(net, ids, steps=20, lr=0.05, momentum=0.9):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        loss = F.cross_entropy(net(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("gamma", ["sigma", "one"])
def test_spectral_norm_is_gamma_while_training(net, ids, gamma):
    apply_sigma_reparam(net, gamma=gamma)
    before = {name: value.clone() for name, value in net.named_parameters()}
    first = train(net, ids, steps=1, lr=0.003)
    assert train(net, ids, steps=19, lr=0.003, momentum=0.0) < first
    for module in (net.body["up"], net.body["down"], net.point, net.head):
        assert norm_of(module.weight) == pytest.approx(scale_of(module).gamma.item(), rel=1e-3)
    moved = [name for name, value in net.named_parameters() if not torch.equal(value, before[name])]
    assert set(moved) == set(before)


def test_iteration_catches_up_after_violent_steps(net, ids):
    """The largest direction of the head has become another one; one step of the iteration a forward lags behind."""
    apply_sigma_reparam(net)
    train(net, ids, steps=20, lr=0.05, momentum=0.0)
    assert norm_of(net.head.weight) > scale_of(net.head).gamma.item() * 1.01
    for _ in range(200):
        net(ids)
    for module in (net.body["up"], net.body["down"], net.point, net.head):
        assert norm_of(module.weight) == pytest.approx(scale_of(module).gamma.item(), rel=1e-3)


def test_iteration_finds_the_largest_gain():
    """From a start that knows nothing, unlike the one of the library."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 50)
    apply_sigma_reparam(layer)
    scale = scale_of(layer)
    scale.u.copy_(F.normalize(torch.randn(30), dim=0))
    for _ in range(200):
        layer(torch.zeros(1, 30))
    assert norm_of(layer.weight) == pytest.approx(scale.gamma.item(), rel=1e-3)


def test_only_training_moves_the_vectors(net, ids):
    apply_sigma_reparam(net)
    train(net, ids, 3)
    scale = scale_of(net.head)
    kept = scale.u.clone(), scale.v.clone()
    net.eval()
    first = net(ids)
    assert torch.equal(net(ids), first)
    assert torch.equal(scale.u, kept[0]) and torch.equal(scale.v, kept[1])
    net.train()
    net(ids)
    assert not torch.equal(scale.u, kept[0])


def test_eval_uses_one_more_iteration(net):
    """Weights that were loaded or averaged are not those that the stored vectors belong to."""
    apply_sigma_reparam(net)
    net.eval()
    scale, plain = scale_of(net.head), net.head.parametrizations.weight.original
    with torch.no_grad():
        plain.add_(0.2 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(2)))
    stored = torch.dot(scale.v, plain @ scale.u)
    local = plain.norm() * scale.gamma / net.head.weight.norm()
    true = norm_of(plain)
    assert abs(local.item() - true) < 0.5 * abs(stored.item() - true)


@pytest.mark.parametrize("training", [True, False])
def test_folding_gives_plain_weights(net, ids, training):
    names = set(net.state_dict())
    apply_sigma_reparam(net, skip=["head"])
    train(net, ids, 5)
    net.eval()
    expected = net(ids)
    net.train(training)
    assert fold_sigma_reparam(net) is net
    net.eval()
    assert torch.equal(net(ids), expected)
    assert set(net.state_dict()) == names
    assert type(net.point) is nn.Conv1d and isinstance(net.point.weight, nn.Parameter)
    assert gammas(net) == []
    plain = Net()
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(plain(ids), expected, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    apply_sigma_reparam(layer)
    original, scale = layer.parametrizations.weight.original, scale_of(layer)
    assert scale.gamma.dtype == torch.float64
    x = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        original.add_(0.1 * torch.randn_like(original))  # away from the vectors of the start

    def output(weight, gamma, bias):
        return torch.func.functional_call(
            layer,
            {"parametrizations.weight.original": weight, "parametrizations.weight.0.gamma": gamma, "bias": bias},
            (x,),
        ).sin()

    with frozen_sigma():
        inputs = tuple(p.detach().clone().requires_grad_() for p in (original, scale.gamma, layer.bias))
        assert torch.autograd.gradcheck(output, inputs)


def test_gradient_has_no_part_along_the_weight():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).double()
    apply_sigma_reparam(layer)
    layer(torch.randn(8, 32, dtype=torch.float64)).square().sum().backward()
    weight = layer.parametrizations.weight.original
    cosine = F.cosine_similarity(weight.grad.flatten(), weight.flatten(), dim=0).item()
    assert abs(cosine) < 1e-9
    assert weight.grad.abs().max() > 1e-3
    assert abs(scale_of(layer).gamma.grad.item()) > 1e-3


def test_forwards_that_share_a_backward(net, ids):
    apply_sigma_reparam(net)
    with frozen_sigma():
        frozen = net(ids)
    (frozen.square().sum() + net(ids).square().sum() + net(ids.flip(0)).square().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_frozen_vectors_give_the_same_weights_again(net, ids):
    apply_sigma_reparam(net)
    train(net, ids, 2, lr=0.5)
    first = net(ids)
    with frozen_sigma():
        with frozen_sigma():
            assert torch.equal(net(ids), first)
        assert torch.equal(net(ids), first)
    assert not torch.equal(net(ids), first)
    with pytest.raises(RuntimeError, match="on purpose"), frozen_sigma():
        raise RuntimeError("on purpose")
    assert not torch.equal(net(ids), net(ids))


def test_checkpointing_recomputes_the_same(net, ids):
    apply_sigma_reparam(net)
    train(net, ids, 2, lr=0.5)
    net.zero_grad()
    other = copy.deepcopy(net)
    net(ids).square().sum().backward()
    out = checkpoint(other, ids, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_sigma()))
    out.square().sum().backward()
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(net.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_dict_round_trip(net, ids):
    apply_sigma_reparam(net)
    train(net, ids, 4)
    torch.manual_seed(9)
    other = Net()
    apply_sigma_reparam(other, gamma="one")
    other.load_state_dict(net.state_dict())
    assert {"parametrizations.weight.0.u", "parametrizations.weight.0.v", "parametrizations.weight.0.gamma"} <= set(
        net.head.state_dict()
    )
    for mode in (False, True):
        assert torch.equal(net.train(mode)(ids), other.train(mode)(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sigma_is_taken_in_float32(dtype):
    """Small weights of a wide map: a sum of squares in half precision would be off, or underflow."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 256)
    nn.init.normal_(layer.weight, std=1e-4)
    apply_sigma_reparam(layer)
    exact = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=dtype):
        assert layer.weight.dtype == torch.float32
        assert torch.allclose(layer.weight, exact, rtol=1e-5)
        assert layer(torch.zeros(1, 512)).dtype == dtype
    half = layer.to(dtype)
    gamma = scale_of(half).gamma.float().item()
    step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    assert half.weight.dtype == dtype
    assert norm_of(half.weight) == pytest.approx(gamma, rel=step)


def test_what_cannot_be_scaled_is_refused(net):
    with pytest.raises(InputError, match="fits no module"):
        apply_sigma_reparam(net, skip=["tail"])
    with pytest.raises(InputError, match="no linear map"):
        apply_sigma_reparam(nn.LayerNorm(3))
    with pytest.raises(InputError, match="gamma='two'"):
        apply_sigma_reparam(net, gamma="two")
    apply_sigma_reparam(net, skip=["head"])
    with pytest.raises(InputError, match="body.up: the weight is parametrized already"):
        apply_sigma_reparam(net)
    for value in (0.0, math.nan):
        nn.init.constant_(net.head.weight, value)
        with pytest.raises(InputError, match="head: a weight that is zero or not finite"):
            apply_sigma_reparam(net, skip=["body", "point"])


# ---------------------------------------------------------------------------------------------------------------------
# entropy


def test_entropy_of_uniform_and_of_collapsed_attention():
    uniform = torch.full((2, 3, 5, 16), 1 / 16)
    assert torch.allclose(attention_entropy(uniform), torch.full((3,), math.log(16)))
    assert torch.equal(attention_entropy(torch.eye(5).expand(2, 3, 5, 5)), torch.zeros(3))


def test_entropy_per_head_and_layer_with_a_mask():
    torch.manual_seed(0)
    lengths = (6, 4)
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    scores = torch.randn(3, 2, 4, 6, 6).masked_fill(~valid[None, :, None, None], -math.inf)
    probabilities = scores.softmax(-1)
    probabilities[:, ~valid[:, None].expand(2, 4, 6)] = 0.9  # queries that do not count
    found = attention_entropy(probabilities, valid)
    assert found.shape == (3, 4)
    for layer in range(3):
        for head in range(4):
            rows = [
                -sum(p * math.log(p) for p in probabilities[layer, row, head, query].tolist() if p > 0)
                for row in range(2)
                for query in range(lengths[row])
            ]
            assert found[layer, head].item() == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    assert torch.allclose(attention_entropy(probabilities[0], valid), found[0])


def test_entropy_refuses_other_shapes():
    with pytest.raises(InputError, match="are needed"):
        attention_entropy(torch.ones(3, 4, 4))
    with pytest.raises(InputError, match="are needed"):
        attention_entropy(torch.ones(2, 3, 4, 4), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("keys", [2, 8, 64, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 20.0])
def test_entropy_bound_holds_and_is_attained(keys, scale):
    bound = entropy_bound(scale, keys)
    generator = torch.Generator().manual_seed(keys)
    logits = torch.randn(500, keys, generator=generator, dtype=torch.float64)
    # Random directions are far from the bound; those near one axis are close to it.
    logits[:, 0] += torch.linspace(0, 40, 500)
    logits -= logits.mean(1, keepdim=True)
    logits = scale * F.normalize(logits, dim=1)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    assert entropy.min() >= bound - 1e-12
    low = -scale / math.sqrt(keys * (keys - 1))
    worst = torch.full((keys,), low, dtype=torch.float64)
    worst[0] = scale * math.sqrt((keys - 1) / keys)
    assert worst.norm().item() == pytest.approx(scale)
    assert torch.special.entr(worst.softmax(0)).sum().item() == pytest.approx(bound, rel=1e-9, abs=1e-12)


def test_entropy_bound_at_its_ends():
    assert entropy_bound(0.0, 32) == pytest.approx(math.log(32))
    assert entropy_bound(3.0, 1) == 0.0
    for scale, keys in ((-1.0, 4), (1.0, 0)):
        with pytest.raises(InputError, match="at least"):
            entropy_bound(scale, keys)
