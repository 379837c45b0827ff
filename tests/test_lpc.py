"""Forms of all-pole filters against numpy's roots, scipy's filters and Fourier transforms."""

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.audio.lpc import (
    LIMIT,
    cepstrum_to_lpc,
    is_stable,
    lar_to_reflection,
    lpc_to_cepstrum,
    lpc_to_lsf,
    lpc_to_poles,
    lpc_to_reflection,
    lsf_to_lpc,
    poles_to_lpc,
    power_spectrum,
    reflection_to_lar,
    reflection_to_lpc,
    stabilized,
    warped,
)
from speechtok.kernels.burg import burg

ORDERS = [1, 2, 3, 4, 7, 8, 16, 17]
TIGHT = {"rtol": 0, "atol": 1e-9}


def filters(order, count=20, seed=0, radius=0.95):
    """Stable filters out of random poles, by numpy: float64 [count, order]."""
    rng = np.random.default_rng([seed, order])
    rows = []
    for _ in range(count):
        half = rng.uniform(0.1, radius, order // 2) * np.exp(1j * rng.uniform(0, np.pi, order // 2))
        real = rng.uniform(-radius, radius, order % 2)
        rows.append(np.poly(np.concatenate([half, half.conj(), real])).real[1:])
    return torch.from_numpy(np.stack(rows))


def log_spectrum(lpc, size=4096):
    """Of 1 / A, float64 [count, size], by numpy."""
    whole = np.concatenate([np.ones((len(lpc), 1)), lpc.numpy()], 1)
    return -2 * np.log(np.abs(np.fft.fft(whole, size)))


@pytest.mark.parametrize("order", ORDERS)
def test_reflection_there_and_back(order):
    lpc = filters(order)
    reflection = lpc_to_reflection(lpc)
    assert bool((reflection.abs() < 1).all())
    torch.testing.assert_close(reflection_to_lpc(reflection), lpc, **TIGHT)
    torch.testing.assert_close(lar_to_reflection(reflection_to_lar(reflection)), reflection, **TIGHT)


def test_reflection_of_burgs_filters():
    windows = torch.randn(9, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(1)
    lpc, _, reflection = burg(windows, 12)
    torch.testing.assert_close(reflection_to_lpc(reflection), lpc, **TIGHT)
    torch.testing.assert_close(lpc_to_reflection(lpc), reflection, rtol=0, atol=1e-6)


def test_log_area_ratios_have_an_end():
    k = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    lar = reflection_to_lar(k)
    assert lar[:3].tolist() == pytest.approx([-np.log((1 + LIMIT) / (1 - LIMIT)), 0, np.log(3)], rel=1e-9)
    assert bool((lar_to_reflection(torch.tensor([-900.0, 900.0])).abs() < 1).all())


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_stable_is_what_numpys_roots_say(seed, order):
    lpc = filters(order, 8, seed, radius=1.2)
    largest = np.array([np.abs(np.roots([1, *row])).max() for row in lpc.numpy()])
    clear = np.abs(largest - 1) > 1e-6
    assert np.array_equal(is_stable(lpc).numpy()[clear], (largest < 1)[clear])


@pytest.mark.parametrize("order", ORDERS)
def test_line_spectral_frequencies_are_the_zeros_of_both_polynomials(order):
    lpc = filters(order)
    found = lpc_to_lsf(lpc)
    for row, lsf in zip(lpc.numpy(), found.numpy(), strict=True):
        longer = np.array([1, *row, 0])
        zeros = np.concatenate([np.roots(longer + longer[::-1]), np.roots(longer - longer[::-1])])
        assert np.abs(np.abs(zeros) - 1).max() < 1e-3
        angles = np.sort(np.angle(zeros))
        inside = angles[(angles > 1e-5) & (angles < np.pi - 1e-5)]
        assert inside.shape == lsf.shape == (order,)
        assert np.abs(inside - lsf).max() < 1e-6
        assert (np.diff(lsf) > 0).all()
    torch.testing.assert_close(lsf_to_lpc(found), lpc, rtol=0, atol=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_ascending_frequencies_give_stable_filters(order):
    gaps = np.random.default_rng(order).uniform(0.05, 1, (30, order + 1))
    lsf = torch.from_numpy(np.pi * (gaps.cumsum(1) / gaps.sum(1, keepdims=True))[:, :-1])
    lpc = lsf_to_lpc(lsf)
    assert bool(is_stable(lpc).all())
    torch.testing.assert_close(lpc_to_lsf(lpc), lsf, rtol=0, atol=1e-6)
    torch.testing.assert_close(lpc_to_lsf(lpc[0]), lsf[0], rtol=0, atol=1e-6)


def test_frequencies_of_no_filter_are_evenly_spread():
    found = lpc_to_lsf(torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(found, torch.arange(1, 6, dtype=torch.float64) * torch.pi / 6)


@pytest.mark.parametrize("order", ORDERS)
def test_cepstrum_is_that_of_the_fourier_transform(order):
    lpc = filters(order)
    expected = np.fft.ifft(log_spectrum(lpc, 4096)).real
    found = lpc_to_cepstrum(lpc, 25)
    assert found.shape == (20, 25)
    assert np.abs(expected[:, 0]).max() < 1e-9  # of a variance of 1
    assert np.abs(found.numpy() - expected[:, 1:26]).max() < 1e-9
    assert torch.equal(lpc_to_cepstrum(lpc), found[:, :order])
    torch.testing.assert_close(cepstrum_to_lpc(found[:, :order]), lpc, rtol=0, atol=1e-8)


def test_distance_of_weighted_cepstra_is_martins():
    one, two = (filters(2, 10, seed) for seed in (1, 2))
    places = torch.arange(1, 2001, dtype=torch.float64)
    distance = (places * (lpc_to_cepstrum(one, 2000) - lpc_to_cepstrum(two, 2000)).square()).sum(1)
    for a, b, found in zip(one.numpy(), two.numpy(), distance.tolist(), strict=True):
        p, q = np.roots([1, *a]), np.roots([1, *b])

        def between(x, y):
            return np.prod(1 - np.outer(x, y.conj()))

        expected = np.log(np.abs(between(p, q)) ** 2 / (between(p, p) * between(q, q)).real)
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_poles_there_and_back(order):
    lpc = filters(order)
    poles = lpc_to_poles(lpc)
    assert poles.shape == lpc.shape
    whole = torch.nn.functional.pad(lpc, (1, 0), value=1.0)
    powers = poles[..., None] ** torch.arange(order, -1, -1)
    assert float((powers * whole[:, None]).sum(-1).abs().max()) < 1e-9
    torch.testing.assert_close(poles_to_lpc(poles), lpc, rtol=0, atol=1e-8)


def test_poles_outside_are_reflected_and_the_spectrum_stays():
    angles = torch.linspace(0, torch.pi, 101, dtype=torch.float64)
    lpc = torch.cat([filters(6, 5), filters(6, 40, radius=1.4)])
    variance = torch.linspace(0.5, 2, 45, dtype=torch.float64)
    before = lpc.clone()
    found, level = stabilized(lpc, variance)
    fine = is_stable(lpc)
    assert 10 < int(fine.sum()) < 40
    assert torch.equal(lpc, before)
    assert torch.equal(found[fine], lpc[fine])
    assert torch.equal(level[fine], variance[fine])
    assert bool(is_stable(found).all())
    expected = power_spectrum(lpc, variance, angles)
    torch.testing.assert_close(power_spectrum(found, level, angles), expected, rtol=1e-6, atol=0)


def test_a_pole_on_the_circle_comes_inside():
    lpc = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    found, variance = stabilized(lpc, torch.tensor(1.0, dtype=torch.float64))
    assert bool(is_stable(found))
    assert found.tolist() == pytest.approx([-LIMIT, 0])
    assert float(variance) == 1


def test_poles_that_coefficients_cannot_hold_apart_move_inwards():
    """Of sixteen at the same place on the circle the rounding of the coefficients alone takes some far outside."""
    lpc = poles_to_lpc(torch.full((1, 16), LIMIT, dtype=torch.complex128))
    assert not bool(is_stable(lpc))
    found, _ = stabilized(lpc, torch.ones(1, dtype=torch.float64))
    assert bool(is_stable(found))
    response = np.abs(scipy.signal.lfilter([1.0], [1, *found[0].tolist()], np.eye(1, 40_000)[0]))
    assert response[-500:].max() < 1e-6 * response.max()
    wild = lar_to_reflection(30 * torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found, variance = stabilized(reflection_to_lpc(wild), torch.ones(50, dtype=torch.float64))
    assert bool((is_stable(found) & variance.isfinite()).all())


def test_spectrum_is_that_of_scipys_filter():
    lpc, angles = filters(9), np.linspace(0, np.pi, 50)
    found = power_spectrum(lpc, torch.full((20,), 0.3, dtype=torch.float64), torch.from_numpy(angles))
    for row, values in zip(lpc.numpy(), found.numpy(), strict=True):
        response = scipy.signal.freqz([1.0], [1, *row], angles)[1]
        np.testing.assert_allclose(values, 0.3 * np.abs(response) ** 2, rtol=1e-9)


@pytest.mark.parametrize("warp", [-0.5, 0.0, 0.2, 0.58])
def test_angles_are_the_phase_of_all_pass_sections(warp):
    angles = np.linspace(0.01, 3.13, 60)
    section = scipy.signal.freqz([-warp, 1.0], [1.0, -warp], angles)[1]
    found = warped(torch.from_numpy(angles), warp)
    assert np.abs(np.exp(-1j * found.numpy()) - section).max() < 1e-12
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("warp", [-0.4, 0.2, 0.58])
def test_warping_and_back_finds_a_resonator(warp):
    """Its peak within 1 %, its power, and for white noise a flat spectrum."""
    rng, angles = np.random.default_rng(0), torch.arange(4096, dtype=torch.float64) * torch.pi / 4096
    noise = rng.standard_normal(8000)
    for frequency in (0.2, 0.7, 1.5):
        bottom = [1, -2 * 0.98 * np.cos(frequency), 0.98**2]
        window = scipy.signal.lfilter([1.0], bottom, noise)
        lpc, variance, _ = burg(torch.from_numpy(window)[None], 10, warp)
        found = power_spectrum(lpc, variance, angles, warp)[0]
        peak = np.abs(scipy.signal.freqz([1.0], bottom, angles.numpy())[1]).argmax()
        assert float(angles[found.argmax()]) == pytest.approx(float(angles[peak]), rel=0.01)
        assert float(found.mean()) == pytest.approx(float(np.mean(window**2)), rel=0.01)
    lpc, variance, _ = burg(torch.from_numpy(rng.standard_normal(100_000))[None], 4, warp)
    flat = power_spectrum(lpc, variance, angles, warp)[0]
    assert float((flat - 1).abs().max()) < 0.05
