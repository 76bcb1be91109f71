"""Root as any other user, where tests run as root: whom a file's mode stops from reading and writing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER = 1, 2, 3
_POWERS = (1 << _DAC_OVERRIDE) | (1 << _DAC_READ_SEARCH) | (1 << _FOWNER)

_Header = ctypes.c_uint32 * 2
_Sets = ctypes.c_uint32 * 6
"""Effective, permitted, inheritable: capabilities 0 to 31, then 32 to 63."""


def give_up_powers() -> None:
    """Let modes of files hold for this thread and those that it starts. Programs that it starts have root's powers again."""
    _set_effective(lambda effective, _permitted: effective & ~_POWERS)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """`give_up_powers` for a while."""
    give_up_powers()
    try:
        yield
    finally:
        _set_effective(lambda effective, permitted: effective | (permitted & _POWERS))


def _set_effective(change: object) -> None:
    assert callable(change)
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), _Sets()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    sets[0] = change(sets[0], sets[1])
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
