from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import SpecError
from orchestrator.planning.steps import Kind
from orchestrator.spec.decoding import decode
from orchestrator.spec.rates import STEP_RATES, PoolRates, RatesSpec, StepRate, fit

GB = 10**9


def test_defaults_know_every_kind_of_step() -> None:
    assert set(STEP_RATES) == {kind.value for kind in Kind}


def test_compute_seconds_the_pools_own_rate_comes_first_then_the_files_then_the_default() -> None:
    rates = RatesSpec(
        start_seconds=1.0,
        steps={"build": StepRate(seconds=10.0)},
        pools={"fast": PoolRates(speed=2.0), "gpu": PoolRates(steps={"build": StepRate(seconds=100.0, seconds_per_gb=3.0)})},
    )
    assert rates.compute_seconds("build", 2 * GB, "gpu") == 1 + 100 + 6
    assert rates.compute_seconds("build", 2 * GB, "fast") == 1 + 10 / 2
    assert rates.compute_seconds("build", 2 * GB, "elsewhere") == 1 + 10
    assert rates.compute_seconds("convert", GB, "fast") == 1 + STEP_RATES["convert"].of(GB) / 2


def test_rates_file_sizes_may_have_units_and_wrong_kinds_are_named() -> None:
    read = decode(RatesSpec, {"store_read": "5GB", "pools": {"a": {"network": "1.25GB"}}}, "rates.yaml")
    assert (read.store_read, read.pool("a").network) == (5 * GB, 1_250_000_000)
    with pytest.raises(SpecError, match=r"steps\.compile"):
        decode(RatesSpec, {"steps": {"compile": {"seconds": 1}}}, "rates.yaml")


@pytest.mark.parametrize("plain", [{"store_read": 0}, {"pools": {"a": {"network": "0GB"}}}, {"pools": {"a": {"disk": 0}}}])
def test_rates_file_with_a_link_of_no_speed_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="greater than or equal to 1"):
        decode(RatesSpec, plain, "rates.yaml")


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.lists(st.integers(GB // 100, 100 * GB), min_size=2, max_size=20, unique=True))
def test_fit_points_on_a_line_finds_it(seconds: float, per_gb: float, sizes: list[int]) -> None:
    rate = StepRate(seconds=seconds, seconds_per_gb=per_gb)
    found = fit([(size, rate.of(size)) for size in sizes], StepRate(seconds=1e-9))
    assert found is not None
    for size in sizes:
        assert found.of(size) == pytest.approx(rate.of(size), rel=0.02, abs=0.1) or max(sizes) < 1.5 * min(sizes)


def test_fit_points_of_one_size_keep_the_defaults_base() -> None:
    found = fit([(2 * GB, 9.0), (2 * GB, 11.0)], StepRate(seconds=4.0, seconds_per_gb=99.0))
    assert found == StepRate(seconds=4.0, seconds_per_gb=3.0)


def test_fit_steps_quicker_than_the_defaults_base_have_no_slope() -> None:
    assert fit([(GB, 0.5)], StepRate(seconds=4.0)) == StepRate(seconds=0.5, seconds_per_gb=0.0)


def test_fit_larger_steps_that_were_quicker_do_not_get_a_negative_rate() -> None:
    found = fit([(GB, 10.0), (3 * GB, 4.0)], StepRate(seconds=1.0))
    assert found == StepRate(seconds=1.0, seconds_per_gb=3.0)


def test_fit_nothing_seen_is_none() -> None:
    assert fit([], StepRate()) is None
