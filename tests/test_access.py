"""What an app calls: policies on functions, and the plugin that answers for an app."""

from __future__ import annotations

import asyncio
import contextlib
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
    """Anything that can be weakly referred to."""


class APlugin(Plugin[Any], SyncInterface[Any]):
    _database_class = Database

    @property
    def database(self) -> Any:
        return self._current_database()


def registered(plugin: APlugin, *apps: App) -> APlugin:
    for app in apps:
        plugin._register(app, plugin._configuration)
    return plugin


def test_a_policy_on_a_function_holds_when_it_is_called() -> None:
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


def test_a_policy_on_a_coroutine_function() -> None:
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


def test_a_policy_on_a_generator_function_is_left_to_the_adapter() -> None:
    """A wrapper would hide from the framework that the endpoint is a generator."""
    db = Database("sqlite://")

    def rows() -> Any:
        yield 1

    async def events() -> Any:
        yield 1

    assert db.policy(read_only)(rows) is rows
    assert db.policy(read_only)(events) is events
    assert endpoint_policy(rows, db) is endpoint_policy(events, db) is read_only
    db.dispose()


def test_a_plugin_before_init_app_says_so() -> None:
    with pytest.raises(NoScopeError, match="init_app"):
        _ = APlugin("sqlite://").session
    with pytest.raises(ConfigurationError, match="init_app"):
        APlugin("sqlite://").database_for(App())


def test_each_app_gets_a_database_of_its_own() -> None:
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
    """With its other apps, and with a worker that imports no framework."""
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
    ("make", "says"),
    [
        (
            lambda: APlugin(AsyncDatabase("sqlite+aiosqlite://")),
            "needs a database of class Database, and .* AsyncDatabase",
        ),
        (lambda: APlugin(Database("sqlite://"), echo=True), "was given a Database and further options"),
    ],
)
def test_a_database_that_a_plugin_is_given_must_fit(make: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        registered(make(), App())


def test_a_function_names_the_source_late() -> None:
    """Nothing is made before it is needed."""
    asked: list[str] = []

    def source() -> str:
        asked.append("asked")
        return "sqlite://"

    app = App()
    plugin = registered(APlugin(source), app)
    assert asked == []
    with plugin.session_scope() as session:
        assert session is plugin.session
    assert asked == ["asked"]
    plugin.dispose()


def test_what_cannot_work_is_told_at_init_app() -> None:
    with pytest.raises(ConfigurationError, match="No database is configured"):
        registered(APlugin(), App())


def test_a_policy_is_that_of_its_own_database() -> None:
    """What one plugin says of an endpoint is nothing to another; a shared database's word holds for its plugin."""
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
    """A policy that would silently not hold is an error."""
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


def test_which_app_is_meant_does_not_depend_on_the_garbage_collector() -> None:
    """Once a plugin has served two apps, the one that is left is not taken for granted."""
    plugin = registered(APlugin("sqlite://"), App())
    gc.collect()
    kept = App()
    registered(plugin, kept)
    with pytest.raises(NoScopeError, match="2 apps"):
        _ = plugin.database
    assert plugin.database_for(kept)


def test_requests_that_are_first_at_once_make_one_database() -> None:
    """A source that is named late is asked once."""
    asked: list[str] = []
    both = threading.Barrier(2)

    def source() -> str:
        asked.append("asked")
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
    assert len(asked) == 1
    assert found[0] is found[1]


def test_a_scoped_session_may_be_taken_at_import_time() -> None:
    """Flask-Admin's views ask for one before any app is made."""
    plugin = APlugin("sqlite://", metadata=Base.metadata)
    scoped = plugin.scoped_session
    app = App()
    registered(plugin, app)
    with plugin.session_scope() as session:
        assert scoped() is session
    plugin.dispose()


def test_a_session_of_an_ended_scope_says_what_to_do() -> None:
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


def test_where_a_scope_was_opened_is_the_users_line() -> None:
    """Also when it is entered by an ExitStack."""
    db = Database("sqlite://")
    with contextlib.ExitStack() as stack:
        stack.enter_context(db.session_scope())
        assert "test_access.py" in repr(db.scope)
    db.dispose()


def test_a_machine_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has none, and needs none of this."""
    monkeypatch.delattr(os, "register_at_fork")
    after_fork_in_child(lambda: None)
