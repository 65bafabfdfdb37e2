"""The hooks of finished transactions, kept back for a test to look at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..access import HasDatabase
    from ..database import BaseDatabase


class CapturedHooks(list[Callable[[], Any]]):
    """The hooks that were due in the block, in order; each is a `functools.partial` of what was registered."""

    def __init__(self, database: BaseDatabase[Any]) -> None:
        super().__init__()
        self._database = database

    def capture(self, calls: list[Callable[[], Any]]) -> None:
        """Keep ``calls``."""
        self += calls

    def run(self) -> Awaitable[None] | None:
        """Call them as the database would, each in a unit of work of its own; on an async database, to be awaited.

        What they raise is logged.  They are called once: afterwards none is left.
        """
        calls = [*self]
        self.clear()
        database: Any = self._database
        class_ = type(database)  # the database itself keeps them back
        answer: Awaitable[None] | None = (class_._arun_hooks if database.is_async else class_._run_hooks)(
            database, calls
        )
        return answer


@contextmanager
def captured_hooks(db: HasDatabase) -> Generator[CapturedHooks]:
    """Keep the hooks that ``on_commit`` and ``on_rollback`` make due in the block, instead of calling them.

    ::

        with captured_hooks(db) as hooks:
            client.post("/orders")
        assert [hook.func for hook in hooks] == [send_receipt]
        hooks.run()
    """
    database = db.database
    captured = CapturedHooks(database)
    around = vars(database).get("_run_hooks")
    database._run_hooks = captured.capture  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        del database._run_hooks
        if around is not None:
            database._run_hooks = around  # type: ignore[method-assign]
