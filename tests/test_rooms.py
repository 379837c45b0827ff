"""Simulated rooms: images against brute force and pyroomacoustics, the decay against what was asked for."""

import itertools
import math

import numpy as np
import pytest

from speechtok.audio.mixing import direct_path
from speechtok.audio.rooms import Shoebox, SimulatedRooms, draw_room, image_response
from speechtok.errors import AudioError

RATE = 16000
ROOM = Shoebox((5.3, 6.1, 3.2), (1.9, 2.2, 1.4), (3.1, 2.9, 1.1), 0.3)


def images(room, seconds, orders=8):
    """Distances and pressures of all images that arrive in time, one by one (Allen and Berkley 1979, equation 8)."""
    found = []
    for n in itertools.product(range(-orders, orders + 1), repeat=3):
        for q in itertools.product((0, 1), repeat=3):
            place = [2 * n[i] * room.size[i] + (1 - 2 * q[i]) * room.source[i] for i in range(3)]
            distance = math.dist(place, room.microphone)
            if distance < seconds * 343:
                reflections = sum(abs(n[i] - q[i]) + abs(n[i]) for i in range(3))
                found.append((distance, room.reflection**reflections / (4 * math.pi * distance)))
    return sorted(found)


def t20(response, rate=RATE):
    """Reverberation time by Schroeder's backward integration: a line through -5 to -25 dB."""
    energy = np.cumsum(response[::-1].astype(np.float64) ** 2)[::-1]
    level = 10 * np.log10(energy / energy[0] + 1e-30)
    begin, end = int(np.argmax(level <= -5)), int(np.argmax(level <= -25))
    return -60 / np.polyfit(np.arange(begin, end) / rate, level[begin:end], 1)[0]


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_images_are_those_of_brute_force(rate):
    seconds = 0.06
    expected = np.zeros(int(seconds * rate))
    time = np.arange(len(expected))
    for distance, pressure in images(ROOM, seconds + 0.01):
        offset = time - 40 - distance / 343 * rate
        window = np.where(np.abs(offset) < 40, 0.5 + 0.5 * np.cos(np.pi * offset / 40), 0.0)
        expected += pressure * np.sinc(offset) * window
    found = image_response(ROOM, rate)[: len(expected)]
    # Between two places of the finer grid amplitudes are off by up to 0.12 % at half the sample rate.
    assert np.abs(found - expected).max() < 1e-3 * expected.max()


def test_early_reflections_come_where_mirrors_are():
    """The first wall by hand: the floor, which both see 1.4 m and 1.1 m above it."""
    response = image_response(ROOM, 48000)
    flat = math.hypot(1.2, 0.7)
    for height, factor in ((0.3, 1.0), (2.5, ROOM.reflection)):
        distance = math.hypot(flat, height)
        place = 40 + distance / 343 * 48000
        near = slice(int(place) - 3, int(place) + 5)
        top = near.start + int(np.argmax(response[near]))
        left, here, right = response[top - 1 : top + 2]
        assert top + 0.5 * (left - right) / (left - 2 * here + right) == pytest.approx(place, abs=0.2)
        assert here == pytest.approx(factor / (4 * math.pi * distance), rel=0.2)


@pytest.mark.parametrize("rt60", [0.2, 0.4])
def test_pyroomacoustics_agrees(rt60):
    pra = pytest.importorskip("pyroomacoustics")
    room = draw_room(np.random.default_rng(0), rt60)
    filtered = pra.constants.get("rir_hpf_enable")
    pra.constants.set("rir_hpf_enable", False)
    try:
        theirs = pra.ShoeBox(
            room.size, fs=RATE, materials=pra.Material(1 - room.reflection**2), max_order=20, air_absorption=False
        )
        theirs.set_sound_speed(343.0)
        theirs.add_source(room.source)
        theirs.add_microphone(room.microphone)
        theirs.compute_rir()
    finally:
        pra.constants.set("rir_hpf_enable", filtered)
    count = 2200  # order 21 needs at least 20 heights of the room: 60 m, 2800 samples
    expected = theirs.rir[0][0][:count]  # without the factor 1 / (4 pi)
    found = 4 * np.pi * image_response(room, RATE)[:count]
    # Its table of sincs has 20 places between two samples.
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("rt60", [0.2, 0.3, 0.6, 1.0])
def test_reverberation_time_is_what_was_asked_for(rt60):
    generator = np.random.default_rng(1)
    ratios = [t20(SimulatedRooms().draw(generator, RATE, rt60)[0]) / rt60 for _ in range(12)]
    assert min(ratios) > 0.85 and max(ratios) < 1.15
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)


def test_response_ends_when_it_is_over():
    for rt60 in (0.3, 0.8):
        response = draw_room(np.random.default_rng(2), rt60).response(RATE)
        assert len(response) == pytest.approx((rt60 + 0.005) * RATE, abs=0.005 * RATE)
        assert np.sum(response[-len(response) // 20 :] ** 2) < 1e-5 * np.sum(response**2)
        # The rumble is gone: below 10 Hz there is 20 dB less than the mean.
        power = np.abs(np.fft.rfft(response.astype(np.float64))) ** 2
        hertz = np.fft.rfftfreq(len(response), 1 / RATE)
        assert power[hertz < 10].mean() < 1e-2 * power.mean()


def test_direct_sound_is_found():
    generator = np.random.default_rng(3)
    for _ in range(20):
        response, facts = SimulatedRooms().draw(generator, RATE)
        assert direct_path(response, RATE) == pytest.approx(40 + facts["distance_m"] / 343 * RATE, abs=1.01)
        assert response.dtype == np.float32 and np.isfinite(response).all()


def test_rooms_are_those_of_the_sampler():
    rooms = [draw_room(np.random.default_rng(index)) for index in range(600)]
    sizes = np.array([room.size for room in rooms])
    assert (sizes >= [5, 5, 3]).all() and (sizes <= [10, 10, 4]).all()
    for name in ("source", "microphone"):
        places = np.array([getattr(room, name) for room in rooms])
        assert (places[:, :2] >= 0.5 - 1e-9).all() and (places[:, :2] <= sizes[:, :2] - 0.5 + 1e-9).all()
        assert places[:, 2].min() >= 0.9 and places[:, 2].max() <= 1.8
    distances = np.array([room.distance for room in rooms])
    assert 0.66 <= distances.min() < 0.7 and 1.95 < distances.max() <= 2.0
    times = np.array([room.rt60 for room in rooms])
    assert 0.1 <= times.min() < 0.12 and 0.96 < times.max() <= 1.0
    # A third each of 0.4 ... 1.0, 0.2 ... 0.6 and 0.1 ... 0.3 s.
    assert times.mean() == pytest.approx((0.7 + 0.4 + 0.2) / 3, abs=0.03)


def test_a_given_time_changes_nothing_else():
    drawn, given = (draw_room(np.random.default_rng(5), rt60) for rt60 in (None, 0.77))
    assert given.rt60 == 0.77 != drawn.rt60
    assert (given.size, given.source, given.microphone) == (drawn.size, drawn.source, drawn.microphone)
    first, facts = SimulatedRooms().draw(np.random.default_rng(5), RATE)
    again, _ = SimulatedRooms().draw(np.random.default_rng(5), RATE)
    assert np.array_equal(first, again) and facts["rt60"] == drawn.rt60
    assert SimulatedRooms().draw(np.random.default_rng(5), 24000)[1] == facts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": (1.0, 7.0, 1.0)}, "source=.* outside"),
        ({"microphone": (0.0, 1.0, 1.0)}, "microphone=.* outside"),
        ({"source": (3.1, 2.9, 1.1)}, "in one place"),
        ({"rt60": 0.04}, "rt60=0.04: 0.05 to 2 s"),
        ({"rt60": math.nan}, "rt60=nan"),
    ],
)
def test_rooms_that_cannot_be(changes, message):
    with pytest.raises(AudioError, match=message):
        Shoebox(**{"size": ROOM.size, "source": ROOM.source, "microphone": ROOM.microphone, "rt60": 0.3} | changes)
