"""Memory that starts on a page: what O_DIRECT reads into and writes from without a copy."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

PAGE_BYTES = 4096
"""A multiple of every alignment that disks and file systems ask of memory, offsets and lengths."""


def page_buffer(num_bytes: int) -> memoryview:
    """A new buffer on a page boundary, in huge pages where the kernel has them: a direct transfer looks each page up."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:num_bytes]


def is_on_page(view: memoryview) -> bool:
    """Whether a buffer starts on a page boundary; False for one that is empty or read-only, whose address is not told."""
    if view.readonly or not view.nbytes:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE_BYTES == 0
