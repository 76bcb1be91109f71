from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.clusters.links import Links

NAMES = ("store", "in0", "in1", "disk")
limits = st.fixed_dictionaries({name: st.one_of(st.none(), st.integers(1, 10**10)) for name in NAMES})
paths = st.sets(st.sampled_from(NAMES), min_size=1).map(sorted)
transfers = st.lists(st.tuples(paths, st.integers(1, 10**13)), min_size=1, max_size=12)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


@given(limits, transfers)
def test_rates_are_max_min_fair(limits: dict[str, int | None], wanted: list[tuple[list[str], int]]) -> None:
    """No link carries more than it can; each transfer crosses a full link on which none is faster."""
    links = Links(limits)
    for number, (path, size) in enumerate(wanted):
        links.begin(str(number), path, size)
    rates = links.rates()
    load = {link: sum(rates[str(n)] for n, (path, _) in enumerate(wanted) if link in path) for link in NAMES if limits[link]}
    assert all(value <= limits[link] * (1 + 1e-9) for link, value in load.items() if (limits[link] or 0))
    for number, (path, _) in enumerate(wanted):
        limited = [link for link in path if link in load]
        if not limited:
            assert rates[str(number)] == math.inf
            continue
        full = [link for link in limited if close(load[link], limits[link] or 0)]
        fastest = {link: max(rates[str(n)] for n, (other, _) in enumerate(wanted) if link in other) for link in full}
        assert any(rates[str(number)] >= fastest[link] * (1 - 1e-9) for link in full)


@given(limits, transfers, st.lists(st.floats(0, 1), max_size=12))
def test_every_byte_is_carried_once_and_no_link_is_faster_than_its_limit(
    limits: dict[str, int | None], wanted: list[tuple[list[str], int]], pauses: list[float]
) -> None:
    """Transfers that begin at odd moments: what ended crossed its links whole, in no less time than each link needs."""
    links = Links(limits)
    clock, ended = 0.0, []
    for number, (path, size) in enumerate(wanted):
        links.begin(str(number), path, size)
        part = links.next_end() * (pauses[number] if number < len(pauses) else 0.0)
        ended += links.advance(part)
        clock += part
    while (seconds := links.next_end()) < math.inf:
        ended += links.advance(seconds)
        clock += seconds
    assert sorted(ended, key=int) == [str(number) for number in range(len(wanted))]
    for link in NAMES:
        crossed = sum(size for path, size in wanted if link in path)
        assert links.carried.get(link, 0) == crossed
        limit = limits[link]
        assert limit is None or clock >= crossed / limit * (1 - 1e-9)


def test_two_transfers_share_a_link_and_the_longer_one_has_it_alone_afterwards() -> None:
    links = Links({"store": 100.0})
    links.begin("short", ["store"], 100)
    links.begin("long", ["store"], 300)
    assert links.advance(links.next_end()) == ["short"]
    assert links.rates() == {"long": 100.0}
    assert links.next_end() == pytest.approx(2.0, abs=0)


def test_transfer_held_back_by_its_own_link_leaves_its_share_to_others() -> None:
    links = Links({"store": 100.0, "slow": 10.0})
    links.begin("held", ["store", "slow"], 10)
    links.begin("free", ["store"], 90)
    assert links.rates() == {"held": 10.0, "free": 90.0}
    assert links.advance(links.next_end()) == ["held", "free"]


def test_transfer_over_links_without_limit_ends_at_once() -> None:
    links = Links({"store": None})
    links.begin("a", ["store"], 10**12)
    assert links.next_end() == 0.0
    assert links.advance(0.0) == ["a"]
    assert links.carried == {"store": 10**12}
