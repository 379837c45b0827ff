"""The Burg kernel: numba against librosa, least squares and the reference; warping; silence; Triton, interpreted."""

import os
import subprocess
import sys

import librosa
import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.errors import InputError
from speechtok.kernels.burg import burg, burg_reference


def coloured(windows, samples, seed=0):
    """Windows of noise through stable filters of order 4, with levels over four decades: float64 [W, n]."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(windows):
        half = rng.uniform(0.2, 0.97, 2) * np.exp(1j * rng.uniform(0.1, 3.0, 2))
        noise = rng.standard_normal(samples + 200) * 10 ** rng.uniform(-4, 0)
        rows.append(scipy.signal.lfilter([1.0], np.poly([*half, *half.conj()]).real, noise)[200:])
    return torch.from_numpy(np.stack(rows))


def delayed(signal, warp, sections):
    """A signal after so many all-pass sections (z^-1 - warp) / (1 - warp z^-1)."""
    for _ in range(sections):
        signal = scipy.signal.lfilter([-warp, 1.0], [1.0, -warp], signal)
    return signal


def least_squares(window, order):
    """Burg's filter stage by stage, each from scratch: the filter so far run over the whole window both ways, the best
    coefficient by numpy's least squares, the next filter by polynomial arithmetic.
    """
    a, variance, reflection = np.ones(1), np.mean(window**2), []
    for _ in range(order):
        forward = np.convolve(window, a, "valid")[1:]
        backward = np.convolve(window[::-1], a, "valid")[::-1][:-1]
        target, basis = -np.concatenate([forward, backward]), np.concatenate([backward, forward])
        k = float(np.linalg.lstsq(basis[:, None], target, rcond=None)[0][0])
        a = np.polyadd(np.append(a, 0.0), k * np.append(0.0, a[::-1]))
        variance *= 1 - k**2
        reflection.append(k)
    return a[1:], variance, reflection


@pytest.mark.parametrize("order", [1, 2, 3, 8, 16, 17, 32])
def test_librosa(order):
    windows = coloured(9, 400, order)
    coefficients, _, _ = burg(windows, order)
    expected = librosa.lpc(windows.numpy(), order=order)
    assert np.array_equal(expected[:, 0], np.ones(9))
    assert np.abs(coefficients.numpy() - expected[:, 1:]).max() < 1e-10


@pytest.mark.parametrize(("samples", "order"), [(400, 16), (40, 5), (33, 32), (3, 2), (2, 1)])
def test_least_squares_of_whole_sequences(samples, order):
    windows = coloured(5, samples, samples)
    for window, a, variance, reflection in zip(windows, *burg(windows, order), strict=True):
        expected = least_squares(window.numpy(), order)
        scale = max(1.0, np.abs(expected[0]).max())
        assert np.abs(a.numpy() - expected[0]).max() < 1e-10 * scale
        assert np.abs(reflection.numpy() - expected[2]).max() < 1e-10
        assert float(variance) == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("warp", [-0.4, 0.2, 0.58])
def test_warped_stages_are_least_squares_too(warp):
    """Stage m from the definition: the lattice of all-pass sections written out over the whole sound.

    The kernel's sections begin anew in every stage and window, those of scipy before the sound; after enough samples of
    silence both are the same, as long as the signal is, so the window begins with zeros.
    """
    signal = np.concatenate([np.zeros(40), coloured(1, 600, 3)[0].numpy()])
    forward, backward = signal, signal
    for k in burg(torch.from_numpy(signal)[None], 6, warp)[2][0].tolist():
        behind = delayed(backward, warp, 1)
        best = -2 * (forward @ behind) / (forward @ forward + behind @ behind)
        assert k == pytest.approx(best, abs=1e-10)
        forward, backward = forward + best * behind, behind + best * forward


def test_warping_predicts_from_all_pass_sections():
    """Noise whose spectrum is a two-pole filter of sections: the poles are found again."""
    warp, truth = 0.5, np.array([-1.2, 0.72])
    rng = np.random.default_rng(0)
    # 1 / A(D(z)) as a plain filter: numerator and denominator times (1 - warp z^-1)^2.
    section, delay = np.array([1.0, -warp]), np.array([-warp, 1.0])
    bottom = (
        np.convolve(section, section) + truth[0] * np.convolve(delay, section) + truth[1] * np.convolve(delay, delay)
    )
    # Burg whitens on the unwarped axis, hence the all-pole tilt 1 / (1 - warp z^-1) besides.
    noise = scipy.signal.lfilter([1.0], [1.0, -warp], rng.standard_normal(60_000))
    window = scipy.signal.lfilter(np.convolve(section, section), bottom, noise)
    coefficients, _, _ = burg(torch.from_numpy(window)[None], 2, warp)
    assert np.abs(np.roots([1, *coefficients[0].tolist()]) - np.roots([1, *truth])).max() < 0.02


def test_poles_of_a_known_filter():
    poles = np.array([0.9 * np.exp(0.4j), 0.8 * np.exp(1.9j)])
    poles = np.concatenate([poles, poles.conj()])
    noise = np.random.default_rng(1).standard_normal(4500)
    window = scipy.signal.lfilter([1.0], np.poly(poles).real, 0.3 * noise)[500:]
    coefficients, variance, _ = burg(torch.from_numpy(window)[None], 4)
    found = np.roots([1, *coefficients[0].tolist()])
    assert max(np.abs(found - pole).min() for pole in poles) < 0.02
    assert float(variance) == pytest.approx(0.09, rel=0.1)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.integers(2, 60),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.3, -0.7]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_the_reference(seed, count, samples, order, warp):
    order = min(order, samples - 1)
    windows = torch.randn(count, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = windows.clone()
    found = burg(windows, order, warp)
    assert [tuple(value.shape) for value in found] == [(count, order), (count,), (count, order)]
    for value, expected in zip(found, burg_reference(windows, order, warp), strict=True):
        scale = expected.abs().amax().clamp_min(1.0) if count else 1.0
        assert bool(((value - expected).abs() <= 1e-8 * scale).all())
    assert bool((found[2].abs() <= 1).all())
    assert torch.equal(windows, before)


@pytest.mark.parametrize("warp", [0.0, 0.58])
def test_a_window_is_the_same_to_the_bit_in_any_batch(warp):
    windows = coloured(50, 400)
    together = burg(windows, 16, warp)
    strided = burg(windows.T.contiguous().T, 16, warp)
    for row in (0, 7, 49):
        alone = burg(windows[row : row + 1], 16, warp)
        for one, many, other in zip(alone, together, strided, strict=True):
            assert torch.equal(one[0], many[row])
            assert torch.equal(one[0], other[row])


@pytest.mark.parametrize("scale", [1e-6, 10.0])
def test_gain_changes_nothing_but_the_variance(scale):
    windows = coloured(20, 400)
    (a, variance, k), (b, other, q) = burg(windows, 16, 0.58), burg(scale * windows, 16, 0.58)
    torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    torch.testing.assert_close(q, k, rtol=0, atol=1e-10)
    torch.testing.assert_close(other, scale**2 * variance, rtol=1e-9, atol=0)


AT = torch.arange(400, dtype=torch.float64)
ODD = {
    "zeros": torch.zeros_like(AT),
    "constant": torch.ones_like(AT),
    "alternating": (-1.0) ** AT,
    "impulse": (AT == 200).double(),
    "first sample": (AT == 0).double(),
    "last sample": (AT == 399).double(),
    "tone": torch.sin(0.3 * AT),
    "one step of 16 bits": ((AT > 300) / 32768).double(),
    "denormal": 1e-310 * torch.sin(AT),
    "loud": 1e6 * torch.sin(AT**2),
}


@pytest.mark.parametrize("warp", [0.0, 0.58])
@pytest.mark.parametrize("name", ODD)
def test_odd_windows_stay_finite_and_stable(name, warp):
    for value in (*burg(ODD[name][None], 20, warp), *burg_reference(ODD[name][None], 20, warp)):
        assert bool(value.isfinite().all())
    _, variance, reflection = burg(ODD[name][None], 20, warp)
    assert bool((reflection.abs() <= 1).all())
    assert 0 <= float(variance) <= float(ODD[name].square().mean())


def test_silence_up_to_the_floor():
    quiet = coloured(6, 400)
    quiet *= (torch.tensor([1, 3, 9, 11, 30, 100]) * 1e-10 / quiet.square().mean(1)).sqrt()[:, None]
    coefficients, variance, reflection = burg(quiet, 8, 0.3, floor=1e-9)
    silent = torch.tensor([True, True, True, False, False, False])
    assert not coefficients[silent].any()
    assert not reflection[silent].any()
    torch.testing.assert_close(variance[silent], quiet.square().mean(1)[silent])
    for value, expected in zip((coefficients, variance, reflection), burg(quiet, 8, 0.3), strict=True):
        assert torch.equal(value[~silent], expected[~silent])
    torch.testing.assert_close(burg_reference(quiet, 8, 0.3, 1e-9)[2], reflection, rtol=0, atol=1e-10)


def test_what_is_no_number_stays_none():
    windows = coloured(3, 50)
    windows[1, 20] = torch.nan
    for find in (burg, burg_reference):
        for value in find(windows, 4):
            assert value.isnan().reshape(3, -1).any(1).tolist() == [False, True, False]


def test_bad_arguments_are_refused():
    windows = torch.zeros(3, 10, dtype=torch.float64)
    for wrong in (windows.float(), windows[0]):
        with pytest.raises(InputError, match="float64"):
            burg(wrong, 2)
    for order in (0, 10):
        with pytest.raises(InputError, match="order"):
            burg(windows, order)
    for options in ({"warp": 1.0}, {"warp": float("nan")}, {"floor": -1.0}, {"floor": float("inf")}):
        with pytest.raises(InputError, match="between -1 and 1"):
            burg(windows, 2, **options)


@pytest.mark.parametrize("count", [0, 3])
def test_opcheck(count):
    windows = torch.randn(count, 30, dtype=torch.float64)
    torch.library.opcheck(torch.ops.speechtok.burg, (windows, 5, 0.3, 1e-9))


TRITON = """
import torch
from speechtok.kernels.burg import burg, burg_triton
cases = [(0, 9, 3, 0.0), (35, 30, 7, 0.0), (3, 41, 4, 0.58), (2, 2, 1, -0.3), (33, 9, 8, 0.2)]
for count, samples, order, warp in cases:
    windows = torch.randn(count, samples, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    windows[1:2] = 0
    windows[2:3] *= 1e-6
    before = windows.clone()
    for floor in (0.0, 1e-9):
        found = burg_triton(windows, order, warp, floor)
        for value, expected in zip(found, burg(windows, order, warp, floor), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
            assert value.is_contiguous()
    assert torch.equal(windows, before)
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
    windows = coloured(300, 400)
    windows[5] = 0
    for value, expected in zip(burg(windows.cuda(), 16, 0.58), burg(windows, 16, 0.58), strict=True):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-9, atol=1e-10)
