"""The logger, and exceptions that nobody else sees."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy.exc import StatementError

logger: logging.Logger = logging.getLogger("session_plugin")


def log_failed_hook(call: Callable[[], Any], error: BaseException) -> KeyboardInterrupt | None:
    """Log the exception that a hook raised, and return it if it is a Ctrl-C."""
    function = call.func if isinstance(call, partial) else call
    log_exception("The hook %s failed", getattr(function, "__qualname__", type(function).__name__))
    return error if isinstance(error, KeyboardInterrupt) else None


def log_commit_failure(unit: object, what_is_left: str, *, unknown: bool) -> None:
    """Log what a COMMIT that failed has left; nothing of that can be undone here."""
    if unknown:
        message = "%s: the outcome of COMMIT is unknown, its data may or may not be saved: %s"
    else:
        message = "%s: the two-phase commit has failed, and a prepared transaction may be left: %s"
    logger.error(message, str(unit), what_is_left)


def log_failed_rollback(unit: object, error: Exception) -> None:
    """Log that ROLLBACK failed; the connection is discarded, so that nothing is committed on it."""
    logger.warning(
        "%s: ROLLBACK failed (%s)", str(unit), type(error).__name__, exc_info=logger.isEnabledFor(logging.DEBUG)
    )


def log_exception(message: str, what: str) -> None:
    """Log the exception being handled, which can no longer change the outcome.

    Nobody else sees it, so its traceback is logged too, but without the parameters of statements.
    """
    error = sys.exception()
    while error is not None:
        if isinstance(error, StatementError):
            error.hide_parameters = True
        error = error.__cause__ or error.__context__
    logger.exception(message, what)
