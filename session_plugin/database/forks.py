"""What happens to open units of work and to pools when a process begins by a fork, and when it exits."""

from __future__ import annotations

import atexit
from typing import Any

from ..engines.forks import after_fork_in_child
from ..scope.current import entered_units
from ..scope.unit_of_work import units_with_session
from .core import alive

_inherited: list[Any] = []
"""The sessions and connections of the parent process: collecting them would send something on the parent's sockets."""


def forget_open_units() -> None:
    """In a forked child, end the units of work that have a session, and send nothing to the database."""
    for unit in list(units_with_session):
        _inherited.append(unit.detach_after_fork())


def forget_current_units() -> None:
    """In a forked child, end those that have no session yet: they are open only around the code that forked."""
    for unit in entered_units():
        _inherited.append(unit.detach_after_fork())


def forget_inherited_connections() -> None:
    """In a forked child, start with empty pools and no open unit of work, and leave the parent's sockets alone."""
    forget_open_units()
    for core in list(alive):
        core.forget_parent()


def dispose_at_exit() -> None:
    """Close the pooled connections of the engines made here: no server tells a WSGI app that it shuts down.

    Those of an async database end with its event loop, which no longer exists by now.
    """
    for core in list(alive):
        if not core.is_async:
            for engine in core.made_here:
                engine.dispose()


after_fork_in_child(forget_current_units, only_at_once=True)
after_fork_in_child(forget_inherited_connections)
atexit.register(dispose_at_exit)
