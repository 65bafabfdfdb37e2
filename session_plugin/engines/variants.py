"""`EngineVariants`: how transactions begin, for each policy an engine with other execution options.

A variant shares the engine's pool.  Only that of a policy without transactions has a pool of its own,
whose connections are read-only for good: in a shared pool, such a setting could stay behind.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, event

from ..exceptions import ConfigurationError
from ..policy import Policy
from . import autocommit
from .backends import backend_for
from .making import make_engine, prepare, sync_engine


class EngineVariants:
    """The variants of one database's engines.

    Attributes:
        autocommit_engines: by engine, the one that reads without transactions; an `AsyncEngine` on an async database.
    """

    def __init__(self, made_with: dict[Engine, Mapping[str, Any] | None], owner: object, *, is_async: bool) -> None:
        """Create the variants of some engines; each is made when it is first needed.

        Args:
            made_with: the engines with the options they were made with, or None for the user's own.
                Autocommit engines are added when they are made.
            owner: what the engines belong to; see `make_engine`.
            is_async: True for an async database.
        """
        self._made_with = made_with
        self._owner = owner
        self._is_async = is_async
        self._variants: dict[tuple[Any, ...], Engine] = {}
        self._making = threading.Lock()
        self.autocommit_engines: dict[Engine, Any] = {}

    def engine_for(self, engine: Engine, policy: Policy, *, may_write: bool) -> Engine:
        """Return ``engine``, or its variant that begins as ``policy`` says.

        Raises:
            ConfigurationError: the policy reads without transactions, and the engine is the user's own.
        """
        key = (engine, policy.read_only, policy.isolation_level, may_write)
        variant = self._variants.get(key)
        if variant is None:
            if not self._is_derived(engine):
                prepare(engine, made_here=False)  # a get_bind() of the user's may return one that is new here
            if policy.reads_without_transactions:
                variant = self._autocommit_engine(engine)
            else:
                options = begin_options(engine, policy, may_write=may_write)
                variant = engine.execution_options(**options) if options else engine
            if engine in self._made_with:
                self._variants[key] = variant
        return variant

    def _is_derived(self, engine: Engine) -> bool:
        """Return True for a known engine, and for one made from it by ``execution_options()``."""
        return engine in self._made_with or any(
            known.pool is engine.pool and known.dialect is engine.dialect for known in self._made_with
        )

    def _autocommit_engine(self, engine: Engine) -> Engine:
        with self._making:
            if engine not in self.autocommit_engines:
                self.autocommit_engines[engine] = self._make_autocommit_engine(engine)
        made: Engine = sync_engine(self.autocommit_engines[engine])
        return made

    def _make_autocommit_engine(self, engine: Engine) -> Any:
        options = self._made_with.get(engine)
        if options is None:
            raise ConfigurationError(
                "read_only_autocommit needs a second pool of connections, and session_plugin cannot make one for an "
                "Engine that you created yourself. Give the database a URL, or choose the policy read_only."
            )
        options = autocommit.autocommit_options(options)
        made = make_engine(engine.url, options, self._owner, is_async=self._is_async)
        forbid_writing(sync_engine(made))
        prepare(sync_engine(made), made_here=True)
        self._made_with[sync_engine(made)] = options
        return made


def forbid_writing(engine: Engine) -> None:
    """Make every connection of ``engine`` read-only from its first moment on.

    Raises:
        ConfigurationError: it is not known how to do that on this database.
    """
    statement = backend_for(engine.dialect.name).read_only_statement
    if statement is None:
        raise ConfigurationError(
            f"session_plugin does not know how to forbid writing outside a transaction on {engine.dialect.name}. "
            "Choose the policy read_only."
        )

    def forbid(dbapi_connection: Any, record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute(statement)
        cursor.close()

    event.listen(engine, "connect", forbid)


def begin_options(engine: Engine, policy: Policy, *, may_write: bool) -> dict[str, Any]:
    """Return the execution options with which a transaction of ``policy`` begins; none if the engine's own will do."""
    options = backend_for(engine.dialect.name).begin_options(read_only=policy.read_only, may_write=may_write)
    if policy.isolation_level is not None:
        options["isolation_level"] = policy.isolation_level
    return options
