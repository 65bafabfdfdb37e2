"""`assert_queries`: how many statements were sent, which, and from where."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy import Connection, Engine, event

from ..database.core import HasDatabase
from ..database.interface import core_of
from .isolation.statements import controls

_NOT_THE_USERS = tuple(
    str(Path(path).resolve())
    for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(__file__).parents[1])
)


@dataclass(frozen=True)
class Query:
    """One statement that was sent.

    Attributes:
        statement: its SQL; its parameters are not kept.
        origin: where in the user's code it came from, ``file:line in function``.
    """

    statement: str
    origin: str

    def __str__(self) -> str:
        return f"{' '.join(self.statement.split())}\n      {self.origin}"


@contextmanager
def assert_queries(db: HasDatabase, *, max: int) -> Generator[list[Query]]:  # noqa: A002
    """Fail if the block sends more than ``max`` statements through ``db``; the message lists them with their origins.

    Statements that begin and end transactions and savepoints do not count.

    Yields:
        the statements so far.

    Raises:
        AssertionError: there were more.
    """
    core = core_of(db)
    queries: list[Query] = []

    def note(connection: Connection, cursor: Any, statement: str, *more: Any) -> None:
        is_ours = any(engine.pool is connection.engine.pool for engine in core.engines.known)
        if is_ours and not controls(statement):
            queries.append(Query(statement, _origin()))

    event.listen(Engine, "before_cursor_execute", note)  # also on engines that are made in the block
    try:
        yield queries
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    if len(queries) > max:
        lines = "".join(f"\n  {number}. {query}" for number, query in enumerate(queries, 1))
        raise AssertionError(f"{len(queries)} statements were sent, and {max} are allowed:{lines}")


def _origin() -> str:
    for frame in _frames():
        path = frame.f_code.co_filename
        if not path.startswith(("<", *_NOT_THE_USERS)):
            return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
    return "no code of yours is on the stack"


def _frames() -> Iterator[FrameType]:
    """Yield the frames of the running code, the innermost first, and of the task around an async statement."""
    frame: FrameType | None = sys._getframe(1)
    greenlet: Any = sys.modules.get("greenlet")
    current = greenlet and greenlet.getcurrent()
    while frame is not None:
        yield frame
        frame = frame.f_back
        if frame is None and current is not None and current.parent is not None:
            current = current.parent
            frame = current.gr_frame
