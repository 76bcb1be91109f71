"""Memory for direct transfers."""

from __future__ import annotations

import pytest

from orchestrator.base.pages import PAGE_BYTES, is_on_page, page_buffer


@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES - 1, PAGE_BYTES, 5 * 2**20 + 3])
def test_page_buffer_starts_on_a_page_and_can_be_written_to_its_end(num_bytes: int) -> None:
    buffer = page_buffer(num_bytes)
    assert is_on_page(buffer)
    buffer[:] = b"x" * num_bytes
    assert bytes(buffer) == b"x" * num_bytes


def test_page_buffers_are_apart() -> None:
    one, two = page_buffer(10), page_buffer(10)
    one[:] = b"1" * 10
    assert bytes(two) == bytes(10)


def test_page_buffer_of_nothing_is_empty() -> None:
    assert len(page_buffer(0)) == 0
    assert not is_on_page(page_buffer(0))


@pytest.mark.parametrize("shift", [1, 8, 512, PAGE_BYTES - 1])
def test_is_on_page_between_pages_is_false(shift: int) -> None:
    assert not is_on_page(page_buffer(2 * PAGE_BYTES)[shift:])
    assert is_on_page(page_buffer(2 * PAGE_BYTES)[PAGE_BYTES:])


def test_is_on_page_of_what_cannot_be_written_is_false() -> None:
    assert not is_on_page(page_buffer(PAGE_BYTES).toreadonly())
