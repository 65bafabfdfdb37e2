"""Code that runs in every forked child process, also in one whose parent forked without Python's knowledge."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_calls: list[Callable[[], None]] = []
_calls_at_once: list[Callable[[], None]] = []
_checking = threading.Lock()
_pid = os.getpid()


def after_fork_in_child(call: Callable[[], None], *, only_at_once: bool = False) -> None:
    """Register ``call`` to run in every forked child; where there is no fork, as on Windows, it never runs.

    Args:
        call: what to run.
        only_at_once: True for what must run right after the fork, and not before the first session of the child.
    """
    (_calls_at_once if only_at_once else _calls).append(call)


def check_process() -> None:
    """Make the registered calls if this process was forked by C code, as uWSGI does, which runs no callback of `os`.

    It is called before a process makes its first session.
    """
    if os.getpid() != _pid:
        with _checking:
            if os.getpid() != _pid:
                _begin()


def _begin() -> None:
    global _pid
    for call in _calls:
        call()
    _pid = os.getpid()  # last: another thread waits until all is done


def _forked() -> None:
    global _checking
    _checking = threading.Lock()
    for call in _calls_at_once:
        call()
    _begin()


def _register() -> None:
    register = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=_forked)


_register()
