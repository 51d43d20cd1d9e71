"""Latencies as counts: how true they are, and that merging is adding."""

import random

import pytest

from loadtest.histogram import SIZE, Histogram, index, value


def test_a_bucket_is_three_per_cent_wide_at_most() -> None:
    for exponent in range(360):
        microseconds = int(1.07**exponent)
        assert abs(value(index(microseconds)) * 1000 - microseconds) <= max(1.0, 0.032 * microseconds)


def test_buckets_ascend_without_holes() -> None:
    seen = [index(microseconds) for microseconds in range(200_000)]
    assert seen == sorted(seen)
    assert set(seen) == set(range(seen[-1] + 1))


def test_what_is_out_of_range_is_counted_at_its_ends() -> None:
    assert index(-5) == 0
    assert index(1 << 50) == SIZE - 1


def test_merging_parts_is_counting_all_in_one() -> None:
    numbers = random.Random(1)
    whole, parts = Histogram(), [Histogram() for _ in range(7)]
    for _ in range(10_000):
        microseconds = int(numbers.expovariate(1 / 50_000))
        whole.add(microseconds)
        numbers.choice(parts).add(microseconds)
    merged = Histogram()
    for part in parts:
        merged.merge(part.take())
        assert part.total == 0
    assert merged.buckets == whole.buckets
    assert merged.summary() == whole.summary()


def test_percentiles() -> None:
    counted = Histogram()
    for milliseconds in range(1, 1001):
        counted.add(milliseconds * 1000)
    p50, p99, most = counted.percentiles([0.5, 0.99, 1.0])
    assert p50 == pytest.approx(500, rel=0.04)
    assert p99 == pytest.approx(990, rel=0.04)
    assert most == pytest.approx(1000, rel=0.04)


def test_nothing_counted_is_zero() -> None:
    assert Histogram().percentiles([0.5, 1.0]) == [0.0, 0.0]
