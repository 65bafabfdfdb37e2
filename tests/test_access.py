"""What an app calls: policies on functions, and the plugin that answers for an app."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from session_plugin import AsyncDatabase, ConfigurationError, Database, NoScopeError, manual, read_only
from session_plugin.plugin import Plugin
from session_plugin.sync_access import SyncAccess

from .harness import Base, insert


class App:
    """Anything that can be weakly referred to."""


class APlugin(Plugin[Any], SyncAccess[Any]):
    database_class = Database

    @property
    def database(self) -> Any:
        return self._the_database()


def registered(plugin: APlugin, *apps: App) -> APlugin:
    for app in apps:
        plugin.register(app, plugin.configuration)
    return plugin


def test_a_policy_on_a_function_holds_when_it_is_called() -> None:
    db = Database("sqlite://", metadata=Base.metadata)

    @db.policy(read_only)
    def report(number: int) -> int:
        """Doc."""
        assert db.scope.policy is read_only
        return number

    assert (report.__name__, report.__doc__, db.marked_policy(report)) == ("report", "Doc.", read_only)
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
    assert db.marked_policy(rows) is db.marked_policy(events) is read_only
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


def test_a_plugin_shares_a_database_made_elsewhere() -> None:
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
    "make", [lambda: APlugin(AsyncDatabase("sqlite+aiosqlite://")), lambda: APlugin(Database("sqlite://"), echo=True)]
)
def test_a_database_made_elsewhere_must_fit(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="made elsewhere does not fit"):
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

    assert first.marked_policy(endpoint) is read_only
    assert second.marked_policy(endpoint) is None
    second.policy(manual)(endpoint)
    assert first.marked_policy(endpoint) is read_only

    @shared.policy(manual)
    def other() -> None: ...

    assert first.marked_policy(other) is manual
    assert first.marked_policy(None) is None
