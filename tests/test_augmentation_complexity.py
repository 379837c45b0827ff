"""Augmentation complexity against closed forms (spec section 8: hypercube, identity, silence, spectrum, monotone)."""

import itertools

import numpy as np
import pytest

from speechtok.errors import InputError
from speechtok.metrics.augmentation_complexity import (
    augmentation_complexity,
    calibrate,
    gaussian_scores,
    kernel_diagonal,
    posteriors,
    spectrum,
    unigram_scores,
)

CUBE = np.array(list(itertools.product((-1, 1), repeat=6)))  # [64, 6]


def masked(ratio: float, views: int, seed: int) -> np.ndarray:
    """Random masking of the corners of the hypercube: [64, V, 6], hidden coordinates are 0."""
    hidden = np.random.default_rng(seed).random((len(CUBE), views, CUBE.shape[1])) < ratio
    return np.where(hidden, 0, CUBE[:, None])


def exact(views: np.ndarray) -> np.ndarray:
    """The posterior of masked corners: equal shares of all corners that agree with what is seen."""
    agree = ((views[:, :, None] == 0) | (views[:, :, None] == CUBE)).all(-1)
    return agree / agree.sum(-1, keepdims=True)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.7])
def test_hypercube_has_its_closed_form(ratio: float) -> None:
    found = kernel_diagonal(exact(masked(ratio, 4000, 0)))
    assert found.mean() == pytest.approx((2 - ratio) ** 6, rel=0.02)
    assert np.percentile(found, 99) == pytest.approx((2 - ratio) ** 6, rel=0.06)  # spread by sampling


def test_the_estimator_finds_the_hypercube_from_units() -> None:
    # A view as a bag of units: which coordinate has which sign. Fitted frequencies and a temperature that is chosen
    # on other views give the exact posterior's value.
    def bags(seed: int, views: int) -> list[list[np.ndarray]]:
        return [
            [np.flatnonzero(view) * 2 + (view[view != 0] > 0) for view in of_one] for of_one in masked(0.4, views, seed)
        ]

    train, chosen, tested = bags(1, 400), bags(2, 40), bags(3, 400)
    scores = [unigram_scores(train, views, 12, smoothing=1e-3) for views in (chosen, tested)]
    result = augmentation_complexity(*scores, resamples=100)
    assert result["mean"] == pytest.approx(1.6**6, rel=0.02)
    assert result["ci"][0] <= result["bits"] <= result["ci"][1]
    assert not result["saturated"] and result["most_bits"] == 6


def test_the_spectrum_sums_to_the_mean() -> None:
    posterior = exact(masked(0.4, 300, 4))
    values = spectrum(posterior)
    assert values[0] == pytest.approx(1)
    assert values.sum() == pytest.approx(kernel_diagonal(posterior).mean())
    assert (np.abs(values) <= 1 + 1e-12).all()


def gaussians(noise: float, seed: int, views: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    utterances = generator.normal(size=(128, 1, 8))
    sets = (utterances + noise * generator.normal(size=(128, views, 8)) for _ in range(3))
    return tuple(sets)  # type: ignore[return-value]


def test_identity_saturates_and_silence_gives_one() -> None:
    train, chosen, tested = gaussians(1e-6, 0)
    result = augmentation_complexity(gaussian_scores(train, chosen), gaussian_scores(train, tested), resamples=50)
    assert result["mean"] == pytest.approx(128) and result["saturated"]
    train, chosen, tested = gaussians(1e6, 0)
    result = augmentation_complexity(gaussian_scores(train, chosen), gaussian_scores(train, tested), resamples=50)
    assert result["mean"] == pytest.approx(1, abs=0.02)
    assert 0 <= result["bits"] < 0.2 and not result["saturated"]


def test_more_noise_leaves_less() -> None:
    bits = []
    for noise in (0.1, 0.3, 1.0, 3.0):
        train, chosen, tested = gaussians(noise, 1)
        bits.append(
            augmentation_complexity(gaussian_scores(train, chosen), gaussian_scores(train, tested), resamples=50)[
                "bits"
            ]
        )
    assert bits == sorted(bits, reverse=True)
    assert bits[0] - bits[-1] > 3


def test_gaussian_scores_are_log_likelihoods() -> None:
    from scipy.stats import multivariate_normal

    train, views, _ = gaussians(0.5, 2, views=5)
    variance = train.var(1, ddof=1).mean(0)
    wanted = np.stack([multivariate_normal(m, np.diag(variance)).logpdf(views) for m in train.mean(1)], -1)
    found = gaussian_scores(train, views)
    difference = found - wanted
    np.testing.assert_allclose(difference, np.broadcast_to(difference[..., :1], difference.shape), atol=1e-8)


def test_unigram_scores_count() -> None:
    train = [[np.array([0, 0, 1])], [np.array([1, 1, 1])]]
    scores = unigram_scores(train, [[np.array([0, 1])], [np.array([], int)]], 2, smoothing=2.0)
    common = (np.array([2, 4]) + 0.5) / 7
    shares = (np.array([[2, 1], [0, 3]]) + 2 * common) / 5
    np.testing.assert_allclose(scores[0, 0], np.log(shares).sum(1))
    np.testing.assert_array_equal(scores[1, 0], 0)


def test_an_overconfident_posterior_is_cooled() -> None:
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(32, 200, 32))
    scores[np.arange(32), :, np.arange(32)] += 1.0  # the true log ratio of two unit normals a unit apart
    cool = calibrate(8 * scores)
    assert cool / 8 == pytest.approx(1, rel=0.2)
    hot = kernel_diagonal(posteriors(8 * scores)).mean()
    assert kernel_diagonal(posteriors(8 * scores, cool)).mean() < hot


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="utterances, views, utterances"):
        kernel_diagonal(np.ones((3, 2, 4)))
    with pytest.raises(InputError, match="V >= 2"):
        gaussian_scores(np.ones((3, 1, 4)), np.ones((3, 2, 4)))
    with pytest.raises(InputError, match="same ones"):
        augmentation_complexity(np.ones((3, 2, 3)), np.ones((4, 2, 4)))
    with pytest.raises(InputError, match="vocabulary of 2"):
        unigram_scores([[np.array([2])]], [[np.array([0])]], 2)
    with pytest.raises(InputError, match="smoothing"):
        unigram_scores([[np.array([1])]], [[np.array([0])]], 2, smoothing=0)
    with pytest.raises(InputError, match="same number"):
        unigram_scores([[np.array([1])], []], [[np.array([0])]], 2)
