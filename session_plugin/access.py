"""What an app calls, wherever it stands.

A `Database` answers for itself; a framework's plugin answers for the `Database` of its app.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from sqlalchemy import MetaData
from sqlalchemy.util import ScopedRegistry

from .configuration import Configuration, PolicyLike
from .current import find_scope
from .exceptions import ConfigurationError, NoScopeError, ScopeClosedError
from .policy import Policy, as_policy, commit_on_success, is_coroutine_function
from .scope import SessionScope
from .typevars import S

if TYPE_CHECKING:
    from .configuration import Source
    from .database import BaseDatabase

F = TypeVar("F", bound=Callable[..., Any])

POLICIES_ATTRIBUTE = "__session_policies__"
"""Holds, on an endpoint, the policy of each database by what chose it."""


class HasDatabase(Protocol):
    """What a middleware needs to know: a `Database`, an `AsyncDatabase`, or what answers for one."""

    @property
    def database(self) -> BaseDatabase[Any]:
        """The database."""


def check_middleware(app: Any, database: Any, find_policy: Any) -> None:
    """Insist on what a middleware needs, before its first request.

    Raises:
        ConfigurationError: one of its arguments is something else.
    """
    if inspect.getattr_static(database, "database", None) is None:  # a plugin without an app yet has none to tell
        raise ConfigurationError(
            f"SessionScopeMiddleware was given {type(database).__name__} for a database. Write "
            "SessionScopeMiddleware(app, database), with a Database, an AsyncDatabase or a plugin."
        )
    for given in (app, find_policy or app):
        if not callable(given):
            raise ConfigurationError(
                f"SessionScopeMiddleware calls its app and its find_policy, and {type(given).__name__} cannot be "
                "called. Give a function."
            )


class Access(ABC, Generic[S]):
    """The part that sync and async databases share.

    Attributes:
        has_marks: True once an endpoint or what holds endpoints was given a policy of any database.
    """

    has_marks: ClassVar[bool] = False

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
                database made elsewhere, or a function that answers any of these when it is needed.
            class_: the session class; SQLAlchemy's `Session` or `AsyncSession` unless given.
            policy: how units of work begin and end unless they say otherwise.
            metadata: for ``create_all()`` and for migration tools.
            binds: from a mapped class, a mapper or a table to an engine or the name of one.
            **options: of the session class and of ``create_engine()``, under SQLAlchemy's names.

        Raises:
            ConfigurationError: any of it cannot work.
        """
        self._set_up(Configuration(source, class_, policy, metadata, binds, options))

    @abstractmethod
    def _set_up(self, configuration: Configuration) -> None:
        """Make of ``configuration`` what can be made now."""

    @property
    @abstractmethod
    def database(self) -> BaseDatabase[S]:
        """The database behind this object, here and now."""

    @property
    def scope(self) -> SessionScope[S]:
        """The unit of work in which the caller stands.

        Raises:
            NoScopeError: there is none.
        """
        scope = find_scope(self.database)
        if scope is None:
            raise self._no_scope()
        return scope

    def _no_scope(self) -> NoScopeError:
        thread = threading.current_thread()
        if thread is threading.main_thread():
            where, who = "here", "In a job or a script"
        else:
            where, who = f"in the thread {thread.name}, and a thread inherits none", "In a thread of your own"
        block = "async with" if self.database.is_async else "with"
        return NoScopeError(
            f"No unit of work is open {where}, so there is no session. {who}, open one: `{block} db.session_scope() as "
            "session:`. In a request, put the app through db.init_app(app) or SessionScopeMiddleware."
        )

    @property
    def session(self) -> S:
        """The session of the unit of work in which the caller stands; made at the first call.

        Raises:
            NoScopeError: there is no unit of work here.
            ScopeClosedError: the one that was inherited here has ended.
        """
        scope = self.scope
        if scope.closed:
            raise ScopeClosedError(scope.closed_message)
        return scope.session

    def on_commit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Call ``function(*args, **kwargs)`` once this transaction's data is durable.

        It is called with no transaction open, in a unit of work of its own that commits at its
        end; what it raises is logged.  It is dropped if the transaction, or the savepoint in
        which it was registered, rolls back.  Coroutine functions need an async database.

        Raises:
            NoScopeError: there is no unit of work here.
            ConfigurationError: ``function`` cannot be called, or not by a sync database.
        """
        self.scope.add_hook("commit", self._hook(function, args, kwargs))

    def on_rollback(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Call ``function(*args, **kwargs)`` once this transaction is rolled back; see `on_commit`."""
        self.scope.add_hook("rollback", self._hook(function, args, kwargs))

    def _hook(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], Any]:
        if not callable(function):
            raise ConfigurationError(
                f"A hook must be a function, and one of type {type(function).__name__} cannot be called. Give the "
                "function and its arguments: db.on_commit(send, order_id)."
            )
        name = getattr(function, "__qualname__", type(function).__name__)
        if is_coroutine_function(function) and not self.database.is_async:
            raise ConfigurationError(
                f"The hook {name} is a coroutine function, which a sync database cannot await. Make it a plain "
                "function, or use AsyncDatabase."
            )
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigurationError(
                f"The hook {name} cannot be called with these arguments: {error}. Give those that it takes after it."
            ) from None
        except ValueError:
            pass  # a builtin without a signature
        return partial(function, *args, **kwargs)

    def doom(self, reason: str = "doom() was called") -> None:
        """Decide that the current unit of work rolls back, whatever happens; ``reason`` is logged."""
        self.scope.doom(reason)

    def use(self, policy: PolicyLike) -> None:
        """Choose how the current unit of work begins and ends.

        Raises:
            NoScopeError: there is no unit of work here.
            PolicyError: ``policy`` is none, or the transaction has begun in another way.
        """
        self.scope.use(policy)

    def policy(self, policy: PolicyLike) -> Callable[[F], F]:
        """A decorator for an endpoint, a class of endpoints or a function: its unit of work is under ``policy``.

        The adapters for Flask, FastAPI and Starlette look at the endpoint before the first
        statement of the request, a dependency's included; elsewhere the policy is chosen when
        the function is called.
        """
        chosen = as_policy(policy)

        def decorate(function: F) -> F:
            if not callable(function):
                raise ConfigurationError(
                    f"@db.policy(...) decorates a function or a class, and {type(function).__name__} is none. Put it "
                    "above one."
                )
            as_it_is = isinstance(function, type) or _is_generator(function)
            decorated = function if as_it_is else self._using(chosen, function)
            self.mark(decorated, chosen)
            return decorated

        return decorate

    def mark(self, place: object, policy: Policy) -> None:
        """Note on an endpoint, or on what holds endpoints, the policy of this database there."""
        setattr(place, POLICIES_ATTRIBUTE, {**getattr(place, POLICIES_ATTRIBUTE, {}), self: policy})
        Access.has_marks = True

    def marked_policy(self, place: object) -> Policy | None:
        """The policy of this database that was noted on ``place``, or None."""
        policies: dict[Any, Policy] = getattr(place, POLICIES_ATTRIBUTE, {})
        return policies.get(self) or policies.get(self.database) if policies else None

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
        if self.database._given_metadata is None:
            raise ConfigurationError("No metadata is known. Construct with metadata=Base.metadata.")
        return self.database._given_metadata


class ScopeRegistry(ScopedRegistry[Any]):
    """Answers the session of the current unit of work; there is nothing to register."""

    def __init__(self, access: Access[Any]) -> None:
        self._access = access

    def __call__(self) -> Any:
        """The session of the current unit of work."""
        return self._access.session

    def has(self) -> bool:
        """True if the current unit of work has made its session."""
        scope = find_scope(self._access.database)
        return scope is not None and scope.has_session and not scope.closed

    def set(self, obj: Any) -> None:
        """Refused."""
        raise ConfigurationError("The session belongs to the unit of work; a scoped_session cannot replace it.")

    def clear(self) -> None:
        """The session stays with its unit of work, which closes it."""


def _is_generator(function: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def caller() -> str:
    """Where the ``session_scope()`` that calls this was opened."""
    frame = sys._getframe(2)  # past this one and session_scope()
    while frame.f_back is not None and frame.f_code.co_filename == contextlib.__file__:
        frame = frame.f_back
    return f"session_scope() at {frame.f_code.co_filename}:{frame.f_lineno}"
