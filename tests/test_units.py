import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechtok.errors import FingerprintError, FormatError
from speechtok.units import Units, expand_runs, run_lengths


def make(ids, first=0, fingerprint="f"):
    ids = np.asarray(ids, np.int32)
    starts = 40 + 320 * (first + np.arange(ids.shape[-1]))
    return Units(ids, starts, starts + 320, 16000, 10, fingerprint)


@given(st.lists(st.integers(0, 9), max_size=200))
def test_run_lengths_round_trip(ids):
    ids = np.array(ids, np.int32)
    units, durations = run_lengths(ids)
    assert np.array_equal(expand_runs(units, durations), ids)
    assert durations.sum() == len(ids)
    assert not (units[1:] == units[:-1]).any()
    assert units.dtype == durations.dtype == np.int32


@given(st.lists(st.integers(0, 3), max_size=50))
def test_runs_of_runs_are_the_runs(ids):
    once = run_lengths(np.array(ids, np.int32))[0]
    assert run_lengths(once)[0].tolist() == once.tolist()
    assert bool(len(once)) == bool(ids)  # none of none


def test_deduplicated_spans_cover_the_runs():
    units = make([5, 5, 1, 1, 1, 5]).deduplicated()
    assert units.ids.tolist() == [5, 1, 5]
    assert units.starts.tolist() == [40, 680, 1640]
    assert units.ends.tolist() == [680, 1640, 1960]
    assert units.ends_seconds[-1] == 1960 / 16000


def test_concatenate_and_equality():
    whole = make([1, 2, 3, 4])
    assert Units.concatenate([make([1, 2]), make([3, 4], first=2)]) == whole
    assert whole != make([1, 2, 3, 5])
    assert whole != "units"
    books = make([[1, 2], [3, 4]])
    assert Units.concatenate([books, books]).ids.shape == (2, 4)
    with pytest.raises(FingerprintError, match="cannot follow"):
        Units.concatenate([whole, make([1], fingerprint="g")])
    with pytest.raises(FormatError, match="nothing"):
        Units.concatenate([])
    with pytest.raises(FormatError, match="one codebook"):
        books.run_lengths()


def test_text():
    assert str(make([3, 1])) == "3 1"
    assert str(make([[3, 1], [2, 2]])) == "3 1\n2 2"
    assert len(make([[3, 1], [2, 2]])) == 2


def test_bad_values_are_refused():
    with pytest.raises(FormatError, match="vocabulary"):
        make([10])
    with pytest.raises(FormatError, match="vocabulary"):
        make([-1])
    with pytest.raises(FormatError, match="fit together"):
        Units(np.zeros(3, np.int32), np.zeros(2), np.zeros(2), 16000, 10, "f")
    with pytest.raises(FormatError, match="equally many"):
        expand_runs(np.zeros(2, np.int32), np.zeros(1, np.int32))
    with pytest.raises(FormatError, match="at least 1"):
        expand_runs(np.zeros(1, np.int32), np.zeros(1, np.int32))
