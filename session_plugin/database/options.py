"""`Options`: the options of sessions and engines, by SQLAlchemy's names, for type checkers.

Nothing is checked by it at run time: `configuration` passes on what the session class and ``create_engine()`` accept,
and SQLAlchemy rejects the rest.  With ``class_`` any name is allowed, since that class may have options of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from sqlalchemy import Engine, Pool
    from sqlalchemy.engine.interfaces import IsolationLevel
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import Query, Session, sessionmaker
    from sqlalchemy.orm.session import JoinTransactionMode

Echo: TypeAlias = bool | Literal["debug"] | None


class SessionOptions(TypedDict, total=False):
    """Those of `Session` and `AsyncSession`."""

    autobegin: bool
    autoflush: bool
    bind: Engine | AsyncEngine | str | None
    close_resets_only: bool
    enable_baked_queries: bool
    expire_on_commit: bool
    future: Literal[True]
    info: dict[Any, Any] | None
    join_transaction_mode: JoinTransactionMode
    query_cls: type[Query[Any]] | None
    sync_session_class: type[Session] | sessionmaker[Any]
    twophase: bool


class EngineOptions(TypedDict, total=False):
    """Those of ``create_engine()``, and of SQLAlchemy's dialects for SQLite, PostgreSQL, MySQL and MariaDB.

    For those of another dialect, pass an engine of your own.
    """

    async_creator: Callable[..., Any]
    client_encoding: str | None
    connect_args: dict[Any, Any]
    creator: Callable[..., Any]
    echo: Echo
    echo_pool: Echo
    enable_from_linting: bool
    executemany_batch_page_size: int
    executemany_mode: str
    execution_options: Mapping[str, Any]
    hide_parameters: bool
    insertmanyvalues_page_size: int
    isolation_level: IsolationLevel
    json_deserializer: Callable[..., Any]
    json_serializer: Callable[..., Any]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    max_overflow: int
    module: Any
    native_datetime: bool
    native_inet_types: bool | None
    paramstyle: Literal["qmark", "numeric", "named", "format", "pyformat", "numeric_dollar"] | None
    plugins: list[str]
    pool: Pool | None
    pool_logging_name: str
    pool_pre_ping: bool
    pool_recycle: int
    pool_reset_on_return: bool | Literal["commit", "rollback"] | None
    pool_size: int
    pool_timeout: float
    pool_use_lifo: bool
    poolclass: type[Pool] | None
    query_cache_size: int
    skip_autocommit_rollback: bool
    use_insertmanyvalues: bool
    use_native_hstore: bool


class Options(SessionOptions, EngineOptions, total=False):
    """All keyword options of a database.

    Attributes:
        max_pending_sessions: of a sync database only.
    """

    max_pending_sessions: int
