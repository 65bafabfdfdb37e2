"""Which hooks are due when a transaction or a savepoint ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy.orm import SessionTransaction

Event: TypeAlias = Literal["commit", "rollback", "unknown"]
"""How a transaction ends; unknown if COMMIT was sent and the server did not say what became of it."""


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
    """The hooks of one unit of work, in the order of their registration.

    Attributes:
        waiting: those whose transaction has not ended yet.
    """

    def __init__(self) -> None:
        self.waiting: list[Hook] = []

    def add(self, hook: Hook) -> None:
        """Let ``hook`` wait for the end of the transaction that is open, or of the next one."""
        self.waiting.append(hook)

    def savepoint_ended(self, savepoint: SessionTransaction, *, committed: bool) -> None:
        """Pass the savepoint's hooks on to what encloses it; if it was rolled back, drop all but its rollback hooks."""
        enclosing = savepoint.session.get_nested_transaction()
        waiting, self.waiting = self.waiting, []
        for hook in waiting:
            if hook.savepoint is savepoint:
                hook.savepoint = enclosing
                hook.due = hook.due or (not committed and hook.on == "rollback")
                if not committed and hook.on != "rollback":
                    continue
            self.waiting.append(hook)

    def take(self, event: Event) -> list[Callable[[], Any]]:
        """Return the calls that are due, in order, and drop all other hooks."""
        if not self.waiting:
            return []
        waiting, self.waiting = self.waiting, []
        return [hook.call for hook in waiting if hook.due or hook.on == event]
