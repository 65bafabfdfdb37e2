"""Code that runs in every forked child process."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork_in_child(call: Callable[[], None]) -> None:
    """Register ``call`` to run in every forked child; where there is no fork, as on Windows, it never runs."""
    register = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=call)
