"""The accessors of a plugin and the policies on functions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import threading
from typing import Any

import pytest
from sqlalchemy.orm import Session

from session_plugin import (
    AsyncDatabase,
    ConfigurationError,
    Database,
    NoScopeError,
    ScopeClosedError,
    manual,
    read_only,
)
from session_plugin.database.sync_interface import SyncInterface
from session_plugin.engines.forks import after_fork_in_child
from session_plugin.plugin import Plugin
from session_plugin.policy import endpoint_policy

from .harness import Base, insert


class App:
    """An app: any object that can be weakly referenced."""


class APlugin(Plugin[Any], SyncInterface[Any]):
    _database_class = Database

    @property
    def database(self) -> Any:
        return self._current_database()


def registered(plugin: APlugin, *apps: App) -> APlugin:
    for app in apps:
        plugin._register(app, plugin._configuration)
    return plugin


def test_a_policy_on_a_function_applies_during_the_call() -> None:
    """A policy on a function applies for the duration of the call."""
    db = Database("sqlite://", metadata=Base.metadata)

    @db.policy(read_only)
    def report(number: int) -> int:
        """Doc."""
        assert db.scope.policy is read_only
        return number

    assert (report.__name__, report.__doc__, endpoint_policy(report, db)) == ("report", "Doc.", read_only)
    with db.session_scope():
        assert report(42) == 42
    with pytest.raises(NoScopeError):
        report(42)
    db.dispose()


def test_a_policy_on_a_coroutine_function_applies_during_the_call() -> None:
    """A policy on a coroutine function applies for the duration of the call."""
    db = AsyncDatabase("sqlite+aiosqlite://")

    @db.policy(manual)
    async def work() -> Any:
        return db.scope.policy

    async def main() -> None:
        async with db.session_scope():
            assert await work() is manual
        await db.dispose()

    assert asyncio.iscoroutinefunction(work)
    assert (work.__name__, endpoint_policy(work, db)) == ("work", manual)
    asyncio.run(main())


def test_a_generator_function_with_a_policy_is_not_wrapped() -> None:
    """A generator function is marked with the policy but not wrapped, so that a framework still recognises it."""
    db = Database("sqlite://")

    def rows() -> Any:
        yield 1

    async def events() -> Any:
        yield 1

    assert db.policy(read_only)(rows) is rows
    assert db.policy(read_only)(events) is events
    assert endpoint_policy(rows, db) is endpoint_policy(events, db) is read_only
    db.dispose()


def test_a_plugin_before_init_app_raises() -> None:
    """A plugin that is used before init_app() raises an error that names init_app()."""
    with pytest.raises(NoScopeError, match="init_app"):
        _ = APlugin("sqlite://").session
    with pytest.raises(ConfigurationError, match="init_app"):
        APlugin("sqlite://").database_for(App())


def test_each_app_has_its_own_database() -> None:
    """A plugin creates a separate database for each app, and without a scope it cannot choose between them."""
    first, second = App(), App()
    plugin = registered(APlugin("sqlite://", metadata=Base.metadata), first, second)
    assert plugin.database_for(first) is not plugin.database_for(second)
    with pytest.raises(NoScopeError, match="2 apps"):
        _ = plugin.database
    with plugin.database_for(second).session_scope() as session, Database("sqlite://").session_scope():
        assert plugin.session is session
    with pytest.raises(ConfigurationError, match="called twice"):
        registered(plugin, first)
    for app in (first, second):
        plugin.database_for(app).dispose()


def test_a_plugin_shares_a_database_that_it_is_given() -> None:
    """A plugin that is given a `Database` uses that object, which other apps and workers can share."""
    shared = Database("sqlite://", metadata=Base.metadata, policy=manual)
    app = App()
    plugin = registered(APlugin(shared), app)
    assert plugin.database is shared
    shared.create_all()
    with shared.session_scope() as session:
        assert plugin.session is session
        insert("tea")(session)
    shared.dispose()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: APlugin(AsyncDatabase("sqlite+aiosqlite://")),
            "needs a database of class Database, and .* AsyncDatabase",
        ),
        (lambda: APlugin(Database("sqlite://"), echo=True), "together with further options"),
    ],
)
def test_a_database_that_a_plugin_is_given_must_fit(make: Any, message: str) -> None:
    """A plugin refuses a database of the wrong class, and options next to a database."""
    with pytest.raises(ConfigurationError, match=message):
        registered(make(), App())


def test_a_source_function_is_called_on_first_use() -> None:
    """A function that returns the URL is called when the database is first used."""
    calls: list[str] = []

    def source() -> str:
        calls.append("asked")
        return "sqlite://"

    app = App()
    plugin = registered(APlugin(source), app)
    assert calls == []
    with plugin.session_scope() as session:
        assert session is plugin.session
    assert calls == ["asked"]
    plugin.dispose()


def test_a_missing_database_is_reported_by_init_app() -> None:
    """A plugin without a database raises an error in init_app()."""
    with pytest.raises(ConfigurationError, match="No database is configured"):
        registered(APlugin(), App())


def test_a_policy_applies_to_its_own_database() -> None:
    """A policy applies to the plugin that set it; a policy of a shared database also applies to its plugins."""
    shared = Database("sqlite://")
    apps = App(), App()
    first, second = registered(APlugin(shared), apps[0]), registered(APlugin("sqlite://"), apps[1])

    @first.policy(read_only)
    def endpoint() -> None: ...

    assert endpoint_policy(endpoint, first) is read_only
    assert endpoint_policy(endpoint, second) is None
    second.policy(manual)(endpoint)
    assert endpoint_policy(endpoint, first) is read_only

    @shared.policy(manual)
    def other() -> None: ...

    assert endpoint_policy(other, first) is manual
    assert endpoint_policy(None, first) is None


def test_a_database_that_a_plugin_is_given_takes_no_further_options() -> None:
    """A plugin that is given a database refuses options that would have no effect on it."""
    shared = Database("sqlite://")
    for plugin in (
        APlugin(shared, policy=manual),
        APlugin(shared, metadata=Base.metadata),
        APlugin(shared, class_=CustomSession),
        APlugin(shared, binds={Base: "default"}),
    ):
        with pytest.raises(ConfigurationError, match="further options"):
            registered(plugin, App())
    shared.dispose()


class CustomSession(Session):
    pass


def test_garbage_collection_does_not_resolve_an_ambiguous_app() -> None:
    """A plugin that was registered with two apps stays ambiguous after one of them has been garbage-collected."""
    plugin = registered(APlugin("sqlite://"), App())
    gc.collect()
    kept = App()
    registered(plugin, kept)
    with pytest.raises(NoScopeError, match="2 apps"):
        _ = plugin.database
    assert plugin.database_for(kept)


def test_simultaneous_first_requests_create_one_database() -> None:
    """If two threads use a plugin for the first time at once, the function that returns the URL is called once."""
    calls: list[str] = []
    both = threading.Barrier(2)

    def source() -> str:
        calls.append("asked")
        return "sqlite://"

    app = App()
    plugin = registered(APlugin(source), app)
    found: list[Any] = []

    def ask() -> None:
        both.wait()
        found.append(plugin.database)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found[0] is found[1]


def test_a_scoped_session_can_be_read_at_import_time() -> None:
    """`scoped_session` can be read before the app exists, as Flask-Admin's views do."""
    plugin = APlugin("sqlite://", metadata=Base.metadata)
    scoped = plugin.scoped_session
    app = App()
    registered(plugin, app)
    with plugin.session_scope() as session:
        assert scoped() is session
    plugin.dispose()


def test_a_session_of_an_ended_scope_raises() -> None:
    """A session that is read after its unit of work has ended raises an error that names session_scope()."""
    db = Database("sqlite://")

    async def main() -> None:
        with db.session_scope():
            outliving = asyncio.create_task(outlive())
        await outliving

    async def outlive() -> None:
        with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
            _ = db.session

    asyncio.run(main())
    db.dispose()


def test_repr_of_a_scope_names_the_users_line() -> None:
    """`repr()` of a scope names the user's line that opened it, even if an `ExitStack` entered it."""
    db = Database("sqlite://")
    with contextlib.ExitStack() as stack:
        stack.enter_context(db.session_scope())
        assert "test_access.py" in repr(db.scope)
    db.dispose()


def test_a_machine_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering a fork handler does nothing on Windows, which has no `os.register_at_fork`."""
    monkeypatch.delattr(os, "register_at_fork")
    after_fork_in_child(lambda: None)


def test_a_policy_above_other_decorators() -> None:
    """A plugin whose adapter knows no endpoints finds a policy that stands above another decorator."""
    db, an_app = APlugin("sqlite://"), App()
    registered(db, an_app)

    def endpoint() -> None: ...

    decorated = db.policy(manual)(functools.wraps(endpoint)(lambda: endpoint()))
    assert db._endpoint_policy(decorated) is manual
    assert db._endpoint_policy(endpoint) is manual
