"""OpenTelemetry's instrumentation of Flask, FastAPI and SQLAlchemy, with real spans kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from flask import Flask
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError

import session_plugin.flask
from session_plugin import Database
from session_plugin.fastapi import AsyncSessionPlugin

from . import asgi_site, wsgi_site
from .conftest import make_store
from .harness import POOL, Parent, Store, add_orphan, wait_for
from .wsgi_site import module_store

__all__ = ["module_store"]

DRIVERS = ["postgresql+asyncpg", "sqlite+pysqlite"]
ORDERS = ["instrument first", "init_app first"]


class Spans:
    """The spans that were recorded, and for each COMMIT the id of the span that it ran in."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.commits: list[int] = []

    def trace_database(self, engine: Any) -> None:
        SQLAlchemyInstrumentor().instrument(engine=engine, tracer_provider=self.provider, skip_dep_check=True)
        event.listen(engine, "commit", self._note_commit)

    def _note_commit(self, connection: Any) -> None:
        self.commits.append(trace.get_current_span().get_span_context().span_id)

    def of_requests(self, number: int) -> list[Any]:
        """The spans of the requests; they may end after the client has received its response."""
        wait_for(lambda: len(self._of_requests()) >= number)
        return self._of_requests()

    def _of_requests(self) -> list[Any]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is trace.SpanKind.SERVER]

    def inside(self, span: Any) -> list[str]:
        """The first word of each statement in ``span``."""
        return [
            child.name.split()[0]
            for child in self.exporter.get_finished_spans()
            if child.parent is not None and child.parent.span_id == span.context.span_id
        ]


@pytest.fixture
def spans() -> Iterator[Spans]:
    yield Spans()
    SQLAlchemyInstrumentor().uninstrument()


@pytest.fixture(params=DRIVERS, scope="module")
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    store = make_store(request, request.param)
    yield store
    store.engine.dispose()


@pytest.fixture(params=ORDERS)
def site(request: pytest.FixtureRequest, store: Store, spans: Spans) -> Iterator[Any]:
    """A FastAPI app that is instrumented before or after `init_app`."""
    app = FastAPI()
    site = asgi_site.Site(store, app, sync=not store.driver.endswith("asyncpg"))

    def instrument() -> None:
        FastAPIInstrumentor.instrument_app(app, tracer_provider=spans.provider, exclude_spans=["send", "receive"])

    if request.param == "init_app first":
        site.db.init_app(app)
    instrument()
    app.get("/{name}")(async_view(site.db) if isinstance(site.db, AsyncSessionPlugin) else sync_view(site.db))
    with site.running():
        spans.trace_database(site.sync_engine)
        site.request_param = request.param
        yield site
    FastAPIInstrumentor.uninstrument_app(app)


def async_view(db: Any) -> Any:
    async def view(name: str) -> Any:
        db.on_commit(lambda: None)
        await db.session.run_sync(add_orphan) if name == "orphan" else db.session.add(Parent(name=name))

    return view


def sync_view(db: Any) -> Any:
    def view(name: str) -> Any:
        add_orphan(db.session) if name == "orphan" else db.session.add(Parent(name=name))

    return view


def test_settling_is_part_of_the_request(site: Any, spans: Spans) -> None:
    """The last flush and the COMMIT belong to the span of their own request, even when they run in a thread."""
    with ThreadPoolExecutor(5) as pool, site.connect() as connection:
        assert site.exchange(connection, "/first").status == 200
        assert site.exchange(connection, "/second").status == 200
        list(pool.map(lambda number: site.get(f"/{number}"), range(10)))
    requests = spans.of_requests(12)
    assert len({span.context.trace_id for span in requests}) == 12
    assert [spans.inside(span).count("INSERT") for span in requests] == [1] * 12
    assert sorted(spans.commits) == sorted(span.context.span_id for span in requests)


def test_failed_commit_is_an_error_of_the_request(site: Any, spans: Spans) -> None:
    """A failed commit makes the request's span an error with status 500.

    Instrumentation that was added before `init_app` also records the exception.
    """
    assert site.get("/orphan").status == 500
    (span,) = spans.of_requests(1)
    assert (span.status.status_code, span.attributes["http.status_code"]) == (trace.StatusCode.ERROR, 500)
    if site.request_param == "instrument first":
        assert [event.attributes["exception.type"] for event in span.events] == ["sqlalchemy.exc.IntegrityError"]


def test_a_handled_commit_error_sets_the_status_of_the_span(store: Store, spans: Spans) -> None:
    """If the app's error handler returns 409 for a failed commit, the span has status 409 and is not an error."""
    app = FastAPI(exception_handlers={IntegrityError: lambda request, error: JSONResponse({}, 409)})
    site = asgi_site.Site(store, app, sync=not store.driver.endswith("asyncpg"))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=spans.provider, exclude_spans=["send", "receive"])
    app.get("/{name}")(async_view(site.db) if isinstance(site.db, AsyncSessionPlugin) else sync_view(site.db))
    with site.running():
        assert site.get("/orphan").status == 409
    (span,) = spans.of_requests(1)
    assert (span.status.status_code, span.attributes["http.status_code"]) == (trace.StatusCode.UNSET, 409)
    FastAPIInstrumentor.uninstrument_app(app)


@pytest.mark.parametrize("handled", [False, True])
def test_flask(handled: bool, module_store: Store, spans: Spans) -> None:
    """In Flask, instrumented before `init_app`, each request's span has its statements, COMMIT and status."""
    app, db = Flask(__name__), session_plugin.flask.SessionPlugin(module_store.url, **POOL)
    app.logger.disabled = True
    module_store.clear()
    FlaskInstrumentor().instrument_app(app, tracer_provider=spans.provider)
    db.init_app(app)
    app.get("/<name>")(lambda name: sync_view(db)(name) or {})
    if handled:
        app.register_error_handler(IntegrityError, lambda error: ("conflict", 409))
    with wsgi_site.Site(module_store, app, db).checked() as site:
        spans.trace_database(db.engine)
        statuses = [site.ask(path, "GET").status for path in ("/tea", "/orphan", "/coffee")]
    assert statuses == [200, 409 if handled else 500, 200]
    requests = spans.of_requests(3)
    assert [span.attributes["http.status_code"] for span in requests] == statuses
    assert [span.status.status_code is trace.StatusCode.ERROR for span in requests] == [False, not handled, False]
    assert len({span.context.trace_id for span in requests}) == 3
    assert [spans.inside(span).count("INSERT") for span in requests] == [1, 1, 1]
    assert spans.commits == [span.context.span_id for span in requests]
    FlaskInstrumentor.uninstrument_app(app)


def test_engines_created_later_are_traced(spans: Spans) -> None:
    """`instrument()` without an engine also traces the engine of a database that is created after the call."""
    SQLAlchemyInstrumentor().instrument(tracer_provider=spans.provider, skip_dep_check=True)
    db = Database("sqlite://")
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    db.dispose()
    assert "SELECT" in [span.name.split()[0] for span in spans.exporter.get_finished_spans()]
