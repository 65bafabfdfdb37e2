"""Which frames of the running code a ``with`` block is around.

A generator that is suspended at a ``yield`` is around no code: the block that it has open goes on when its
consumer asks for more.  The generator of the user's own context manager is suspended while the body of the
``with`` runs, and its block is around that body all the same.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
CACHE, SEND, YIELD_VALUE = (bytes([dis.opmap[name]]) for name in ("CACHE", "SEND", "YIELD_VALUE"))
PROTOCOL = frozenset({"__enter__", "__aenter__"})
"""Methods that return before their block begins: the block belongs to whoever calls them."""
FIXTURES = frozenset({"_pytest.fixtures", "pytest_asyncio.plugin", "anyio._backends._asyncio"})
"""Modules that drive the generators of pytest's fixtures, whose blocks are around the test."""
RUNNERS = frozenset({"unittest.case", "unittest.async_case", "_pytest.python"})
"""Modules that enter a context for a test, as ``enterContext()`` does, or call its ``setUp()``, which may."""


class Holder:
    """The frames that hold a block.

    Attributes:
        generators: those of generators; the block is around what runs inside them.
        body: the frame with the ``with`` statement that the generators serve, or None.  The block is around
            this frame too until it returns, and around the tasks and threads that inherit its context.
        is_inherited: False if the block is around nothing but the generators: then no context shows it.
    """

    __slots__ = ("_thread", "body", "generators", "is_inherited")

    def __init__(self, generators: list[FrameType], body: FrameType | None, *, is_inherited: bool) -> None:
        self.generators: list[FrameType] = generators
        self.body: FrameType | None = body
        self.is_inherited: bool = is_inherited
        self._thread = threading.get_ident()

    def is_around(self) -> bool:
        """Return False if the running code has inherited a context in which the block is open, and is not in it."""
        if self.body is None:
            return self.is_inherited
        if _awaits(self.body) or self.body in stack():
            return True
        if self._thread == threading.get_ident():
            return False  # it has returned
        other = sys._current_frames().get(self._thread)
        return other is None or self.body in _outward(other)


def find_holder(frame: FrameType | None) -> Holder | None:
    """Return what holds the block that is entered by ``frame``; None if that is no generator."""
    generators: list[FrameType] = []
    while frame is not None:
        if frame.f_code.co_flags & GENERATOR:
            generators.append(frame)
            if _module(frame.f_back) in FIXTURES:
                return Holder(generators, None, is_inherited=True)
            if not _is_contextlib(frame.f_back) and not _delegates(frame.f_back):
                return Holder(generators, None, is_inherited=False)
        elif _is_decorated(frame) or not (_is_contextlib(frame) or frame.f_code.co_name in PROTOCOL):
            break
        frame = frame.f_back
    if not generators:
        return None
    is_test = any(_module(each) in RUNNERS for each in (frame, frame and frame.f_back))
    return Holder(generators, None if is_test else frame, is_inherited=True)


def stack() -> Iterator[FrameType]:
    """Yield the frames of the running code, the innermost first; those outside SQLAlchemy's greenlet too."""
    yield from _outward(sys._getframe(1))
    module: Any = sys.modules.get("greenlet")
    greenlet = None if module is None else module.getcurrent().parent
    while greenlet is not None:
        yield from _outward(greenlet.gr_frame)
        greenlet = greenlet.parent


def first_caller(frame: FrameType) -> FrameType:
    """Return ``frame`` or, where that is contextlib's, the first one outside it."""
    while frame.f_back is not None and _is_contextlib(frame):
        frame = frame.f_back
    return frame


def _awaits(frame: FrameType) -> bool:
    """Return True if ``frame`` is that of a coroutine that awaits something, and of none that has returned."""
    if frame.f_back is not None:
        return False
    # before 3.12 a coroutine that has returned has no `f_back` either, and only its last instruction tells
    return sys.version_info >= (3, 12) or _instructions(frame).endswith(YIELD_VALUE)


def _delegates(frame: FrameType | None) -> bool:
    """Return True if ``frame`` is that of a generator in a ``yield from``: then the inner one is in its place."""
    if frame is None or not frame.f_code.co_flags & inspect.CO_GENERATOR:
        return False
    return _instructions(frame).rstrip(CACHE).endswith(SEND)  # Python 3.12 points behind the instruction


def _instructions(frame: FrameType) -> bytes:
    """Return the instructions of the frame's code up to the last one that ran, one byte for each."""
    return frame.f_code.co_code[: frame.f_lasti + 1 : 2]


def _is_decorated(frame: FrameType) -> bool:
    """Return True if ``frame`` runs a function that a context manager decorates: contextlib has the ``with``."""
    return _is_contextlib(frame) and frame.f_code.co_name == "inner"


def _module(frame: FrameType | None) -> object:
    return None if frame is None else frame.f_globals.get("__name__")


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename == contextlib.__file__
