"""The nearest-centroid kernel: numba against the reference and sklearn, Triton in its interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from speechtok.errors import FormatError
from speechtok.kernels.nearest import nearest_centroids, nearest_centroids_reference
from speechtok.quantizers.kmeans import KMeans


@pytest.mark.parametrize(
    ("n", "k", "d"), [(0, 5, 3), (1, 1, 1), (7, 2, 5), (3000, 100, 39), (50, 2000, 16), (2049, 17, 64)]
)
def test_equals_the_reference(n, k, d):
    torch.manual_seed(n + k)
    rows, centroids = torch.randn(n, d), torch.randn(k, d)
    ids, distances = nearest_centroids(rows, centroids)
    expected, expected_distances = nearest_centroids_reference(rows, centroids)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(distances, expected_distances, rtol=1e-6, atol=1e-6)


def test_equal_distances_go_to_the_lower_index():
    centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    ids, distances = nearest_centroids(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), centroids)
    assert ids.tolist() == [0, 0]
    assert distances[1].tolist() == [1.0, 1.0]


def test_far_from_the_origin_no_digits_are_lost():
    torch.manual_seed(0)
    rows, centroids = torch.randn(500, 8) + 1000, torch.randn(20, 8) + 1000
    _, distances = nearest_centroids(rows, centroids)
    _, expected = nearest_centroids_reference(rows, centroids)
    torch.testing.assert_close(distances[:, 0], expected[:, 0], rtol=1e-3, atol=1e-3)


def test_autocast_does_not_blur_it():
    rows, centroids = torch.randn(200, 24), torch.randn(50, 24)
    plain = nearest_centroids(rows, centroids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, distances = nearest_centroids(rows, centroids)
    assert torch.equal(ids, plain[0])
    assert torch.equal(distances, plain[1])


def test_equals_sklearn():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10_000, 39)).astype(np.float32)
    model = SklearnKMeans(50, n_init=1, max_iter=5, random_state=0).fit(rows[:2000])
    ids = KMeans(model.cluster_centers_)(torch.from_numpy(rows)[None]).ids[0, 0].numpy()
    assert np.array_equal(ids, model.predict(rows))


def test_opcheck():
    torch.library.opcheck(torch.ops.speechtok.nearest_centroids, (torch.randn(40, 6), torch.randn(9, 6)))


TRITON = """
import torch
from speechtok.kernels.nearest import nearest_centroids_reference, nearest_centroids_triton
for n, k, d in [(0, 3, 4), (70, 100, 39), (5, 1, 8), (130, 257, 64), (3, 2, 5)]:
    torch.manual_seed(n)
    rows, centroids = torch.randn(n, d), torch.randn(k, d)
    ids, distances = nearest_centroids_triton(rows, centroids)
    expected, expected_distances = nearest_centroids_reference(rows, centroids)
    assert torch.equal(ids, expected), (n, k, d)
    torch.testing.assert_close(distances, expected_distances, rtol=1e-5, atol=1e-5)
ids, _ = nearest_centroids_triton(torch.zeros(4, 2), torch.tensor([[1.0, 0], [-1, 0], [1, 0]]))
assert ids.tolist() == [0, 0, 0, 0]
print("same")
"""


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    # The interpreter is chosen when Triton is imported, so it gets a process of its own.
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_on_a_gpu():
    torch.manual_seed(0)
    rows, centroids = torch.randn(5000, 768), torch.randn(500, 768)
    ids, _ = nearest_centroids(rows.cuda(), centroids.cuda())
    expected, _ = nearest_centroids_reference(rows, centroids)
    assert (ids.cpu() == expected).float().mean() > 0.999


def test_margin_is_what_a_frame_can_move():
    """No change below the margin flips an id; one slightly above, in the worst direction, does."""
    torch.manual_seed(0)
    quantizer = KMeans(torch.randn(20, 5).numpy())
    rows = torch.randn(1, 200, 5)
    codes = quantizer(rows)
    room = codes.margins[0] * rows[0].norm(dim=1)
    for _ in range(20):
        step = torch.nn.functional.normalize(torch.randn(200, 5), dim=1) * room[:, None] * 0.999
        assert torch.equal(quantizer(rows + step).ids, codes.ids)
    _, order = torch.cdist(rows[0], quantizer.centroids).topk(2, largest=False)
    towards = torch.nn.functional.normalize(quantizer.centroids[order[:, 1]] - quantizer.centroids[order[:, 0]], dim=1)
    distances = nearest_centroids(rows[0], quantizer.centroids)[1]
    gap = (distances[:, 1] ** 2 - distances[:, 0] ** 2) / (
        2 * (quantizer.centroids[order[:, 1]] - quantizer.centroids[order[:, 0]]).norm(dim=1)
    )
    moved = rows + (towards * gap[:, None] * 1.01)[None]
    assert (quantizer(moved).ids != codes.ids).float().mean() > 0.9
    assert bool((gap >= room * 0.999).all())


def test_standardisation():
    rng = np.random.default_rng(0)
    mean, scale = rng.standard_normal(4).astype(np.float32), rng.uniform(0.5, 2, 4).astype(np.float32)
    centroids = rng.standard_normal((7, 4)).astype(np.float32)
    rows = rng.standard_normal((1, 100, 4)).astype(np.float32)
    with_statistics = KMeans(centroids, mean, scale)(torch.from_numpy(rows))
    by_hand = KMeans(centroids)(torch.from_numpy((rows - mean) / scale))
    assert torch.equal(with_statistics.ids, by_hand.ids)
    again = KMeans.from_tensors(KMeans(centroids, mean, scale).state_dict())
    assert again.standardized
    assert torch.equal(again(torch.from_numpy(rows)).ids, by_hand.ids)


def test_margin_bounds_scaled_frames_too():
    """A tiny scale makes tiny moves of the frame count: the margin is in terms of the frame, not of its scaled form."""
    quantizer = KMeans([[0, 0], [0, 1]], mean=[1000, 0], scale=[1, 1e-3])
    frame = torch.tensor([[[1000.0, 0.4e-3]]])
    codes = quantizer(frame)
    room = float(codes.margins) * float(frame.norm())
    assert quantizer(frame + torch.tensor([0, 1.01e-4])).ids != codes.ids
    assert room <= 1.001e-4


def directions(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("standardized", [False, True])
def test_spherical_is_the_largest_cosine(standardized):
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((1000, 12)) * rng.uniform(1e-3, 1e3, (1000, 1))).astype(np.float32)
    centroids = rng.standard_normal((60, 12))
    centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)
    statistics = (rows.mean(0), rows.std(0)) if standardized else (None, None)
    scaled = (rows.astype(float) - rows.mean(0)) / rows.std(0) if standardized else rows.astype(float)
    quantizer = KMeans(centroids, *statistics, spherical=True)
    expected = np.argmax(scaled @ centroids.T.astype(float), 1)
    found = quantizer(torch.from_numpy(rows)[None]).ids[0, 0].numpy()
    np.testing.assert_array_equal(found, expected)
    # The length of frames has no say, without the flag it has.
    if not standardized:
        longer = torch.from_numpy(rows * rng.uniform(0.1, 10, (1000, 1)).astype(np.float32))[None]
        np.testing.assert_array_equal(quantizer(longer).ids[0, 0].numpy(), expected)
        unscaled = KMeans(centroids + 0.3, *statistics)
        assert not torch.equal(unscaled(longer).ids, unscaled(torch.from_numpy(rows)[None]).ids)
    again = KMeans.from_tensors(quantizer.state_dict(), spherical=True)
    assert again.config_dict() == quantizer.config_dict()
    np.testing.assert_array_equal(again(torch.from_numpy(rows)[None]).ids[0, 0].numpy(), expected)


def test_spherical_is_what_sklearn_finds_for_unit_rows():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((3000, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    model = SklearnKMeans(40, n_init=1, max_iter=5, random_state=0).fit(rows)
    model.cluster_centers_ /= np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True)
    found = KMeans(model.cluster_centers_, spherical=True)(torch.from_numpy(5 * rows)[None]).ids[0, 0].numpy()
    np.testing.assert_array_equal(found, model.predict(rows))


@pytest.mark.parametrize("standardized", [False, True])
def test_spherical_margin_is_what_a_frame_can_move(standardized):
    """As above; the worst direction is the tangent of the sphere towards the second centroid."""
    torch.manual_seed(3)
    centroids = directions(20, 5)
    mean, scale = (torch.randn(5), torch.rand(5) + 0.5) if standardized else (None, None)
    quantizer = KMeans(centroids, mean, scale, spherical=True)
    rows = torch.randn(1, 300, 5) * torch.logspace(-2, 2, 300)[None, :, None]
    codes = quantizer(rows)
    room = codes.margins[0] * rows[0].norm(dim=1)
    for _ in range(50):
        step = directions(300, 5) * room[:, None] * 0.999
        assert torch.equal(quantizer(rows + step).ids, codes.ids)
    if standardized:
        return
    length = rows[0].norm(dim=1, keepdim=True).double()
    unit = rows[0].double() / length
    normal = (centroids[(unit @ centroids.T.double()).topk(2).indices].double() * torch.tensor([[-1], [1]])).sum(1)
    # The plane between both centroids goes through the origin: the shortest way to it is along its normal.
    normal = torch.nn.functional.normalize(normal, dim=1)
    way = -(rows[0].double() * normal).sum(1, keepdim=True)
    moved = (rows[0] + way * normal * 1.001).float()[None]
    assert (quantizer(moved).ids != codes.ids).float().mean() > 0.95
    assert bool((way[:, 0] >= room * 0.999).all())
    assert float((room / way[:, 0]).median()) > 0.3  # and the bound is of use


def test_spherical_edges():
    quantizer = KMeans(np.eye(3), spherical=True)
    codes = quantizer(torch.tensor([[[0.0, 0, 0], [0, 0, 1e-30], [1, 1, 0]]]))
    assert codes.ids.tolist() == [[[0, 2, 0]]]
    assert codes.margins[0, [0, 2]].tolist() == [0, 0]
    alone = KMeans([[1.0, 0]], spherical=True)(torch.ones(1, 2, 2))
    assert bool((alone.margins >= 1).all())
    with pytest.raises(FormatError, match="length 1"):
        KMeans([[1.0, 1]], spherical=True)


def test_the_configuration_of_other_quantizers_is_as_it_was():
    """Fingerprints of tokenizers are made of it."""
    assert KMeans(np.eye(2)).config_dict() == {"clusters": 2, "dim": 2, "standardized": False}
    assert KMeans(np.eye(2), spherical=True).config_dict()["spherical"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3),), "shape"),
        ((np.zeros((0, 3)),), "shape"),
        ((np.full((2, 3), np.nan),), "NaN"),
        ((np.zeros((2, 3)), np.zeros(3)), "go together"),
        ((np.zeros((2, 3)), np.zeros(2), np.ones(2)), "dimensions"),
        ((np.zeros((2, 3)), np.zeros(3), np.zeros(3)), "positive"),
    ],
)
def test_bad_centroids_are_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        KMeans(*arguments)


def test_bad_frames_and_files_are_refused():
    with pytest.raises(FormatError, match="dimensions"):
        KMeans(np.zeros((2, 3)))(torch.zeros(1, 4, 5))
    with pytest.raises(FormatError, match="holds 'centroids'"):
        KMeans.from_tensors({"other": torch.zeros(2, 2)})
