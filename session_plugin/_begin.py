"""How transactions begin: for each policy a twin of the engine.

A twin shares the engine's pool.  Only that of a policy without transactions has one of its own, whose
connections are read-only for good: in a pool that others use, such a setting could stay behind.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from . import _autocommit, _engines, _mysql, _sqlite
from .exceptions import ConfigurationError
from .policy import SAFE_METHODS

if TYPE_CHECKING:
    from .database import BaseDatabase
    from .scope import SessionScope


class Twins:
    """The twins of one database's engines.

    Attributes:
        readers: by engine, the one that reads without transactions; an `AsyncEngine` on an async database.
    """

    def __init__(self, database: BaseDatabase[Any]) -> None:
        self._database = database
        self._known: dict[tuple[Any, ...], Engine] = {}
        self._making = threading.Lock()
        self.readers: dict[Engine, Any] = {}

    def engine_for(self, engine: Engine, scope: SessionScope[Any]) -> Engine:
        """``engine``, or its twin that begins as the policy of ``scope`` says.

        Raises:
            ConfigurationError: the policy reads without transactions, and that cannot be had here.
        """
        policy = scope.policy
        key = (engine, policy.read_only, policy.isolation_level, scope.method in SAFE_METHODS)
        twin = self._known.get(key)
        if twin is None:
            _engines.prepare(engine)  # a get_bind() of the user's may name one that is new here
            if policy.read_only and policy.isolation_level == _autocommit.LEVEL:
                twin = self._reader(engine)
            else:
                options = begin_options(engine.dialect.name, read_only=key[1], isolation_level=key[2], safe=key[3])
                twin = engine.execution_options(**options) if options else engine
            if engine in self._database._known_engines:
                self._known[key] = twin
        return twin

    def _reader(self, engine: Engine) -> Engine:
        with self._making:
            if engine not in self.readers:
                self.readers[engine] = self._make_reader(engine)
        reader: Engine = _engines.sync_engine(self.readers[engine])
        return reader

    def _make_reader(self, engine: Engine) -> Any:
        database = self._database
        options = database._options_of(engine)
        if options is None:
            raise ConfigurationError(
                "A read-only policy without transactions needs connections of its own, and an engine that was made "
                "elsewhere does not say how to make them. Give the database a URL, or choose the policy read_only."
            )
        made = _engines.make_engine(
            engine.url, _autocommit.reader_options(options), database, is_async=database.is_async
        )
        reader = _engines.sync_engine(made)
        _autocommit.forbid_writing(reader)
        _engines.prepare(reader)
        database._known_engines.add(reader)
        return made


def begin_options(dialect: str, *, read_only: bool, isolation_level: str | None, safe: bool) -> dict[str, Any]:
    """The execution options by which a transaction begins; none where the engine's own will do.

    ``safe`` is true for a request method that is not meant to write.
    """
    options: dict[str, Any] = {}
    if isolation_level is not None:
        options["isolation_level"] = isolation_level
    if dialect == "postgresql" and read_only:
        options["postgresql_readonly"] = True
    if dialect in _mysql.NAMES and read_only:
        options[_mysql.READ_ONLY_OPTION] = True
    if dialect == "sqlite" and read_only:
        options[_sqlite.BEGIN_OPTION] = _sqlite.READ_ONLY
    elif dialect == "sqlite" and not safe:
        options[_sqlite.BEGIN_OPTION] = _sqlite.IMMEDIATE
    return options
