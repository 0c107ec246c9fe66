"""What `auto` means on this machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.device import MOST_LANES, plan_lanes


@pytest.mark.parametrize(
    ("threads", "lanes"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 3), (7, 3), (8, 4), (32, 4)]
)
def test_lanes_share_the_threads(threads: int, lanes: int) -> None:
    assert plan_lanes(threads, device="cpu") == lanes
    assert plan_lanes(threads, device="cuda:1") == 1


@given(st.integers(1, 512))
def test_at_most_one_thread_has_no_lane(threads: int) -> None:
    lanes = plan_lanes(threads, device="cpu")
    assert 1 <= lanes <= MOST_LANES
    assert threads - lanes * (threads // lanes) <= 1
