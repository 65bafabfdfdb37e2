"""GraphQL with strawberry: a result with errors is a 200, and what saves nothing of it."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import strawberry
from fastapi import FastAPI
from flask import Flask
from strawberry.extensions import SchemaExtension
from strawberry.fastapi import GraphQLRouter
from strawberry.flask.views import GraphQLView
from strawberry.types.graphql import OperationType

from session_plugin import Decision, Outcome, read_only
from session_plugin.flask import SessionPlugin

from .asgi_site import Site as AsgiSite
from .asgi_site import stores
from .contract import logged
from .harness import POOL, Reply, Store, count, insert
from .wsgi_site import Site, module_store, store

__all__ = ["module_store", "store"]

async_store = stores(["sqlite+aiosqlite", "postgresql+asyncpg", "mariadb+asyncmy"])

ALL = 'mutation { one: add(name: "tea") two: add(name: "milk") }'
PART = 'mutation { one: add(name: "tea") two: add(name: "gold") }'

pytestmark = pytest.mark.filterwarnings(  # aiosqlite leaves a connection open if the task that opens it is cancelled
    "ignore:.*unclosed database:ResourceWarning",
    "ignore:.*unclosed database:pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(autouse=True)
def no_tracebacks() -> Iterator[None]:
    """Strawberry logs each error with its traceback."""
    logger = logging.getLogger("strawberry.execution")
    logger.disabled = True
    yield
    logger.disabled = False


def dooming(db: Any) -> type[SchemaExtension]:
    class Dooming(SchemaExtension):
        def on_execute(self) -> Iterator[None]:
            yield
            result = self.execution_context.result
            if result is not None and result.errors:
                db.doom("the GraphQL result has errors")

    return Dooming


def processing_errors(db: Any) -> type[strawberry.Schema]:
    class Schema(strawberry.Schema):
        def process_errors(self, errors: Any, execution_context: Any = None) -> None:
            db.doom("the GraphQL result has errors")
            super().process_errors(errors, execution_context)

    return Schema


def by_policy(db: Any) -> type[SchemaExtension]:
    def undo(outcome: Outcome) -> Decision:
        return Decision(False, "the GraphQL result has errors")

    class ByPolicy(SchemaExtension):
        def on_execute(self) -> Iterator[None]:
            yield
            result = self.execution_context.result
            if result is not None and result.errors:
                db.use(undo)

    return ByPolicy


def schema(db: Any, hook: str, query: type, mutation: type) -> strawberry.Schema:
    if hook == "process_errors":
        return processing_errors(db)(query, mutation)
    hooks = {"doom": [dooming], "policy": [by_policy], "none": []}[hook]
    return strawberry.Schema(query, mutation, extensions=[make(db) for make in hooks])


def graphql_app(db: Any, hook: str) -> FastAPI:
    @strawberry.type
    class Query:
        @strawberry.field
        async def rows(self) -> int:
            return await db.session.run_sync(count)

        @strawberry.field
        async def own_rows(self) -> int:
            async with db.session_scope(new=True) as session:
                return await session.run_sync(count)

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        async def add(self, name: str) -> str | None:
            await db.session.run_sync(insert(name))
            if name == "gold":
                raise ValueError("half done")
            return name

        @strawberry.mutation
        async def add_alone(self, name: str) -> str | None:
            async with db.session_scope(new=True) as session:
                await session.run_sync(insert(name))
                if name == "gold":
                    raise ValueError("half done")
                return name

    app = FastAPI()
    app.include_router(GraphQLRouter(schema(db, hook, Query, Mutation)), prefix="/graphql")
    return app


def ask(site: Any, query: str) -> Reply:
    with site.connect() as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/graphql", json.dumps({"query": query}), headers)
        response = connection.getresponse()
        return Reply(response.status, response.read(), complete=True)


SAVED = {"none": ["gold", "tea"], "doom": [], "process_errors": [], "policy": []}


@pytest.mark.parametrize("hook", SAVED)
def test_errors_in_a_result_on_fastapi(async_store: Store, hook: str, caplog: pytest.LogCaptureFixture) -> None:
    """A partial result is saved as a whole, the failed half too, unless a hook decides otherwise."""
    site = AsgiSite(async_store)
    site.app = graphql_app(site.db, hook)
    with site.running():
        assert ask(site, "{ rows }").json == {"data": {"rows": 0}}
        reply = ask(site, PART)
        assert (reply.status, reply.json["data"]) == (200, {"one": "tea", "two": None})
        assert async_store.names() == SAVED[hook]
        async_store.clear()
        assert ask(site, ALL).json == {"data": {"one": "tea", "two": "milk"}}
    assert async_store.names() == ["milk", "tea"]
    discarded = [message for message in logged(caplog, "WARNING") if "the GraphQL result has errors" in message]
    assert len(discarded) == (hook != "none")


@pytest.mark.parametrize("hook", SAVED)
def test_errors_in_a_result_on_flask(store: Store, hook: str) -> None:
    """As on FastAPI, in threads."""
    db = SessionPlugin(store.url, **POOL)

    @strawberry.type
    class Query:
        @strawberry.field
        def rows(self) -> int:
            return count(db.session)

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        def add(self, name: str) -> str | None:
            insert(name)(db.session)
            if name == "gold":
                raise ValueError("half done")
            return name

    app = Flask(__name__)
    db.init_app(app)
    view = GraphQLView.as_view("graphql", schema=schema(db, hook, Query, Mutation))
    app.add_url_rule("/graphql", view_func=view)
    with Site(store, app, db).checked() as site:
        site.start()
        reply = ask(site, PART)
        assert (reply.status, reply.json["data"]) == (200, {"one": "tea", "two": None})
        assert store.names() == SAVED[hook]
        store.clear()
        assert ask(site, ALL).json == {"data": {"one": "tea", "two": "milk"}}
        assert ask(site, "{ rows }").json == {"data": {"rows": 2}}
    assert store.names() == ["milk", "tea"]


def test_each_mutation_may_have_a_unit_of_work_of_its_own(async_store: Store) -> None:
    """Then a partial result is saved in part, as it says, although the request's own unit of work is doomed."""
    site = AsgiSite(async_store)
    site.app = graphql_app(site.db, "doom")
    query = 'mutation { one: addAlone(name: "tea") two: addAlone(name: "gold") three: addAlone(name: "milk") }'
    with site.running():
        assert ask(site, query).json["data"] == {"one": "tea", "two": None, "three": "milk"}
    assert async_store.names() == ["milk", "tea"]


def test_fields_of_a_query_are_resolved_at_once(async_store: Store) -> None:
    """Through one async session that raises; each field with a unit of work of its own reads beside the others."""
    site = AsgiSite(async_store)
    site.app = graphql_app(site.db, "doom")
    with site.running():
        reply = ask(site, "{ a: rows b: rows }")
        assert reply.status == 200
        assert "session_scope(new=True)" in reply.json["errors"][0]["message"]
        assert ask(site, "{ a: ownRows b: ownRows }").json == {"data": {"a": 0, "b": 0}}
    gc.collect()  # what a field that was cancelled has left, here and not in a test that expects no warning


def test_a_query_may_be_read_only(async_store: Store) -> None:
    """GraphQL sends queries by POST; an extension knows the operation before the first statement."""
    site = AsgiSite(async_store)
    db = site.db

    class ReadOnlyQueries(SchemaExtension):
        def on_execute(self) -> Iterator[None]:
            if self.execution_context.operation_type is OperationType.QUERY:
                db.use(read_only)
            yield

    @strawberry.type
    class Query:
        @strawberry.field
        async def writes(self) -> str:
            await db.session.run_sync(insert("lost"))
            return "lost"

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        async def add(self) -> str:
            await db.session.run_sync(insert("tea"))
            return "tea"

    router = GraphQLRouter(strawberry.Schema(Query, Mutation, extensions=[ReadOnlyQueries, dooming(db)]))
    site.app.include_router(router, prefix="/graphql")
    with site.running():
        assert "read-only" in ask(site, "{ writes }").json["errors"][0]["message"]
        assert ask(site, "mutation { add }").json == {"data": {"add": "tea"}}
    assert async_store.names() == ["tea"]
