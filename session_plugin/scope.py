"""One unit of work: its session, its hooks and its fate."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, cast
from weakref import WeakSet

from . import _lifecycle
from ._drive import Steps, arun, run, uncancelled
from ._hooks import Event, Hook, Hooks
from ._session import ScopeSession
from ._threads import in_thread
from ._watch import Work
from .current import Entered, open_scope
from .exceptions import PolicyError, ScopeClosedError
from .policy import Decision, Outcome, Policy, as_policy
from .typevars import S

if TYPE_CHECKING:
    from .database import BaseDatabase


_making_session = threading.Lock()
_with_session: WeakSet[SessionScope[Any]] = WeakSet()
_inherited: list[Any] = []
"""The sessions of the parent process: if they were collected, a ROLLBACK would go out on the parent's sockets."""


def forget_open_scopes() -> None:
    """In a forked child: end the scopes that were open, without a word to the database."""
    for scope in list(_with_session):
        _inherited.append(scope.abandon())


class SessionScope(Generic[S]):
    """One unit of work on one database.  Adapters open it, settle it and close it.

    Attributes:
        database: whose session it has.
        outer: the scope, of any database, in which it was opened, or None.
        method: the HTTP method, or None outside HTTP.
        settled: True once its transaction was settled; what follows is late work.
        saved: True once a settling has committed work.
        error: the exception that the response answers; an adapter notes it.
        find_policy: answers the policy of the endpoint.
        begun_at: the `depth` at which its transaction began.
        closed: True once it is over; its session refuses further use.
        closed_message: what a later use is told.
    """

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
        self.error: BaseException | None = None
        self.settled: bool = False
        self.begun_at: int = 0
        self.saved: bool = False
        self.closed: bool = False
        self.closed_message: str = (
            f"The unit of work of this session ({origin}) has ended. Work that outlives it needs a "
            "session_scope() of its own."
        )
        self.hooks: Hooks = Hooks()
        self.work: Work = Work()
        self._origin = origin
        self.find_policy = find_policy
        self._policy: Policy | None = None
        self._doomed: str | None = None
        self._session: S | None = None
        self._permit: Callable[[], None] | None = None
        self.outer: SessionScope[Any] | None = open_scope()

    def __repr__(self) -> str:
        return self._origin

    def __del__(self) -> None:
        if not self.closed and self.work.connected:
            warnings.warn(
                f"session_plugin: {self!r} was never closed and held a connection", ResourceWarning, stacklevel=2
            )

    # -- the session ---------------------------------------------------------------------------

    @property
    def session(self) -> S:
        """The scope's session, made at the first call.

        Raises:
            ScopeClosedError: the scope is over and had made no session.
        """
        if self._session is None:
            if self.closed:
                raise ScopeClosedError(self.closed_message)
            with _making_session:
                if self._session is None:
                    session = self.database._new_session()
                    self._sync_session_of(session)._session_scope = self
                    self._session = session
                    _with_session.add(self)
        return self._session

    @property
    def sync_session(self) -> ScopeSession:
        """The `sqlalchemy.orm.Session`, also where ``session`` is an `AsyncSession`."""
        return self._sync_session_of(self.session)

    def _sync_session_of(self, session: Any) -> ScopeSession:
        return cast(ScopeSession, session.sync_session if self.database.is_async else session)

    @property
    def has_session(self) -> bool:
        """True once the session was asked for."""
        return self._session is not None

    @property
    def can_be_joined(self) -> bool:
        """True while a ``session_scope()`` inside it is part of it."""
        return not self.settled and not self.closed

    @property
    def active(self) -> bool:
        """True if there is something to settle: a transaction, or a hook that waits for one."""
        return self._session is not None and (self.sync_session.in_transaction() or bool(self.hooks))

    @property
    def wrote(self) -> bool:
        """True if rolling back now would discard work."""
        session = self.sync_session
        return self.work.wrote or bool(session.new or session.dirty or session.deleted)

    def begun_session(self) -> ScopeSession:
        """The sync session with a transaction begun, which takes no connection yet."""
        session = self.sync_session
        if not session.in_transaction():
            session.begin()
        return session

    def close_streams(self) -> Any:
        """Close the results that are still being streamed."""
        if not self.database.is_async:
            return self.work.close_streams()
        session: Any = self.session
        return session.run_sync(lambda _: self.work.close_streams())

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
        if self.work.connected and not begins_alike:
            raise PolicyError(
                f"use({chosen.name}) came too late: a statement has begun the transaction as {current.name}. "
                "Choose before the first statement of the unit of work, a middleware's or a dependency's included, "
                "or give this part a session_scope(new=True)."
            )
        self._policy = chosen

    def doom(self, reason: str) -> None:
        """Decide now that this scope will roll back, whatever happens."""
        self._doomed = self._doomed or reason
        self.work.doom(self._doomed)

    def decide(self, outcome: Outcome) -> Decision:
        """What its policy makes of ``outcome``; a doomed scope always rolls back."""
        if self._doomed is not None:
            return Decision(False, f"doomed: {self._doomed}")
        try:
            decision = self.policy.decide(outcome)
        except Exception as error:
            raise PolicyError(f"The policy {self.policy.name} raised {error!r}; nothing was committed.") from error
        if not isinstance(decision, Decision):
            raise PolicyError(
                f"The policy {self.policy.name} returned {decision!r} where it must return a Decision. Nothing was "
                "committed."
            )
        return decision

    def add_hook(self, event: Event, call: Callable[[], Any]) -> None:
        """Call ``call`` once this transaction has ended by ``event``."""
        self.hooks.add(Hook(call, event, self.sync_session.get_nested_transaction()))

    # -- its course ----------------------------------------------------------------------------

    def entered(self) -> Entered:
        """Make this the current scope of the block."""
        return Entered(self)

    @contextmanager
    def joined(self) -> Generator[S]:
        """Work inside this scope; an error that leaves the block dooms it."""
        try:
            yield self.session
        except BaseException as error:
            abandoned = isinstance(error, GeneratorExit)  # a generator that was not read to its end
            if not abandoned and Outcome.raised(error).error is not None:
                self.doom(f"{type(error).__name__} left a session_scope() inside it")
            raise

    def abandon(self) -> S | None:
        """End the scope and answer its session, untouched: another process goes on with it."""
        session, self._session = self._session, None
        self.settled = self.closed = True
        self.work = Work()
        return session

    def settle(self, outcome: Outcome) -> None:
        """End the transaction of a sync session; see `_lifecycle.settle`."""
        run(_lifecycle.settle(self, outcome))

    def close(self) -> None:
        """End the scope of a sync session; see `_lifecycle.close`."""
        run(_lifecycle.close(self))

    async def asettle(self, outcome: Outcome) -> None:
        """End the transaction; a sync session's in one thread hop, and none if there is nothing to end."""
        self.settled = True
        try:
            if self.active:
                await self._drive(_lifecycle.settle(self, outcome), talks=self._will_talk)
        finally:
            self._return_permit()

    async def aclose(self) -> None:
        """End the scope; a sync session's in one thread hop, and none if it holds no connection."""
        try:
            await self._drive(_lifecycle.close(self), talks=self.work.connected)
        finally:
            self._return_permit()

    async def permit(self) -> None:
        """Wait, without a thread, until the pool has a connection for this scope's sync session.

        The permit lasts until the scope is settled and the connection is back, so that threads never
        wait for a connection while those that hold one wait for a thread.
        """
        if self._permit is not None or not self.can_be_joined:
            return
        permit = await self.database._permits.acquire()
        if permit is not None and (self._permit is not None or not self.can_be_joined):
            permit()
        else:
            self._permit = permit

    def _return_permit(self) -> None:
        if self._permit is not None and not self.work.connected:
            self._permit()
            self._permit = None

    @property
    def _will_talk(self) -> bool:
        return self.work.connected or self.wrote or bool(self.hooks)

    async def _drive(self, steps: Steps[None], *, talks: bool) -> None:
        """Drive ``steps`` to their end; ``talks`` says whether they talk to the database."""
        if not talks:
            await arun(steps)
        elif self.database.is_async:
            await uncancelled(arun(steps))
        else:
            await uncancelled(in_thread(partial(run, steps), holds_connection=self.work.connected))
