"""Which hooks are due when a transaction or a savepoint ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from sqlalchemy.exc import StatementError
from sqlalchemy.orm import SessionTransaction

logger = logging.getLogger("session_plugin")

Event: TypeAlias = Literal["commit", "rollback"]


@dataclass(slots=True)
class Hook:
    """A call that waits for its transaction to end.

    Attributes:
        call: the function with its arguments.
        on: what it waits for.
        savepoint: the innermost open savepoint when it was registered, or None.
        due: True for a rollback hook whose savepoint was rolled back; it runs however the rest ends.
    """

    call: Callable[[], Any]
    on: Event
    savepoint: SessionTransaction | None
    due: bool = False


class Hooks:
    """The hooks of one scope, in the order of their registration.

    Attributes:
        waiting: those whose transaction has not ended yet.
    """

    def __init__(self) -> None:
        self.waiting: list[Hook] = []

    def add(self, hook: Hook) -> None:
        """Wait for the end of the transaction that is open, or of the next one."""
        self.waiting.append(hook)

    def savepoint_ended(self, savepoint: SessionTransaction, *, committed: bool) -> None:
        """Hand the savepoint's hooks to what encloses it, or drop those that it made untrue."""
        enclosing = savepoint.session.get_nested_transaction()
        waiting, self.waiting = self.waiting, []
        for hook in waiting:
            if hook.savepoint is savepoint:
                hook.savepoint = enclosing
                hook.due = hook.due or (not committed and hook.on == "rollback")
                if not committed and hook.on == "commit":
                    continue
            self.waiting.append(hook)

    def take(self, event: Event) -> list[Callable[[], Any]]:
        """The calls that are due, in order; all other hooks are dropped."""
        if not self.waiting:
            return []
        waiting, self.waiting = self.waiting, []
        return [hook.call for hook in waiting if hook.due or hook.on == event]


def log_failed(call: Callable[[], Any]) -> None:
    """Log the exception that a hook raised."""
    function = call.func if isinstance(call, partial) else call
    log_exception("The hook %s failed", getattr(function, "__qualname__", type(function).__name__))


def log_exception(message: str, what: str) -> None:
    """Log an exception that can no longer change the outcome.

    Nobody else sees it, so its traceback is logged too, but without the parameters of statements.
    """
    error = sys.exception()
    while error is not None:
        if isinstance(error, StatementError):
            error.hide_parameters = True
        error = error.__cause__ or error.__context__
    logger.exception(message, what)
