"""The sessions of an isolated database have one connection, on which they take turns.

A turn lasts as long as a session's transaction.  A unit of work that is opened inside another one
nests its turn in that one's; whoever else wants the connection waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection
from sqlalchemy.util import await_only

from ..current import open_scope
from ..exceptions import IsolationError

if TYPE_CHECKING:
    from ._session import IsolatedSession

LONGEST_WAIT = 5.0
"""Seconds that a session waits for another one's transaction to end."""
MOMENT = 0.005


class Turn:
    """What one session does with the connections, from its first statement to the end of its transaction.

    Attributes:
        session: whose it is.
        place: the thread and the task that took it.
        begins: True until the session has the connection.
        leaves: True while the test's session is being committed for another one.
        savepoints: by connection, the savepoint that stands for the session's transaction.
        watches: by connection, what `session_plugin._watch` keeps of the transaction around it.
        wrote: True once it sent an INSERT, UPDATE, DELETE or the like.
        under_way: True while a statement is executed, and after one that failed.
        failed: True once a statement before that one has failed.
        kept: True once a turn inside it has committed work.
        broken: the error by which its connection died, or None.
    """

    def __init__(self, session: IsolatedSession) -> None:
        self.session = session
        self.place = _place()
        self.begins = True
        self.leaves = False
        self.savepoints: dict[Connection, str] = {}
        self.watches: dict[Connection, Any] = {}
        self.wrote = False
        self.under_way = False
        self.failed = False
        self.kept = False
        self.broken: Exception | None = None
        self._stands_in = session._session_scope or open_scope()

    def __repr__(self) -> str:
        scope = self.session._session_scope
        if scope is not None:
            return repr(scope)
        return "the test's session" if self.session.is_the_tests else "a session of db.sessionmaker()"

    @property
    def over(self) -> bool:
        """True for one that never became a transaction: somebody only asked the session for its bind."""
        return not self.begins and not self.session.in_transaction()

    def may_nest_in(self, outer: Turn) -> bool:
        """True if ``outer`` waits for this one to end: whoever has it opened this one, or stands right here."""
        if outer.session.is_the_tests:
            return False
        holder = outer.session._session_scope
        scope = self._stands_in
        while scope is not None:
            if scope is holder:
                return True
            scope = scope.outer
        served_by_threads = holder is not None and holder.loop is not None
        return not served_by_threads and outer.place == self.place


class Turns:
    """Who has the connections: the last of the stack, and around it those who wait for it."""

    def __init__(self, *, is_async: bool) -> None:
        self._is_async = is_async
        self._stack: list[Turn] = []
        self._changed = threading.Condition()

    def find(self, session: IsolatedSession) -> Turn | None:
        """The turn that ``session`` has."""
        return next((turn for turn in self._stack if turn.session is session), None)

    def owner(self, connection: Connection, savepoint: str) -> Turn | None:
        """The turn whose transaction ``savepoint`` stands for; None if it is one of the app's own."""
        return next((turn for turn in self._stack if turn.savepoints.get(connection) == savepoint), None)

    def note_committed(self, turn: Turn) -> None:
        """Note on the turn in which ``turn`` is nested what that one has committed."""
        if index := self._stack.index(turn):
            around = self._stack[index - 1]
            around.kept = around.kept or turn.wrote or turn.kept

    def is_last(self, turn: Turn) -> bool:
        """True unless another turn is nested in ``turn``."""
        return self._stack[-1] is turn

    def take(self, session: IsolatedSession) -> Turn:
        """The turn of ``session``, waited for if others have the connections.

        Raises:
            IsolationError: they had them for too long.
        """
        turn = self.find(session)
        if turn is None:
            turn = Turn(session)
            self._wait(turn, lambda: self._push(turn))
        elif not self.is_last(turn) and (self._stack[-1].place != turn.place or self._stack[-1].session.is_the_tests):
            self.wait_for_those_inside(turn)
        return turn

    def wait_for_those_inside(self, turn: Turn) -> None:
        """Wait until no other turn is nested in ``turn``, which ends or goes on.

        Raises:
            IsolationError: one still is, and will be as long as this one waits.
        """
        self._wait(turn, lambda: self._is_free_for(turn))

    def end(self, session: IsolatedSession) -> Turn | None:
        """Give the turn of ``session`` away, and answer it."""
        with self._changed:
            turn = self.find(session)
            if turn is not None:
                self._stack.remove(turn)
                self._changed.notify_all()
        return turn

    def _wait(self, turn: Turn, is_ready: Callable[[], bool]) -> None:
        given_up = time.monotonic() + LONGEST_WAIT
        while not is_ready():
            inside = turn in self._stack and self._stack[-1].place == turn.place
            if inside or time.monotonic() > given_up:
                raise IsolationError(
                    f"{turn!r} cannot go on before the transaction of {self._stack[-1]!r} has ended, which it has not. "
                    "Inside isolated() all sessions take turns on one connection: end that transaction first."
                )
            self._pause()

    def _pause(self) -> None:
        if self._is_async:
            await_only(asyncio.sleep(MOMENT))
        else:
            with self._changed:
                self._changed.wait(MOMENT)

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
            turn.session.step_aside(turn)
        finally:
            turn.leaves = False


def _place() -> tuple[int, asyncio.Task[Any] | None]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None  # no event loop runs here
    return threading.get_ident(), task
