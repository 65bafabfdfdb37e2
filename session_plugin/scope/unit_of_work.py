"""`UnitOfWork`: one session, its transactions and its hooks, as the core and the adapters see it.

An app sees it as a `SessionScope`.  How a unit of work is opened is in `opening`, how it ends in `ending`.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Generic, Protocol
from weakref import WeakMethod, WeakSet

from sqlalchemy import Engine
from sqlalchemy.orm import Session, SessionTransaction

from ..engines.semaphore import ExtraThreads, FairSemaphore, PendingSessions
from ..exceptions import PolicyError, ScopeClosedError
from ..policy import SAFE_METHODS, Policy, PolicyLike, as_policy
from .frames import Holder
from .hooks import Event, Hook, Hooks
from .joined import JoinedBlock
from .transaction_state import TransactionState, has_changes
from .typevars import S

_making_session = threading.Lock()


class ScopeDatabase(Protocol):
    """What a unit of work needs of its database.

    Attributes:
        is_async: True if its sessions are `AsyncSession` instances.
        default_policy: of units of work that choose no other one.
        semaphore: with a permit for each connection, for sync sessions under an event loop.
        pending_sessions: with a place for each of these sessions that has no permit yet.
        streams_results: True if an engine streams every result.
        closes_itself: True if the user's session class has a ``close()`` of its own.
    """

    is_async: bool
    default_policy: Policy
    semaphore: FairSemaphore
    pending_sessions: PendingSessions
    streams_results: bool
    closes_itself: bool

    def new_session(self, unit: UnitOfWork[Any] | None) -> Any:
        """Make the session of ``unit``; for None, one that belongs to no unit of work."""

    def engine_for(self, engine: Engine, policy: Policy, *, may_write: bool) -> Engine:
        """Return ``engine``, or its variant that begins as ``policy`` says."""

    def extra_threads(self, loop: asyncio.AbstractEventLoop) -> ExtraThreads:
        """Return what counts the threads of ``loop`` that wait for a connection or hold one."""

    def run_hooks(self, calls: list[Callable[[], Any]]) -> KeyboardInterrupt | None:
        """Make the calls that are due, each in a unit of work of its own, and return a Ctrl-C that came meanwhile."""


class UnitOfWork(Generic[S]):
    """One unit of work on one database.

    Attributes:
        database: whose session it has.
        method: the HTTP method, or None outside HTTP.
        outer: the unit of work, on any database, in which it was opened, or None.
        inherited: the one that the context showed when it was opened, or None; see `current`.
        holder: what holds its block, if that is a generator.
        owner: the only thread and task that may join it; any may if it is None.
        was_joined: True once a block has joined it.
        find_policy: returns the policy of the endpoint, or None.
        error: the exception that the response reports; an adapter sets it.
        has_session: True once the session was asked for.
        in_transaction: True while its session has a transaction.
        has_begun: True once its session had one; before, there is nothing in it.
        begun_at: the `current.depth` at which its transaction began.
        last_begun: the transaction or savepoint that ``session.begin()`` began last, or None; see `begin_blocks`.
        settled: True once its transaction was settled; what follows is late work.
        rolls_back: True while its end rolls back, which keeps unchanged rows readable.
        releases: True while `release` ends a transaction, for which no hook waits.
        released: True once it has, until a transaction ends otherwise.
        saved: True once a settlement has committed work.
        saved_status: the status of the response under which a settlement has committed work, or None.
        discarded: True once a settlement has rolled work back.
        closed: True once it has ended; its session refuses further use.
        doomed: why it will roll back, whatever happens, or None.
        interrupt: a Ctrl-C that came in a hook, after the COMMIT; a ``session_scope()`` raises it once it has ended.
        interrupted: under WSGI, once the response is closed, True if it was cut short; None before.
        late_calls: how many callables that follow the response run now; see `late`.
        late_runners: by the `current.depth` at which such a callable runs, what runs it; an adapter sets it.
        serves: of an ASGI request, returns True if a WSGI environ is that of the same request; else None.
        lent: True while a WSGI app that is mounted in an ASGI app works with it in a thread, and settles its work.
        lent_at: the `current.depth` of that app.
        cut_short: True once the body of such a WSGI app has raised.
        loop: the event loop that serves its request with threads, or an outer one's, or None.
        place: gives back its place among the sessions that have no permit yet, or None; see `permits`.
        permit: gives back its permit to hold a connection, or None.
        sync_session: the `Session`, also where ``session`` is an `AsyncSession`; set while there is one.
        hooks, transaction: what waits for its transaction to end, and what was done in it; set once it has a session.
    """

    sync_session: Session
    hooks: Hooks
    transaction: TransactionState
    has_begun: bool = False
    error: BaseException | None = None
    settled: bool = False
    rolls_back: bool = False
    releases: bool = False
    released: bool = False
    saved: bool = False
    saved_status: int | None = None
    discarded: bool = False
    interrupted: bool | None = None
    late_calls: int = 0
    late_runners: Mapping[int, WeakMethod[Callable[..., Any]]] | None = None
    closed: bool = False
    begun_at: int = 0
    last_begun: SessionTransaction | None = None
    doomed: str | None = None
    interrupt: KeyboardInterrupt | None = None
    serves: Callable[[Mapping[str, Any]], bool] | None = None
    lent: bool = False
    lent_at: int = 0
    cut_short: bool = False
    loop: asyncio.AbstractEventLoop | None = None
    place: Callable[[], None] | None = None
    inherited: UnitOfWork[Any] | None = None
    holder: Holder | None = None
    owner: object = None
    was_joined: bool = False
    _policy: Policy | None = None

    def __init__(
        self,
        database: ScopeDatabase,
        *,
        outer: UnitOfWork[Any] | None = None,
        origin: str,
        method: str | None = None,
        find_policy: Callable[[], Policy | None] | None = None,
    ) -> None:
        """Create a unit of work that has no session yet.

        Args:
            database: the database.
            outer: the one in which it is opened, or None.
            origin: where it is opened, for logs and warnings: ``"POST /orders"``.
            method: the HTTP method.
            find_policy: called once, at the first statement, for the policy of the endpoint.
        """
        self.database = database
        self.method = method
        self.find_policy = find_policy
        self.has_session: bool = False
        self.in_transaction: bool = False
        self.permit: Callable[[], None] | None = None
        self._session: S | None = None
        self.outer = outer
        if outer is not None:
            self.loop = outer.loop
        self._origin = origin

    @cached_property
    def closed_message(self) -> str:
        """The message of the error that a later use raises."""
        return f"The unit of work of this session ({self!r}) has ended. Later work needs a session_scope() of its own."

    @cached_property
    def joined_blocks(self) -> list[JoinedBlock]:
        """The blocks that have joined it and are open."""
        self.was_joined = True
        return []

    def __repr__(self) -> str:
        return self._origin if self._origin.isprintable() else ascii(self._origin)  # a path may forge a line of the log

    def __del__(self) -> None:
        if not self.closed and self.connected:
            message = f"session_plugin: {self!r} was never closed and held a connection"
            warnings.warn(message, ResourceWarning, stacklevel=2)

    # -- its session ---------------------------------------------------------------------------

    @property
    def session(self) -> S:
        """The session, made at the first call.

        Raises:
            ScopeClosedError: the unit of work has ended, and had no session.
        """
        session: Any = self._session
        if session is None:
            if self.closed:
                raise ScopeClosedError(self.closed_message)
            with _making_session:
                session = self._session
                if session is None:
                    session = self.database.new_session(self)
                    self.sync_session = session.sync_session if self.database.is_async else session
                    self.hooks = Hooks()
                    self.transaction = TransactionState(self.sync_session, self.doomed, is_async=self.database.is_async)
                    self._session, self.has_session = session, True
                    units_with_session.add(self)
        return session  # type: ignore[no-any-return]

    def forget_session(self) -> None:
        """Drop the session, which refers to this unit of work: such a cycle would wait for the garbage collector."""
        self._session, self.in_transaction, self.last_begun = None, False, None
        self.transaction.begun = self.transaction.committed = None
        vars(self).pop("sync_session", None)

    @property
    def connected(self) -> bool:
        """True while the session holds a connection."""
        return self.has_session and self.transaction.connected

    @property
    def can_be_joined(self) -> bool:
        """True while a ``session_scope()`` inside it is part of it."""
        return not self.settled and not self.closed

    @property
    def active(self) -> bool:
        """True if there is something to settle: a transaction, or a hook that waits for one."""
        return self.in_transaction or (self.has_session and bool(self.hooks.waiting))

    @property
    def at_work_in_thread(self) -> bool:
        """True while it is lent, unless the transaction is that of a middleware, begun after the response had begun."""
        return self.lent and not (self.settled and self.in_transaction and self.begun_at < self.lent_at)

    @property
    def wrote(self) -> bool:
        """True if rolling back now would discard work."""
        return self.has_session and (self.transaction.wrote or has_changes(self.sync_session))

    @property
    def may_write(self) -> bool:
        """False for a request whose HTTP method is safe."""
        return self.method not in SAFE_METHODS

    @property
    def in_request(self) -> bool:
        """True for the unit of work of an HTTP request, and for one that was opened in such a unit of work."""
        return self.method is not None or (self.outer is not None and self.outer.in_request)

    # -- commit or roll back -------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """How it begins and ends: what `use` said, else the endpoint's policy, else the database's."""
        if self._policy is None:
            found = self.find_policy() if self.find_policy is not None else None
            self._policy = (found or self.database.default_policy).for_method(self.method)
        return self._policy

    def use(self, policy: PolicyLike) -> None:
        """Choose how it begins and ends.

        Raises:
            PolicyError: ``policy`` is not a policy, or a transaction has begun in another way.
        """
        chosen = as_policy(policy).for_method(self.method)
        current = self.policy
        begins_alike = (chosen.read_only, chosen.isolation_level) == (current.read_only, current.isolation_level)
        if self.connected and not begins_alike:
            raise PolicyError(
                f"use({chosen.name}) came too late: a statement has already begun the transaction under the policy "
                f"{current.name}. Choose the policy before the first statement, including those of middlewares and "
                "dependencies, or open a session_scope(new=True)."
            )
        self._policy = chosen

    def doom(self, reason: str) -> None:
        """Decide now that it will roll back, whatever happens."""
        self.doomed = self.doomed or str(reason or "no reason given")
        if self.has_session:
            self.transaction.doom(self.doomed)

    def add_hook(self, event: Event, call: Callable[[], Any]) -> None:
        """Make ``call`` once this transaction has ended by ``event``."""
        self.session  # noqa: B018  makes the hooks too
        self.hooks.add(Hook(call, event, self.sync_session.get_nested_transaction()))

    # -- what it holds -------------------------------------------------------------------------

    def return_permit(self) -> None:
        """Give the permit back once the connection is, for the next in line; and the place of a session unused."""
        permit = self.permit
        if permit is not None and not self.connected:
            self.permit = None
            permit()
        self.return_place()

    def return_place(self) -> None:
        """Give back the place among the sessions that have no permit yet."""
        place = self.place
        if place is not None:
            self.place = None
            place()

    def detach_after_fork(self) -> tuple[S | None, list[Any]]:
        """End in a forked child without touching the session, which the parent goes on with.

        Returns:
            the session and the driver's connections, which must not be garbage-collected.
        """
        session, self._session = self._session, None
        held = self.transaction.detach_after_fork() if self.has_session else []
        self.has_session = self.in_transaction = False
        self.settled = self.closed = True
        return session, held


units_with_session: WeakSet[UnitOfWork[Any]] = WeakSet()
"""Those whose session was asked for."""
