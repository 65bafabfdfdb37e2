"""`captured_hooks`: the hooks of finished transactions, kept for a test to look at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

from ..database.core import HasDatabase
from ..database.interface import core_of


class CapturedHooks(list[Callable[[], Any]]):
    """The hooks that were due in the block, in order; each is a `functools.partial` of what was registered."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self._core = core

    def capture(self, calls: list[Callable[[], Any]]) -> None:
        """Keep ``calls`` instead of making them."""
        self += calls

    def run(self) -> Awaitable[None] | None:
        """Call them as the database would, each in a unit of work of its own; on an async database, await the result.

        What they raise is logged.  They are called once: afterwards the list is empty.
        """
        calls = [*self]
        self.clear()
        core = self._core
        class_ = type(core)  # the instance has `capture` in place of its method
        running: Awaitable[None] | None = (class_.arun_hooks if core.is_async else class_.run_hooks)(core, calls)
        return running


@contextmanager
def captured_hooks(db: HasDatabase) -> Generator[CapturedHooks]:
    """Keep the hooks that become due in the block, instead of calling them.

    ::

        with captured_hooks(db) as hooks:
            client.post("/orders")
        assert [hook.func for hook in hooks] == [send_receipt]
        hooks.run()
    """
    core = core_of(db)
    captured = CapturedHooks(core)
    around = vars(core).get("run_hooks")
    core.run_hooks = captured.capture
    try:
        yield captured
    finally:
        del core.run_hooks
        if around is not None:
            core.run_hooks = around
