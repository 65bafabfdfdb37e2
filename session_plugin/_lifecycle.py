"""How a unit of work ends: the whole order, on this page.

::

    settle   decide ─> close streams ─> COMMIT or ROLLBACK ─> connection back ─> hooks
    close    roll back what is left ─> connection back, or discarded ─> session dead

Each step is a generator that yields the calls to make (`_drive` makes them), so that sync and
async sessions end by the same code.  Hooks run where the session says that its transaction has
ended (`_session`), so that those of an explicit ``commit()`` run too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ._drive import Steps
from ._hooks import log_exception
from .exceptions import PolicyError
from .policy import Decision, Outcome

if TYPE_CHECKING:
    from ._session import ScopeSession
    from .scope import SessionScope

logger = logging.getLogger("session_plugin")


def settle(scope: SessionScope[Any], outcome: Outcome) -> Steps[None]:
    """End the scope's transaction, which there is, as its policy decides, and give the connection back.

    From its first moment on, the scope counts as settled: work that starts now is late work, a
    transaction of its own.  Raises what the commit raised, after rolling back.
    """
    scope.settled = True
    try:
        decision = _decide(scope, outcome)
        _log(scope, decision, outcome)
        if scope.work.streams:
            yield partial(_run_sync, scope, scope.work.close_streams)
        if decision.commit:
            scope.work.saved = False  # from here on: a hook may use the session for a transaction that writes nothing
            yield from _commit(scope)
            scope.saved = scope.saved or scope.work.saved
    except BaseException as error:
        yield from _roll_back(scope)
        if outcome.background:
            logger.error("%s: the work after the response was not saved (%s)", str(scope), type(error).__name__)
        raise
    if not decision.commit:
        yield from _roll_back(scope)


def close(scope: SessionScope[Any]) -> Steps[None]:
    """The end: nothing open, nothing held; the scope is closed, and its session refuses further use."""
    try:
        if scope.sync_session.in_transaction():
            yield from _roll_back(scope)
    finally:
        yield scope.session.close


def _decide(scope: SessionScope[Any], outcome: Outcome) -> Decision:
    if scope.doomed is not None:
        return Decision(False, f"doomed: {scope.doomed}")
    policy = scope.policy
    try:
        decision = policy.decide(outcome)
    except Exception as error:
        raise PolicyError(
            f"The policy {policy.name} raised {type(error).__name__}. Nothing was committed; correct it."
        ) from error
    if not isinstance(decision, Decision) or not isinstance(decision.commit, bool):
        raise PolicyError(
            f"The policy {policy.name} returned no Decision(commit=True or False, reason=...) but an object of type "
            f"{type(decision).__name__}. Nothing was committed; correct it."
        )
    return decision


def _commit(scope: SessionScope[Any]) -> Steps[None]:
    """COMMIT, and leave what the request loaded readable for its stream and its background work.

    What a session listener raises once all is durable can take nothing back, and is logged.
    """
    session = _begun_session(scope)
    transaction = session.get_transaction()
    expire_on_commit, session.expire_on_commit = session.expire_on_commit, False
    try:
        yield scope.session.commit
    except Exception as error:
        if transaction is None or scope.work.committed is not transaction:
            scope.work.note_partial_commit(error)
            raise
        log_exception("%s: a listener failed after the COMMIT", str(scope))
        if session.in_transaction():
            yield partial(_run_sync, scope, transaction.close)
    finally:
        session.expire_on_commit = expire_on_commit


def _roll_back(scope: SessionScope[Any]) -> Steps[None]:
    """ROLLBACK; a connection that cannot do that, or that a sibling still uses, is discarded.

    One that discards no work expires nothing: what is not in the session meanwhile stays loaded.
    """
    session = _begun_session(scope)
    if scope.work.busy:
        yield partial(_run_sync, scope, scope.work.wait_alone)
        if scope.work.busy:
            yield scope.session.invalidate
            return
    loaded = [] if scope.wrote else [*session]
    if loaded:
        session.expunge_all()
    try:
        yield scope.session.rollback
    except Exception as error:
        logger.warning(
            "%s: ROLLBACK failed (%s)",
            str(scope),
            type(error).__name__,
            exc_info=logger.isEnabledFor(logging.DEBUG),
        )
        yield scope.session.invalidate
    else:
        if loaded and not scope.closed:
            transaction = session.begin()
            session.add_all(loaded)
            transaction.close()


def _begun_session(scope: SessionScope[Any]) -> ScopeSession:
    """The sync session with a transaction begun, which takes no connection yet."""
    session = scope.sync_session
    if not session.in_transaction():  # asked: a close() that failed told nobody of the end
        session.begin()
    return session


def _run_sync(scope: SessionScope[Any], call: Callable[[], None]) -> Any:
    """Make a call that talks to the driver; an awaitable on an async database."""
    if not scope.database.is_async:
        return call()
    session: Any = scope.session
    return session.run_sync(lambda _: call())


def _log(scope: SessionScope[Any], decision: Decision, outcome: Outcome) -> None:
    if decision.commit or not scope.wrote:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s (%s)", str(scope), "COMMIT" if decision.commit else "ROLLBACK", decision.reason)
    else:
        level = logging.ERROR if outcome.background else logging.INFO if outcome.failed else logging.WARNING
        logger.log(level, "%s: ROLLBACK, its work is discarded (%s)", str(scope), decision.reason)
