"""How the COMMIT of each connection of one transaction went, and what an error or a log line says about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from ..exceptions import url_for_message

CommitState: TypeAlias = Literal[
    "not committed",
    "committed",
    "unknown",
    "rolled back",
    "perhaps prepared",
    "prepared",
    "committed or still prepared",
]
"""The last four are of a two-phase commit."""

OPEN: CommitState = "not committed"
COMMITTED: CommitState = "committed"
UNKNOWN: CommitState = "unknown"
ROLLED_BACK: CommitState = "rolled back"
PREPARING: CommitState = "perhaps prepared"
PREPARED: CommitState = "prepared"
COMMITTING_PREPARED: CommitState = "committed or still prepared"
SENT: frozenset[CommitState] = frozenset({UNKNOWN, PREPARING, COMMITTING_PREPARED})
"""The states of a COMMIT or PREPARE that was sent, and that the server has not answered."""


class Committing(Protocol):
    """What this module needs of a `ConnectionGuard`."""

    commit_state: CommitState
    xid: Any
    wrote: bool


Guards: TypeAlias = Mapping[Any, Committing]
"""By the `Connection` that each guards: those of one transaction."""


def outcome(guards: Guards) -> Literal["commit", "rollback", "unknown"]:
    """Return how a transaction ended that SQLAlchemy has not reported as committed.

    If only a part of what it wrote is durable, neither of the two is true.
    """
    states = {guard.commit_state for guard in guards.values()}
    if states & {UNKNOWN, COMMITTING_PREPARED}:
        return "unknown"
    if states == {COMMITTED}:
        return "commit"  # an exception struck between the server's answer and SQLAlchemy's report
    if COMMITTED in states and any(guard.wrote for guard in guards.values() if guard.commit_state == COMMITTED):
        return "unknown"
    return "rollback"


def is_second_phase(guards: Guards) -> bool:
    """Return True once a COMMIT PREPARED was sent: from then on nothing that is prepared may be rolled back."""
    return any(
        guard.xid is not None and guard.commit_state in (COMMITTED, COMMITTING_PREPARED) for guard in guards.values()
    )


def leaves_prepared(guards: Guards) -> bool:
    """Return True if a prepared transaction may still be there when all has ended."""
    return any(guard.commit_state in (PREPARING, PREPARED, COMMITTING_PREPARED) for guard in guards.values())


def describe(guards: Guards) -> str:
    """Return the state of each engine, with the id of its prepared transaction."""
    return ", ".join(
        f"{url_for_message(connection.engine.url)}: {guard.commit_state}"
        + ("" if guard.xid is None else f" (prepared transaction '{guard.xid}')")
        for connection, guard in guards.items()
    )


def note_for(guards: Guards) -> str | None:
    """Return what the error of a COMMIT has to say besides itself, or None."""
    if any(guard.xid is not None for guard in guards.values()):
        todo = ""
        if leaves_prepared(guards):
            todo = (
                " What is still prepared holds its locks: commit it by hand if one of them was committed, else roll it "
                "back (pg_prepared_xacts, XA RECOVER)."
            )
        return f"The two-phase commit has not completed: {describe(guards)}.{todo}"
    result = outcome(guards)
    states = [guard.commit_state for guard in guards.values()]
    if UNKNOWN in states:
        return (
            "COMMIT was sent, and it is not known whether the server has committed: the data may or may not be saved "
            f"({describe(guards)})."
        )
    if result == "unknown":
        committed = ", ".join(
            url_for_message(connection.engine.url)
            for connection, guard in guards.items()
            if guard.commit_state == COMMITTED
        )
        return (
            f"This unit of work had already committed on {committed}. Engines that must commit together need "
            "twophase=True."
        )
    return None


def add_note(error: BaseException, note: str | None) -> None:
    """Add ``note`` to ``error`` unless it has it already."""
    if note is not None and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
