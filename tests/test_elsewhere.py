"""Frameworks without an integration: behind the plain middleware, and with a small adapter."""

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, insert
from sqlalchemy.orm import Session

from example_apps.elsewhere import books
from example_apps.ledger_models import EQUITY, Account, Base, Entry, Transfer, balances
from session_plugin import AsyncDatabase, Database

from .apps import ASGIHarness, WSGIHarness
from .harness import POOL, Reply, wait_for

ASGI = ["litestar", "quart", "falcon_asgi"]
WSGI = ["pyramid", "bottle", "falcon_wsgi"]
OPENED = {"alice": 100, "bob": 0, EQUITY: -100}
MOVED = {"alice": 70, "bob": 30, EQUITY: -100}


@dataclass
class Seen:
    """The state when the app sent something to the server."""

    what: Any
    durable: dict[str, int]
    held: int


class Elsewhere:
    """An example app on a real server, with a layer between them that records the database's state at each message."""

    port: int
    servers_own: bytes
    """Part of the server's own response for an app that raises."""

    def __init__(self, name: str, folder: Path, *, adapter: bool) -> None:
        self.name, self.adapter = name, adapter
        self.seen: list[Seen] = []
        self.under_way: list[Any] = []
        self.engine = create_engine(f"sqlite:///{folder / 'ledger.db'}")
        create_app = import_module(f"example_apps.elsewhere.{name}_app").create_app
        kind, driver = (AsyncDatabase, "sqlite+aiosqlite") if name in ASGI else (Database, "sqlite")
        self.db: Any = kind(f"{driver}:///{folder / 'ledger.db'}", metadata=Base.metadata, **POOL)
        self.served: Any = create_app(self.db, adapter=adapter)
        self.app: Any = self.watched(self.served)

    def watched(self, app: Any) -> Any:
        raise NotImplementedError

    def see(self, what: Any) -> None:
        pool = getattr(self.db.engine, "sync_engine", self.db.engine).pool
        self.seen.append(Seen(what, self.balances(), pool.checkedout()))

    def balances(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            return dict(connection.execute(balances()).all())

    def reopen(self) -> None:
        """Reset the accounts once the last request has ended, whose client may have continued earlier."""
        assert wait_for(lambda: not self.under_way)
        with self.engine.begin() as connection:
            for model in (Entry, Transfer, Account):
                connection.execute(model.__table__.delete())
            connection.execute(insert(Account), [{"name": name} for name in OPENED])
            connection.execute(insert(Transfer).values(id=1, amount=100))
            entries = [(EQUITY, -100), ("alice", 100)]
            rows = [{"transfer_id": 1, "account_name": name, "amount": amount} for name, amount in entries]
            connection.execute(insert(Entry), rows)
        self.seen.clear()

    def ask(self, method: str, path: str, body: Any = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            try:
                return Reply(response.status, response.read(), complete=True)
            except (http.client.IncompleteRead, ConnectionError) as error:
                return Reply(response.status, getattr(error, "partial", b""), complete=False)
        finally:
            connection.close()

    def transfer(self, source: str = "alice", target: str = "bob", amount: int = 30, **more: Any) -> Reply:
        return self.ask("POST", "/transfers", {"source": source, "target": target, "amount": amount, **more})


class OnASGI(Elsewhere, ASGIHarness):
    servers_own = b"Internal Server Error"

    def watched(self, app: Any) -> Any:
        async def watch(scope: Any, receive: Any, send: Any) -> None:
            self.under_way += [scope] if scope["type"] == "http" else []
            try:
                await see(scope, receive, send)
            finally:
                self.under_way[:] = [each for each in self.under_way if each is not scope]

        async def see(scope: Any, receive: Any, send: Any) -> None:
            async def see_and_send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.see(message["status"])
                elif message["type"] == "http.response.body" and not message.get("more_body", False):
                    self.see("end")
                await send(message)

            await app(scope, receive, see_and_send)

        return watch


class OnWSGI(Elsewhere, WSGIHarness):
    servers_own = b"<title>500 Internal Server Error</title>"

    def watched(self, app: Any) -> Any:
        def watch(environ: Any, start_response: Any) -> Iterator[bytes]:
            def see_and_start(status: str, *more: Any) -> Any:
                self.see(int(status[:3]))
                return start_response(status, *more)

            self.under_way.append(environ)
            try:
                with closing(app(environ, see_and_start)) as body:
                    yield from body
                    self.see("end")
            finally:
                self.under_way[:] = [each for each in self.under_way if each is not environ]

        return watch


@pytest.fixture(scope="module", params=[(name, adapter) for name in ASGI + WSGI for adapter in (False, True)], ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    name, adapter = request.param
    kind: Any = OnASGI if name in ASGI else OnWSGI
    app = kind(name, tmp_path_factory.mktemp(name), adapter=adapter)
    app.start()
    yield app
    app.stop()
    app.engine.dispose()


@pytest.fixture
def app(served: Any) -> Iterator[Any]:
    served.reopen()
    yield served
    served.see("after")
    assert served.seen[-1].held == 0


def handler_calls(caplog: pytest.LogCaptureFixture) -> int:
    """The number of calls of the error handler that the example has registered."""
    return sum(record.name == "example_apps.elsewhere.books" for record in caplog.records)


def test_success_is_durable(app: Any) -> None:
    """The first byte of a success response is sent after COMMIT, when no connection is held."""
    reply = app.transfer()
    assert (reply.status, list(reply.json)) == (201, ["transfer"])
    assert app.seen[0] == Seen(201, MOVED, 0)
    assert app.ask("GET", "/accounts").json == MOVED


def test_failed_commit(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A failed commit leads to an error response, from the framework's error handler only if the adapter is used."""
    reply = app.transfer(target="nobody")
    if app.adapter:
        assert (reply.status, reply.json) == (409, {"error": "the database refused it"})
        assert handler_calls(caplog) == 1
    else:
        assert (reply.status, app.servers_own in reply.body) == (500, True)
        assert handler_calls(caplog) == 0
    assert [seen.what for seen in app.seen if seen.what == 201] == []
    assert app.balances() == OPENED


def test_failed_flush(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An error inside the endpoint reaches the framework's error handler, with and without the adapter."""
    reply = app.transfer(amount=0)
    assert (reply.status, reply.json) == (409, {"error": "the database refused it"})
    assert handler_calls(caplog) == 1
    assert app.balances() == OPENED


def test_returned_error_rolls_back(app: Any) -> None:
    """A returned error response rolls back."""
    reply = app.transfer(amount=101)
    assert (reply.status, reply.json) == (400, {"error": "insufficient funds"})
    assert app.balances() == OPENED


def test_raised_error_rolls_back(app: Any) -> None:
    """A raised error rolls back."""
    assert app.transfer(target=EQUITY).status == 401
    assert app.balances() == OPENED


def test_exception_with_a_success_response(app: Any) -> None:
    """An exception with a success response rolls back with the adapter; the plain middleware commits."""
    reply = app.transfer(dry_run=True)
    assert (reply.status, list(reply.json)) == (200, ["dry_run"])
    rolled_back = app.adapter or app.name == "bottle"  # it passes exc_info to start_response()
    assert app.balances() == (OPENED if rolled_back else MOVED)


def test_stream_is_committed_before_its_last_byte(app: Any) -> None:
    """The connection is released before the body, and the body's work is committed before its last byte."""
    reply = app.ask("POST", "/deposits", {"deposits": [("alice", 1), ("bob", 2)]})
    assert (reply.status, reply.complete, len(reply.body.splitlines())) == (200, True, 2)
    end = {"alice": 101, "bob": 2, EQUITY: -103}
    first_byte, last_byte = app.seen
    assert first_byte.held == 0 and last_byte == Seen("end", end, 0)


def test_stream_whose_commit_fails_is_cut_off(app: Any) -> None:
    """A stream whose commit fails is cut off."""
    reply = app.ask("POST", "/deposits", {"deposits": [("alice", 1), ("nobody", 2)]})
    assert (reply.status, reply.complete) == (200, False)
    if app.name == "bottle":  # it reads the first chunk before it sends the status: that chunk belongs to the request
        assert app.balances() == {"alice": 101, "bob": 0, EQUITY: -101}
    else:
        assert app.balances() == OPENED


def test_one_request_one_session(app: Any) -> None:
    """Concurrent requests use a separate session each."""
    began: list[Session] = []

    def note(session: Session, transaction: Any, connection: Any) -> None:
        began.append(session)

    event.listen(Session, "after_begin", note)
    try:
        with ThreadPoolExecutor(4) as crowd:
            replies = list(crowd.map(lambda _: app.transfer(amount=1), range(8)))
    finally:
        event.remove(Session, "after_begin", note)
    assert [reply.status for reply in replies] == [201] * 8
    assert len({id(session) for session in began}) == len(began) == 8


@pytest.mark.parametrize("served", [("falcon_asgi", True), ("falcon_wsgi", True)], ids=str, indirect=True)
def test_a_response_that_falcon_cannot_render_rolls_back(app: Any) -> None:
    """The Falcon adapter renders the response before it settles, because Falcon renders after its middlewares."""

    class Unrenderable:
        def on_post(self, req: Any, resp: Any) -> None:
            books.book(app.db.session, "alice", "bob", 30)
            resp.media = object()

    class AsyncUnrenderable:
        async def on_post(self, req: Any, resp: Any) -> None:
            await app.db.session.run_sync(books.book, "alice", "bob", 30)
            resp.media = object()

    app.served.app.add_route("/unrenderable", (AsyncUnrenderable if app.name in ASGI else Unrenderable)())
    assert app.ask("POST", "/unrenderable").status == 500
    assert app.balances() == OPENED


def test_the_page_shows_these_adapters() -> None:
    """The page contains the source of the adapters that these tests use."""
    page = Path(__file__).parents[1].joinpath("docs/your-own-adapter.md").read_text()
    adapters = {
        "litestar": "SettleInside",
        "quart": "SettlingQuart",
        "falcon_asgi": "SettleInside",
        "pyramid": "settling_tween_factory",
        "bottle": "settle_inside",
    }
    for name, adapter in adapters.items():
        assert getsource(getattr(import_module(f"example_apps.elsewhere.{name}_app"), adapter)) in page, name


def test_the_examples_start_without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example's create_app() works without arguments, with a database in memory."""
    made: list[Any] = []
    for name in ("database", "async_database"):
        make = getattr(books, name)
        monkeypatch.setattr(books, name, lambda make=make: made.append(make()) or made[-1])
    for name in ASGI + WSGI:
        assert callable(import_module(f"example_apps.elsewhere.{name}_app").create_app())
    assert len(made) == len(ASGI + WSGI)
    for db in made[len(ASGI) :]:  # the async databases have not connected
        db.dispose()
