"""One unit of work: its session, its hooks and its fate."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic

from . import _lifecycle
from ._drive import Steps, arun, run, uncancelled
from ._hooks import Event, Hook, Hooks
from ._processes import scopes_with_session
from ._session import ScopeSession, has_changes
from ._threads import in_thread
from ._work import Work
from .current import Entered, innermost, open_scope
from .exceptions import PolicyError, ScopeClosedError
from .policy import Decision, Outcome, Policy, as_policy
from .typevars import S

if TYPE_CHECKING:
    from .database import BaseDatabase

_making_session = threading.Lock()


class SessionScope(Generic[S]):
    """One unit of work on one database.  Adapters open it, settle it and close it.

    Attributes:
        database: whose session it has.
        has_session: True once the session was asked for.
        in_transaction: True while its session has a transaction.
        has_begun: True once its session had one; before, there is nothing in it.
        outer: the scope, of any database, in which it was opened, or None.
        method: the HTTP method, or None outside HTTP.
        settled: True once its transaction was settled; what follows is late work.
        saved: True once a settling has committed work.
        error: what the response answers; an adapter notes it.
        find_policy: answers the policy of the endpoint.
        begun_at: the `depth` at which its transaction began.
        loop: the event loop that serves its request, or one around it, with threads, or None.
        permit_held: gives back its permit to hold a connection; see `_permits`.
        closed: True once it is over; its session refuses further use.
        closed_message: what a later use is told.
        doomed: why it will roll back, whatever happens, or None.
        sync_session: the `Session`, also where ``session`` is an `AsyncSession`; there while it has one.
        hooks, work: what waits for its transaction to end, and what was done in it; there once it has a session.
    """

    sync_session: ScopeSession
    hooks: Hooks
    work: Work
    has_begun: bool = False
    error: BaseException | None = None
    settled: bool = False
    saved: bool = False
    closed: bool = False
    begun_at: int = 0
    _policy: Policy | None = None
    doomed: str | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def __init__(
        self,
        database: BaseDatabase[S],
        *,
        origin: str,
        method: str | None = None,
        find_policy: Callable[[], Policy | None] | None = None,
    ) -> None:
        """Open a scope that has no session yet.

        Args:
            database: the database.
            origin: where it was opened, for logs and warnings: ``"POST /orders"``.
            method: the HTTP method.
            find_policy: asked once, at the first statement, for the policy of the endpoint.
        """
        self.database = database
        self.method = method
        self.find_policy = find_policy
        self.has_session: bool = False
        self.in_transaction: bool = False
        self.permit_held: Callable[[], None] | None = None
        self._session: S | None = None
        self.outer: SessionScope[Any] | None = innermost.get() and open_scope()
        if self.outer is not None:
            self.loop = self.outer.loop
        self._origin = origin

    @cached_property
    def closed_message(self) -> str:
        """What a later use is told."""
        return f"The unit of work of this session ({self!r}) has ended. Later work needs a session_scope() of its own."

    @cached_property
    def joining(self) -> list[Any]:
        """The tasks in an async ``session_scope()`` that joined it."""
        return []

    def __repr__(self) -> str:
        return self._origin if self._origin.isprintable() else ascii(self._origin)  # a path may forge a line of the log

    def __del__(self) -> None:
        if not self.closed and self.connected:
            message = f"session_plugin: {self!r} was never closed and held a connection"
            warnings.warn(message, ResourceWarning, stacklevel=2)

    # -- the session ---------------------------------------------------------------------------

    @property
    def session(self) -> S:
        """The scope's session, made at the first call.

        Raises:
            ScopeClosedError: the scope is over and had made no session.
        """
        session: Any = self._session
        if session is None:
            if self.closed:
                raise ScopeClosedError(self.closed_message)
            with _making_session:
                session = self._session
                if session is None:
                    session = self.database._new_session()
                    self.sync_session = session.sync_session if self.database.is_async else session
                    self.sync_session._session_scope = self
                    self.hooks, self.work = Hooks(), Work(self.doomed, is_async=self.database.is_async)
                    self._session, self.has_session = session, True
                    scopes_with_session.add(self)
        return session  # type: ignore[no-any-return]

    @property
    def connected(self) -> bool:
        """True while the session holds a connection."""
        return self.has_session and self.work.connected

    @property
    def can_be_joined(self) -> bool:
        """True while a ``session_scope()`` inside it is part of it."""
        return not self.settled and not self.closed

    @property
    def active(self) -> bool:
        """True if there is something to settle: a transaction, or a hook that waits for one."""
        return self.in_transaction or (self.has_session and bool(self.hooks.waiting))

    @property
    def wrote(self) -> bool:
        """True if rolling back now would discard work."""
        return self.has_session and (self.work.wrote or has_changes(self.sync_session))

    # -- its fate ------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """How this scope begins and ends: what `use` said, else the endpoint's, else the database's."""
        if self._policy is None:
            found = self.find_policy() if self.find_policy is not None else None
            self._policy = found or self.database._default_policy
        return self._policy

    def use(self, policy: Policy | Callable[[Outcome], Decision]) -> None:
        """Choose how this scope begins and ends.

        Raises:
            PolicyError: it is no policy, or a transaction has begun in another way.
        """
        chosen = as_policy(policy)
        current = self.policy
        begins_alike = (chosen.read_only, chosen.isolation_level) == (current.read_only, current.isolation_level)
        if self.connected and not begins_alike:
            raise PolicyError(
                f"use({chosen.name}) came too late: a statement has begun the transaction as {current.name}. "
                "Choose before the first one, a middleware's or a dependency's too, or open a session_scope(new=True)."
            )
        self._policy = chosen

    def doom(self, reason: str) -> None:
        """Decide now that this scope will roll back, whatever happens."""
        self.doomed = self.doomed or str(reason or "no reason given")
        if self.has_session:
            self.work.doom(self.doomed)

    def add_hook(self, event: Event, call: Callable[[], Any]) -> None:
        """Call ``call`` once this transaction has ended by ``event``."""
        self.session  # noqa: B018  with the session come the hooks
        self.hooks.add(Hook(call, event, self.sync_session.get_nested_transaction()))

    # -- its course ----------------------------------------------------------------------------

    def entered(self) -> Entered:
        """Make this the current scope of the block."""
        return Entered(self)

    @contextmanager
    def joined(self) -> Generator[S]:
        """Work inside this scope; an error that leaves the block dooms it."""
        try:
            session, sync_session = self.session, self.sync_session
            yield session
            if self.closed and has_changes(sync_session):
                raise ScopeClosedError(self.closed_message)
        except BaseException as error:
            if not isinstance(error, GeneratorExit) and Outcome.raised(error).error is not None:  # or left unread
                self.doom(f"{type(error).__name__} left a session_scope() inside it")
            raise

    def abandon(self) -> tuple[S | None, list[Any]]:
        """End the scope and answer its session and what that one holds, untouched: another process goes on with it."""
        session, self._session = self._session, None
        held = self.work.abandon() if self.has_session else []
        self.has_session = self.in_transaction = False
        self.settled = self.closed = True
        return session, held

    def settle_idle(self) -> bool:
        """Settle, if there is nothing to end: then neither an `Outcome` nor anything else is to be made."""
        if self.in_transaction or (self.has_session and self.hooks.waiting):
            return False
        self.settled = True
        if self.permit_held is not None:
            self.return_permit()
        return True

    def settle(self, outcome: Outcome) -> None:
        """End the transaction of a sync session; see `_lifecycle.settle`."""
        if not self.settle_idle():
            run(_lifecycle.settle(self, outcome))

    def close_idle(self) -> bool:
        """Close, if there is nothing to end: then the session, if any, talks to nobody, and needs no driver."""
        self.closed = True  # first: no other thread begins from here on
        if self._session is not None:
            if self.in_transaction or self.database._has_own_close:
                return False
            if self.has_begun:
                self.sync_session.close()
            self._let_go()
        elif self.permit_held is not None:
            self.return_permit()
        return True

    def close(self) -> None:
        """End the scope of a sync session; see `_lifecycle.close`."""
        if self.close_idle():
            return
        try:
            run(_lifecycle.close(self))
        finally:
            self._let_go()

    async def asettle(self, outcome: Outcome) -> None:
        """End the transaction; a sync session's in one thread hop, and none if there is nothing to end."""
        if self.settle_idle():
            return
        self.settled = True
        talks = self.work.connected or self.wrote or bool(self.hooks.waiting)
        try:
            await self._drive(_lifecycle.settle(self, outcome), talks=talks)
        finally:
            self.return_permit()

    async def aclose(self) -> None:
        """End the scope; a sync session's in one thread hop, and none if it holds no connection."""
        if self.close_idle():
            return
        try:
            await self._drive(_lifecycle.close(self), talks=self.work.connected)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Forget the session, which knows this scope: a cycle would wait for the garbage collector."""
        self.return_permit()
        self._session, self.in_transaction = None, False
        self.work.committed = None
        vars(self).pop("sync_session", None)

    def return_permit(self) -> None:
        """Once the connection is back, let the next in line have one."""
        permit = self.permit_held
        if permit is not None and not self.connected:
            self.permit_held = None
            permit()

    async def _drive(self, steps: Steps[None], *, talks: bool) -> None:
        """Drive ``steps`` to their end; ``talks`` says whether they talk to the database."""
        if not talks:
            await arun(steps)
        elif self.database.is_async:
            await uncancelled(arun(steps))
        else:
            ready = self.work.connected or self.permit_held is not None
            await uncancelled(in_thread(partial(run, steps), can_wait=not ready))
