"""`Turns`: the sessions of an isolated database share one connection, and take turns on it.

A turn lasts as long as a session's transaction.  The turn of a unit of work that is opened inside another
one is nested in that one's; every other session waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.util import await_only

from ...exceptions import IsolationError
from ...scope.current import find_open
from .session import IsolatedSession

LONGEST_WAIT = 5.0
"""Seconds for which a session waits for another one's transaction to end."""
POLL_INTERVAL = 0.005


class Turn:
    """One session's use of the connections, from its first statement to the end of its transaction.

    Attributes:
        session: the session.
        place: the thread and the task that have it.
        begins: True until the session has the connection.
        leaves: True while the test's session is being committed for the sake of another one.
        savepoints: by connection, the savepoint that stands for the session's transaction.
        settings: by connection, the settings of the transaction as it began, once a statement may have changed one.
        sends: True once it sent a statement that may have begun a transaction on the server.
        read_only: True once it made its transaction READ ONLY by a statement of its own.
        sets_constraints: True once it sent a SET CONSTRAINTS.
        guards: by connection, the guard of the transaction around it; see `session_plugin.engines.guard`.
        wrote: True once it sent an INSERT, UPDATE, DELETE or the like.
        executing: True while a statement is executed, and after one that failed.
        failed: True once a statement before that one has failed.
        kept: True once a turn inside it has committed work.
        broken: the error by which its connection died, or None.
    """

    def __init__(self, session: IsolatedSession) -> None:
        self.session = session
        self.place: tuple[int, asyncio.Task[Any] | None] = _place()
        self.begins = True
        self.leaves = False
        self.savepoints: dict[Connection, str] = {}
        self.guards: dict[Connection, Any] = {}
        self.settings: dict[Connection, dict[str, str]] = {}
        self.sends = False
        self.read_only = False
        self.sets_constraints = False
        self.wrote = False
        self.executing = False
        self.failed = False
        self.kept = False
        self.broken: Exception | None = None
        self._inside = session._unit_of_work or find_open()

    def __repr__(self) -> str:
        unit = self.session._unit_of_work
        if unit is not None:
            return repr(unit)
        return "the test's session" if self.session.is_the_tests else "a session of db.sessionmaker()"

    @property
    def over(self) -> bool:
        """True for a turn that never became a transaction: the session was only asked for its bind."""
        return not self.begins and not self.session.in_transaction()

    def may_nest_in(self, outer: Turn) -> bool:
        """Return True if ``outer`` waits for this one to end: its code opened this one, or runs it."""
        if outer.session.is_the_tests:
            return False
        holder = outer.session._unit_of_work
        unit = self._inside
        while unit is not None:
            if unit is holder:
                return True
            unit = unit.outer
        served_by_threads = holder is not None and holder.loop is not None
        return not served_by_threads and outer.place == self.place


class Turns:
    """A stack of turns: the last one has the connections, and those before it wait for it."""

    def __init__(self, *, is_async: bool) -> None:
        self._is_async = is_async
        self._stack: list[Turn] = []
        self._changed = threading.Condition()

    def find(self, session: IsolatedSession) -> Turn | None:
        """Return the turn of ``session``, or None."""
        return next((turn for turn in self._stack if turn.session is session), None)

    def owner(self, connection: Connection, savepoint: str) -> Turn | None:
        """Return the turn whose transaction ``savepoint`` stands for; None if it is one of the app's own."""
        return next((turn for turn in self._stack if turn.savepoints.get(connection) == savepoint), None)

    def settings_outside(self, connection: Connection) -> dict[str, str] | None:
        """Return the settings with which every transaction on ``connection`` begins, if one may have changed them."""
        return next((turn.settings[connection] for turn in self._stack if connection in turn.settings), None)

    def note_committed(self, turn: Turn) -> None:
        """Note on the turn around ``turn`` that work inside it was committed."""
        if index := self._stack.index(turn):
            around = self._stack[index - 1]
            around.kept = around.kept or turn.wrote or turn.kept

    def is_last(self, turn: Turn) -> bool:
        """Return True unless another turn is nested in ``turn``."""
        return self._stack[-1] is turn

    def take(self, session: IsolatedSession) -> Turn:
        """Return the turn of ``session``, and wait for it if others have the connections.

        Raises:
            IsolationError: they have them for too long.
        """
        turn = self.find(session)
        if turn is None:
            turn = Turn(session)
            self._wait(turn, lambda: self._push(turn))
        elif not self.is_last(turn) and (self._stack[-1].place != turn.place or self._stack[-1].session.is_the_tests):
            self.wait_for_those_inside(turn)
        return turn

    def wait_for_those_inside(self, turn: Turn) -> None:
        """Wait until no other turn is nested in ``turn``.

        Raises:
            IsolationError: one still is, and will be as long as this one waits.
        """
        self._wait(turn, lambda: self._is_free_for(turn))

    def end(self, session: IsolatedSession) -> Turn | None:
        """End the turn of ``session``, and return it."""
        with self._changed:
            turn = self.find(session)
            if turn is not None:
                self._stack.remove(turn)
                self._changed.notify_all()
        return turn

    def _wait(self, turn: Turn, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONGEST_WAIT
        while not is_ready():
            inside = turn in self._stack and self._stack[-1].place == turn.place
            if inside or time.monotonic() > deadline:
                raise IsolationError(
                    f"{turn!r} cannot go on while the transaction of {self._stack[-1]!r} is open. Inside isolated() "
                    "all sessions take turns on one connection: end that transaction first."
                )
            self._pause()

    def _pause(self) -> None:
        if self._is_async:
            await_only(asyncio.sleep(POLL_INTERVAL))
        else:
            with self._changed:
                self._changed.wait(POLL_INTERVAL)

    def _push(self, turn: Turn) -> bool:
        with self._changed:
            while self._stack and self._stack[-1].over:
                self._stack.pop()
            if not self._stack or turn.may_nest_in(self._stack[-1]):
                self._stack.append(turn)
                return True
            last = self._stack[-1]
        self._let_step_aside(last)
        return False

    def _is_free_for(self, turn: Turn) -> bool:
        last = self._stack[-1]
        if last is not turn:
            self._let_step_aside(last)
        return self.is_last(turn)

    def _let_step_aside(self, turn: Turn) -> None:
        with self._changed:
            if turn.leaves:
                return
            turn.leaves = True
        try:
            turn.session.step_aside(wrote=turn.wrote)
        finally:
            turn.leaves = False


def _place() -> tuple[int, asyncio.Task[Any] | None]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None  # no event loop runs here
    return threading.get_ident(), task
