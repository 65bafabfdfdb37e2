"""`DatabaseInterface`: what an app calls, wherever it is.

`Database` and `AsyncDatabase` have it, and so do the plugins, for the database of the current app.
"""

from __future__ import annotations

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, Unpack, overload

from sqlalchemy import MetaData
from sqlalchemy.util import ScopedRegistry

from ..engines.event_loop import running_loop
from ..exceptions import ConfigurationError, NoScopeError, ScopeClosedError
from ..policy import (
    Policy,
    PolicyLike,
    as_policy,
    commit_on_success,
    is_coroutine_function,
    set_endpoint_policy,
    set_policy_above,
)
from ..scope.current import find
from ..scope.session_scope import SessionScope
from ..scope.typevars import S
from ..scope.unit_of_work import UnitOfWork
from .configuration import Configuration
from .core import DatabaseCore, HasDatabase
from .options import Options

if TYPE_CHECKING:
    from .configuration import Source

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")


def core_of(db: HasDatabase) -> Any:
    """Return the core of a database, or of the one that a plugin has: a `SyncCore` or an `AsyncCore`."""
    return db.database._core


class DatabaseInterface(ABC, Generic[S]):
    """The part that sync and async databases share."""

    _core: DatabaseCore

    @overload
    def __init__(
        self,
        source: Source | None = None,
        *,
        class_: None = None,
        policy: PolicyLike = ...,
        metadata: MetaData | None = None,
        binds: Mapping[Any, Any] | None = None,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        source: Source | None = None,
        *,
        class_: type[S],
        policy: PolicyLike = ...,
        metadata: MetaData | None = None,
        binds: Mapping[Any, Any] | None = None,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        source: Source | None = None,
        *,
        class_: type[S] | None = None,
        policy: PolicyLike = commit_on_success,
        metadata: MetaData | None = None,
        binds: Mapping[Any, Any] | None = None,
        **options: Any,
    ) -> None:
        """Configure a database; nothing connects yet.

        Args:
            source: a URL, an engine, a session factory, or named engines:
                ``{"default": ..., "reports": {"url": ..., "pool_size": 2}}``.  A plugin also takes a
                database, or a function that returns any of these and is called when it is needed.
            class_: the session class; SQLAlchemy's `Session` or `AsyncSession` unless given.
            policy: how units of work begin and end unless they choose otherwise.
            metadata: for ``create_all()`` and for migration tools.
            binds: from a mapped class, a mapper or a table to an engine or the name of one.
            **options: of the session class and of ``create_engine()``, under SQLAlchemy's names; and for a
                sync database ``max_pending_sessions``: how many sessions may be asked for under ASGI and have
                no connection yet, before requests wait when they ask.

        Raises:
            ConfigurationError: any of it cannot work.
        """
        self._set_up(Configuration(source, class_, policy, metadata, binds, options))

    @abstractmethod
    def _set_up(self, configuration: Configuration) -> None:
        """Make what can be made now."""

    @property
    @abstractmethod
    def database(self) -> Any:
        """The database behind this object, for the current app."""

    def _find_unit_of_work(self) -> UnitOfWork[S] | None:
        """Return the unit of work that the running code is inside, or None; none is opened."""
        return find(self.database._core)

    def _unit_of_work(self) -> UnitOfWork[S]:
        """Return the unit of work that the running code is inside.

        Raises:
            NoScopeError: no unit of work is open here.
        """
        unit = find(self.database._core)
        if unit is None:
            raise self._no_scope()
        return unit

    def _no_scope(self) -> NoScopeError:
        thread = threading.current_thread()
        is_async = self.database._core.is_async
        own_thread = thread is not threading.main_thread()
        where = f"in the thread {thread.name} (a thread does not inherit one)" if own_thread else "here"
        if is_async and own_thread and running_loop() is None:
            advice = (
                "An AsyncDatabase works only in an event loop, and this thread has none: pass the work to your app's "
                "loop with asyncio.run_coroutine_threadsafe(), and open `async with db.session_scope() as session:` "
                "in it, or use a Database for what runs in threads."
            )
        else:
            who = "In a thread of your own" if own_thread else "In a job or a script"
            block = "async with" if is_async else "with"
            advice = f"{who}, open one: `{block} db.session_scope() as session:`."
        return NoScopeError(
            f"No unit of work is open {where}, so there is no session. {advice} For requests, call db.init_app(app), "
            "or serve the app that SessionScopeMiddleware returns. A server that calls the framework itself, as "
            "Sanic's own does, bypasses it: open the block in each request there."
        )

    @property
    def scope(self) -> SessionScope[S]:
        """The unit of work that the running code is inside.

        Raises:
            NoScopeError: no unit of work is open here.
        """
        return SessionScope(self._unit_of_work())

    @property
    def session(self) -> S:
        """The session of the unit of work that the running code is inside; made at the first call.

        Raises:
            NoScopeError: there is no unit of work here.
            ScopeClosedError: the one that was inherited here has ended.
        """
        unit = self._unit_of_work()
        if unit.closed:
            raise ScopeClosedError(unit.closed_message)
        return unit.session

    @session.setter
    def session(self, session: object) -> None:
        raise ConfigurationError(
            "db.session cannot be replaced: it is the session of the current unit of work. In a test, use "
            "`with db.isolated() as session:`, whose session sees what the app does."
        )

    def on_commit(self, function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function(*args, **kwargs)`` once this transaction's data is durable.

        It is called with no transaction open, in a unit of work of its own that commits at its
        end; what it raises is logged.  It is dropped if the transaction, or the savepoint in
        which it was registered, rolls back.  Coroutine functions need an async database.

        Raises:
            NoScopeError: there is no unit of work here.
            ConfigurationError: ``function`` cannot be called, or not by a sync database.
        """
        self._unit_of_work().add_hook("commit", self._hook(function, args, kwargs))

    def on_rollback(self, function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function(*args, **kwargs)`` once this transaction is rolled back; see `on_commit`."""
        self._unit_of_work().add_hook("rollback", self._hook(function, args, kwargs))

    def on_unknown(self, function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function(*args, **kwargs)`` if it is not known whether this transaction's data is durable.

        That is so if COMMIT was sent and its answer was lost, with the connection or by a time-out, or if only
        some of several engines have committed.  Hooks of the other two kinds do not run then; see `on_commit`.
        """
        self._unit_of_work().add_hook("unknown", self._hook(function, args, kwargs))

    def _hook(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], Any]:
        if not callable(function):
            raise ConfigurationError(
                f"A hook must be a function, and an object of type {type(function).__name__} cannot be called. Give "
                "the function and its arguments: db.on_commit(send, order_id)."
            )
        name = getattr(function, "__qualname__", type(function).__name__)
        if is_coroutine_function(function) and not self.database._core.is_async:
            raise ConfigurationError(
                f"The hook {name} is a coroutine function, which a sync database cannot await. Make it a plain "
                "function, or use AsyncDatabase."
            )
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigurationError(
                f"The hook {name} cannot be called with these arguments: {error}. Give its arguments after it: "
                "db.on_commit(send, order_id)."
            ) from None
        except ValueError:
            pass  # a builtin without a signature
        return partial(function, *args, **kwargs)

    def doom(self, reason: str = "doom() was called") -> None:
        """Decide that the current unit of work rolls back, whatever happens; ``reason`` is logged."""
        self._unit_of_work().doom(reason)

    def use(self, policy: PolicyLike) -> None:
        """Choose how the current unit of work begins and ends.

        Raises:
            NoScopeError: there is no unit of work here.
            PolicyError: ``policy`` is not a policy, or the transaction has begun in another way.
        """
        self._unit_of_work().use(policy)

    def policy(self, policy: PolicyLike) -> Callable[[F], F]:
        """Decorate an endpoint, a class of endpoints or a function: its unit of work is under ``policy``.

        The adapters for Flask, FastAPI and Starlette look at the endpoint before the first
        statement of the request, a dependency's included, and there the decorator may stand above
        that of the route or below it; elsewhere the policy is chosen when the function is called,
        so it stands directly above the function.

        Raises:
            ConfigurationError: it decorates something that is not callable.
            PolicyError: ``policy`` is not a policy.
        """
        chosen = as_policy(policy)

        def decorate(function: F) -> F:
            if not callable(function):
                raise ConfigurationError(
                    "@db.policy(...) decorates a function or a class, and was given an object of type "
                    f"{type(function).__name__}. Put it directly above a function or a class."
                )
            as_it_is = isinstance(function, type) or _is_generator(function)
            decorated = function if as_it_is else self._using(chosen, function)
            set_endpoint_policy(decorated, self, chosen)
            set_policy_above(function, self, chosen, decorated)
            return decorated

        return decorate

    def _using(self, policy: Policy, function: F) -> F:
        wrapper: Any
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                self.use(policy)
                return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self.use(policy)
                return function(*args, **kwargs)

        return wrapper  # type: ignore[no-any-return]

    @property
    def metadata(self) -> MetaData:
        """The `MetaData` given at construction.

        Raises:
            ConfigurationError: none was given.
        """
        metadata: MetaData | None = self.database._core.metadata
        if metadata is None:
            raise ConfigurationError("This database has no metadata. Construct it with metadata=Base.metadata.")
        return metadata


def engine_is_fixed() -> ConfigurationError:
    """Return the error of an assignment to ``db.engine``."""
    return ConfigurationError(
        "db.engine cannot be replaced. In a test, use `with db.isolated() as session:`; to change the database later, "
        "let a function name it: SessionPlugin(lambda: settings.engine)."
    )


class ScopeRegistry(ScopedRegistry[Any]):
    """Makes a `scoped_session` proxy the session of the current unit of work; it registers nothing."""

    def __init__(self, db: DatabaseInterface[Any]) -> None:
        self._db = db

    def __call__(self) -> Any:
        """Return the session of the current unit of work."""
        return self._db.session

    def has(self) -> bool:
        """Return True if the current unit of work has made its session."""
        unit = self._db._find_unit_of_work()
        return unit is not None and unit.has_session and not unit.closed

    def set(self, obj: Any) -> None:
        """Refuse."""
        raise ConfigurationError(
            "The session belongs to the unit of work; a scoped_session cannot replace it. In a test, "
            "use db.isolated(), or give the database another engine."
        )

    def clear(self) -> None:
        """Do nothing: the session stays with its unit of work, which closes it."""


def _is_generator(function: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
