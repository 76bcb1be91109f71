"""Page-aligned buffers, which O_DIRECT reads into and writes from without a copy."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

PAGE_BYTES = 4096
"""Alignment of memory, offsets and lengths that satisfies every disk and file system."""


def page_buffer(num_bytes: int) -> memoryview:
    """Return a new page-aligned buffer, in huge pages where the kernel has them: a direct transfer looks up each page."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:num_bytes]


def is_on_page(view: memoryview) -> bool:
    """Whether a buffer starts on a page boundary. False for an empty or read-only buffer, whose address is unknown."""
    if view.readonly or not view.nbytes:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE_BYTES == 0
