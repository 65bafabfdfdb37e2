"""The WSGI middleware with plain WSGI apps, including rare cases of PEP 3333."""

from __future__ import annotations

import gc
import io
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from sqlalchemy.exc import IntegrityError

from session_plugin import Database, Outcome, PolicyError, ScopeClosedError, commit_on_success, read_only
from session_plugin.policy import Decision, endpoint_policy
from session_plugin.wsgi import SessionScopeMiddleware
from session_plugin.wsgi.middleware import open_units

from .apps import PlainWSGIHarness
from .contract import Contract, on
from .harness import Parent, Store, add, add_orphan, count, insert, wait_for
from .wsgi_site import POOL, TEXT, Server, Site, module_store, new_environ, store

__all__ = ["module_store", "store"]


@on(PlainWSGIHarness)
class TestContract(Contract):
    """The contract on plain WSGI."""


@pytest.fixture
def site(store: Store) -> Iterator[Site]:
    """A site whose ``app`` the test sets; at the end no connection is held."""
    with Site(store, None, Database(store.url, **POOL)).checked() as site:
        yield site


@pytest.fixture
def db(site: Site) -> Any:
    return site.db


def teardown_commits(app: Any, db: Any) -> Any:
    """The pattern that the middleware replaces: it commits in the iterable's ``close()``."""

    def middleware(environ: Any, start_response: Any) -> Iterator[bytes]:
        with db.session_scope() as session:
            environ["session"] = session
            yield from app(environ, start_response)

    return middleware


# -- the first byte ------------------------------------------------------------------------------


def test_success_is_durable_when_its_status_leaves(db: Any, store: Store) -> None:
    """A success status is sent only after COMMIT; a commit at the iterable's end comes after the whole response."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(environ.get("session") or db.session)
        start_response("201 Created", TEXT)
        return [b"done"]

    assert Server(store).serve(SessionScopeMiddleware(app, db)).sent == [("201 Created", ["tea"]), (b"done", ["tea"])]
    store.clear()
    assert Server(store).serve(teardown_commits(app, db)).sent == [("201 Created", []), (b"done", [])]


def body_kinds() -> list[Any]:
    def generated(start: Callable[[], object]) -> Iterator[bytes]:
        start()
        yield b"a"
        yield b"b"

    class Sequence:
        def __getitem__(self, index: int) -> bytes:
            return [b"a", b"b"][index]

    kinds: list[tuple[str, Callable[[Any], Any]]] = [
        ("list", lambda start: start() and [b"a", b"b"]),
        ("tuple", lambda start: start() and (b"a", b"b")),
        ("iterator", lambda start: start() and iter([b"a", b"b"])),
        ("generator", generated),
        ("sequence", lambda start: start() and Sequence()),
        ("empty chunks", lambda start: start() and [b"", b"a", b"", b"b", b""]),
    ]
    return [pytest.param(make, id=name) for name, make in kinds]


@pytest.mark.parametrize("make_body", body_kinds())
def test_any_iterable_is_a_body(db: Any, store: Store, make_body: Callable[[Any], Any]) -> None:
    """With any kind of iterable as the body, the work is durable before the first byte."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        return make_body(lambda: start_response("201 Created", TEXT))

    server = Server(store).serve(validator(SessionScopeMiddleware(app, db)))
    assert server.sent == [("201 Created", ["tea"]), (b"a", ["tea"]), (b"b", ["tea"])]
    assert server.complete


def test_the_validator_accepts_the_middleware_on_both_sides(db: Any, store: Store) -> None:
    """wsgiref's validator accepts the middleware both as a server for the app and as an app for the server."""

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("201 Created", TEXT)
        write(b"a")
        insert("tea")(db.session)
        return iter([b"b"])

    wrapped = validator(SessionScopeMiddleware(validator(SessionScopeMiddleware(validator(app), db)), db))
    server = Server(store).serve(wrapped)
    assert (server.error, server.complete, store.names()) == (None, True, ["tea"])


def test_app_that_is_a_generator(db: Any, store: Store) -> None:
    """An app that is a generator, and so runs in the first ``next()``, commits before its status is sent."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)
        yield b"a"
        insert("late")(db.session)
        yield b"b"

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert server.sent == [("201 Created", ["tea"]), (b"a", ["tea"]), (b"b", ["tea"])]
    assert store.names() == ["late", "tea"]


def test_error_before_start_response(db: Any, store: Store) -> None:
    """An app that raises before `start_response()` writes nothing."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        raise RuntimeError("boom")

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.status, str(server.error), store.names()) == (500, "boom", [])


def test_error_after_start_response(db: Any, store: Store) -> None:
    """If the app raises after `start_response()`, that status is not sent and nothing is written."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)
        raise RuntimeError("boom")

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.status, server.started, store.names()) == (500, None, [])


@pytest.mark.parametrize("body", [[], [b"a"]])
def test_start_response_never_called(db: Any, store: Store, body: list[bytes]) -> None:
    """If the app never calls `start_response()`, the server sends a 500 and nothing is written."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        return body

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.status, store.names()) == (500, [])
    assert "before it called start_response" in str(server.error)


def test_start_response_twice_without_exc_info(db: Any, store: Store) -> None:
    """A second `start_response()` without exc_info is a bug of the app: it raises an error and nothing is written."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)
        start_response("200 OK", TEXT)
        return [b"a"]

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.status, store.names()) == (500, [])
    assert "second time" in str(server.error)


def catching(start_response: Any, status: str) -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        start_response(status, TEXT, sys.exc_info())


@pytest.mark.parametrize("status", ["500 Oops", "200 OK"])
def test_start_response_again_before_settling(db: Any, store: Store, status: str) -> None:
    """If the app handles an exception with `start_response(…, exc_info)`, that status is sent and nothing written."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)
        catching(start_response, status)
        return [b"sorry"]

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert server.sent == [(status, []), (b"sorry", [])]


def test_start_response_again_after_settling(db: Any, store: Store) -> None:
    """A committed success cannot be replaced by an error: the client receives a truncated success."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)

        def body() -> Any:
            catching(start_response, "500 Oops")
            yield b"sorry"

        return body()

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, server.complete) == ([("201 Created", ["tea"])], False)
    assert str(server.error) == "boom"


def test_start_response_again_after_settling_nothing(db: Any, store: Store) -> None:
    """If nothing was saved, an error status may still replace a success."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", TEXT)

        def body() -> Any:
            insert("late")(db.session)
            catching(start_response, "500 Oops")
            yield b"sorry"

        return body()

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, server.complete) == ([("500 Oops", []), (b"sorry", [])], True)
    assert store.names() == []


def test_start_response_again_after_the_first_byte(db: Any, store: Store) -> None:
    """Once a byte was sent, `start_response()` with exc_info raises the exception, as servers do."""
    reached: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        yield b"a"
        catching(start_response, "500 Oops")
        reached.append("the line after start_response()")

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, str(server.error), reached) == ([("200 OK", []), (b"a", [])], "boom", [])


def test_error_after_settling_and_before_the_first_byte(site: Site) -> None:
    """A client never receives an error for work that is durable; it receives a truncated success.

    Without the middleware the server sends its own 500 for a body that fails at once.
    """
    db = site.db

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/write":
            insert("tea")(db.session)
        start_response("201 Created", TEXT)

        def body() -> Any:
            raise RuntimeError("boom")
            yield b""

        return body()

    site.app = app
    assert site.ask("/write").status == 500
    site.app = site._server.app = SessionScopeMiddleware(app, db)
    reply = site.ask("/write")
    assert (reply.status, reply.complete, site.store.names()) == (201, False, ["tea"])
    assert site.ask("/read").status == 500


class Writeless(Server):
    """A server whose ``start_response`` returns None, as Granian's does."""

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        super().start_response(status, headers, exc_info)


def test_a_server_without_write(db: Any, store: Store) -> None:
    """A server without `write()` gets one `start_response()`; late work stays one transaction until the body ends."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)

        def body() -> Any:
            insert("late")(db.session)
            yield b"a"
            yield b"b"

        return body()

    server = Writeless(store).serve(SessionScopeMiddleware(app, db))
    assert server.sent == [("201 Created", ["tea"]), (b"a", ["tea"]), (b"b", ["tea"])]
    assert (server.complete, store.names()) == (True, ["late", "tea"])


def test_a_body_that_fails_at_once_on_a_server_without_write(db: Any, store: Store) -> None:
    """On a server without `write()`, a body that fails at once raises the app's own error."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)

        def body() -> Any:
            raise RuntimeError("boom")
            yield b""

        return body()

    assert str(Writeless(store).serve(SessionScopeMiddleware(app, db)).error) == "boom"


def test_write_on_a_server_without_write(db: Any, store: Store) -> None:
    """An app that uses `write()` on a server without it gets an error that says so."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("201 Created", TEXT)(b"a")
        return []

    server = Writeless(store).serve(SessionScopeMiddleware(app, db))
    assert "has no write()" in str(server.error)


def test_exc_info_is_not_kept(db: Any, store: Store) -> None:
    """The frames of exc_info's traceback are freed with the request, without the garbage collector."""

    class Local:
        pass

    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        local = Local()
        seen.append(weakref.ref(local))
        try:
            raise ValueError("boom")
        except ValueError:
            start_response("400 Bad", TEXT, sys.exc_info())
        return [b"a"]

    gc.disable()
    try:
        body: Any = SessionScopeMiddleware(app, db)(new_environ(), lambda *_: None)
        assert next(iter(body)) == b"a"
        assert seen[0]() is None
    finally:
        gc.enable()


def test_error_after_an_empty_chunk(db: Any, store: Store) -> None:
    """An error after an empty chunk truncates the committed success; the server must not send an error instead."""

    def stream() -> Any:
        yield b""
        raise RuntimeError("boom")

    app = responding(stream(), "201 Created", work=lambda: insert("tea")(db.session))
    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, server.complete) == ([("201 Created", ["tea"])], False)


# -- write() -------------------------------------------------------------------------------------


def test_write_settles_first(db: Any, store: Store) -> None:
    """The first `write()` settles the unit of work before the byte is sent."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        write = start_response("201 Created", TEXT)
        write(b"a")
        insert("late")(db.session)
        return []

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, server.complete) == ([("201 Created", ["tea"]), (b"a", ["tea"])], True)
    assert store.names() == ["late", "tea"]


def test_write_of_the_last_byte_settles_late_work(db: Any, store: Store) -> None:
    """Content-Length shows which `write()` is the last; the work before it is durable when it is sent."""

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("201 Created", [*TEXT, ("Content-Length", "2")])
        write(b"a")
        insert("late")(db.session)
        write(b"b")
        return []

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert server.sent == [("201 Created", []), (b"a", []), (b"b", ["late"])]


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_a_hook_that_reads_with_its_requests_session_keeps_the_success(db: Any, store: Store, end: str) -> None:
    """If the body fails after the commit, the success is sent and truncated, even if a hook used the session since."""

    def app(environ: Any, start_response: Any) -> Any:
        session = db.session
        insert("tea")(session)
        db.on_commit(lambda: (count(session), getattr(session, end)()))
        start_response("201 Created", TEXT)
        return failing()

    def failing() -> Iterator[bytes]:
        raise RuntimeError("boom")
        yield b""

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, server.complete) == ([("201 Created", ["tea"])], False)


def test_a_swallowed_commit_error_is_raised_again(site: Site) -> None:
    """If the app swallows the commit error that `write()` raised, its success is still not sent."""
    db = site.db

    def app(environ: Any, start_response: Any) -> Any:
        add_orphan(db.session)
        write = start_response("201 Created", TEXT)
        with pytest.raises(IntegrityError):
            write(b"a")
        with pytest.raises(IntegrityError):
            write(b"a")
        return [b"b"]

    site.app = SessionScopeMiddleware(app, db)
    assert (site.ask("/").status, site.store.names()) == (500, [])
    assert Server(site.store).serve(site.app).started is None


def test_a_swallowed_commit_error_of_the_last_byte_is_raised_again(db: Any, store: Store) -> None:
    """If late work cannot be committed, the client never receives the last byte, even if the app swallows the error."""

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("201 Created", [*TEXT, ("Content-Length", "2")])
        write(b"a")
        add_orphan(db.session)
        for _ in range(2):
            with pytest.raises(IntegrityError):
                write(b"b")
        return []

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.sent, server.complete) == ([("201 Created", []), (b"a", [])], False)
    assert isinstance(server.error, IntegrityError)


def test_work_after_the_last_announced_byte_is_background_work(db: Any, store: Store) -> None:
    """Work after the last announced byte has an outcome with ``background=True``, because the response is complete."""
    seen: list[Any] = []

    def decide(outcome: Outcome) -> Decision:
        seen.append((outcome.status, outcome.background))
        return Decision(True, "fine")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "1")])
        yield b"a"
        db.use(decide)
        insert("late")(db.session)

    Server(store).serve(SessionScopeMiddleware(app, db))
    assert (seen, store.names()) == ([(None, True)], ["late"])


def test_a_commit_error_handled_by_the_app(site: Site) -> None:
    """An app may handle the error that `write()` raised, by `start_response()` with exc_info as in PEP 3333."""
    db = site.db

    def app(environ: Any, start_response: Any) -> Any:
        add_orphan(db.session)
        write = start_response("201 Created", TEXT)
        try:
            write(b"a")
        except IntegrityError:
            start_response("409 Conflict", TEXT, sys.exc_info())
        return [f"{count(db.session)} rows".encode()]

    site.app = SessionScopeMiddleware(app, db)
    reply = site.ask("/")
    assert (reply.status, reply.body, site.store.names()) == (409, b"0 rows", [])


# -- the last byte -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["2", "many"])
def test_late_work_is_durable_before_the_last_byte(db: Any, store: Store, length: str) -> None:
    """Late work is durable before the chunk that completes Content-Length, or else before the body ends."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("content-length", length)])
        yield b"a"
        insert("late")(db.session)
        yield b"b"

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert server.sent[-1] == (b"b", ["late"] if length == "2" else [])
    assert store.names() == ["late"]


def test_failing_late_commit_cuts_a_response_with_a_length(site: Site) -> None:
    """If late work cannot be committed, the last byte of a response with a Content-Length is not sent."""
    db = site.db

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "2")])
        yield b"a"
        add_orphan(db.session)
        yield b"b"

    site.app = SessionScopeMiddleware(app, db)
    reply = site.ask("/")
    assert (reply.status, reply.body, reply.complete) == (200, b"a", False)
    assert site.store.names() == []


@pytest.mark.parametrize("status", ["201 Created", "400 Bad Request"])
def test_a_body_without_bytes_settles_at_its_end(db: Any, store: Store, status: str) -> None:
    """A body without bytes is settled when it ends, because no server sends the status before that."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, [*TEXT, ("Content-Length", "0")])

        def body() -> Iterator[bytes]:
            insert("late")(db.session)
            yield b""

        return body()

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    saved = ["late"] if status == "201 Created" else []
    assert (server.sent, store.names()) == ([(status, saved)], saved)


@pytest.mark.parametrize("chunks", [[], [b""]])
def test_failing_late_commit_of_a_body_without_bytes_is_an_error(site: Site, chunks: list[bytes]) -> None:
    """If late work of a body without bytes cannot be committed, the client gets an error, as no status was sent yet."""
    db = site.db

    def app(environ: Any, start_response: Any) -> Any:
        start_response("201 Created", [*TEXT, ("Content-Length", "0")])

        def body() -> Iterator[bytes]:
            add_orphan(db.session)
            yield from chunks

        return body()

    site.app = SessionScopeMiddleware(app, db)
    assert (site.ask("/").status, site.store.names()) == (500, [])


def test_a_replaced_content_length_is_ignored(db: Any, store: Store) -> None:
    """A response that replaces another one has its own Content-Length; the first one is ignored."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "1")])
        count(db.session)
        yield b""
        count(db.session)
        yield b""
        try:
            raise RuntimeError("boom")
        except RuntimeError:
            start_response("500 Internal Server Error", [*TEXT, ("Content-Length", "2")], sys.exc_info())
        yield b"a"
        insert("lost")(db.session)
        yield b"b"

    server = Server(store).serve(SessionScopeMiddleware(app, db))
    assert (server.status, server.complete, store.names()) == (500, True, [])


def test_work_after_the_last_byte_is_a_separate_transaction(db: Any, store: Store) -> None:
    """Work of a generator after the last announced byte is background work: it is saved unless it raises."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "1")])
        yield b"a"
        insert(environ["PATH_INFO"])(db.session)
        if environ["PATH_INFO"] == "/bad":
            raise RuntimeError("boom")

    for path in ("/good", "/bad"):
        Server(store).serve(SessionScopeMiddleware(app, db), path=path)
    assert store.names() == ["/good"]


def test_head(db: Any, store: Store) -> None:
    """The work of a HEAD request, which has no body, is durable before its status is sent."""

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("200 OK", [*TEXT, ("Content-Length", "100")])
        return []

    server = Server(store).serve(SessionScopeMiddleware(app, db), method="HEAD")
    assert server.sent == [("200 OK", ["tea"])]


# -- close() -------------------------------------------------------------------------------------


class Body:
    """Chunks whose ``close()`` works with the session."""

    def __init__(self, close: Callable[[], object], chunks: tuple[bytes, ...] = (b"a", b"b")) -> None:
        self.chunks = iter(chunks)
        self._close = close

    def __iter__(self) -> Any:
        return self.chunks

    def close(self) -> None:
        self._close()


def responding(body: Any, status: str = "200 OK", work: Callable[[], object] = lambda: None) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        work()
        start_response(status, TEXT)
        return body

    return app


def test_close_commits_its_own_work(db: Any, store: Store) -> None:
    """The body's `close()` works in a separate transaction, which is committed if it does not raise."""
    server = Server(store).serve(SessionScopeMiddleware(responding(Body(lambda: insert("late")(db.session))), db))
    assert (server.complete, store.names()) == (True, ["late"])


def test_close_that_raises_saves_nothing(db: Any, store: Store) -> None:
    """If `close()` raises, its work is rolled back, the server gets the error, and the session is closed."""
    kept: list[Any] = []

    def close() -> None:
        kept.append(db.session)
        insert("late")(db.session)
        raise RuntimeError("boom")

    server = Server(store).serve(SessionScopeMiddleware(responding(Body(close)), db))
    assert (str(server.error), store.names()) == ("boom", [])
    with pytest.raises(ScopeClosedError):
        count(kept[0])


def test_never_iterated_body_keeps_what_was_settled(db: Any, store: Store) -> None:
    """A body that the server never reads does not undo the commit, which came before the status was sent."""
    app = SessionScopeMiddleware(responding(iter([b"a"]), work=lambda: insert("tea")(db.session)), db)
    server = Server(store)
    body: Any = app(new_environ(), server.start_response)
    assert store.names() == ["tea"]
    body.close()
    assert store.names() == ["tea"]


def test_interrupted_body_keeps_nothing_of_its_work(db: Any, store: Store) -> None:
    """If a body is closed early, neither the generator's work nor that of its ``finally`` block is saved."""

    def stream() -> Any:
        try:
            insert("half")(db.session)
            yield b"a"
            yield b"b"
        finally:
            insert("rest")(db.session)

    app = SessionScopeMiddleware(responding(stream(), work=lambda: insert("tea")(db.session)), db)
    body: Any = app(new_environ(), Server(store).start_response)
    assert next(body) == b"a"
    body.close()
    assert store.names() == ["tea"]


def test_failed_body_keeps_nothing_of_what_its_close_does(db: Any, store: Store) -> None:
    """After an error in the stream the work of the body's `close()` is discarded too."""

    class Failing(Body):
        def __iter__(self) -> Any:
            yield b"a"
            raise RuntimeError("boom")

    body = Failing(lambda: insert("late")(db.session))
    app = SessionScopeMiddleware(responding(body, work=lambda: insert("tea")(db.session)), db)
    server = Server(store).serve(app)
    assert (str(server.error), server.complete, store.names()) == ("boom", False, ["tea"])


def test_body_is_closed_although_settling_fails(db: Any, store: Store) -> None:
    """If settling fails in `close()`, the app's body and the session are closed all the same."""
    closed: list[Any] = []

    def decide(outcome: Outcome) -> Decision:
        if outcome.interrupted:
            raise RuntimeError("no idea")
        return Decision(True, "fine")

    def stream() -> Any:
        db.use(decide)
        try:
            insert("half")(db.session)
            yield b"a"
        finally:
            closed.append(db.session)

    body: Any = SessionScopeMiddleware(responding(stream()), db)(new_environ(), Server(store).start_response)
    next(body)
    with pytest.raises(PolicyError):
        body.close()
    assert store.names() == []
    with pytest.raises(ScopeClosedError):
        count(closed[0])


def test_failure_of_the_app_outlives_a_failing_close(db: Any, store: Store) -> None:
    """If `close()` fails too, the app's error is chained to the new one, and the session is closed."""
    kept: list[Any] = []

    class Unreadable(Body):
        def __iter__(self) -> Any:
            kept.append(db.session)
            raise RuntimeError("boom")

    def close() -> None:
        raise ValueError("close")

    server = Server(store).serve(SessionScopeMiddleware(responding(Unreadable(close)), db))
    assert (str(server.error), str(server.error.__context__)) == ("close", "boom")  # type: ignore[union-attr]
    with pytest.raises(ScopeClosedError):
        count(kept[0])


def test_close_in_another_thread(db: Any, store: Store) -> None:
    """If a body is closed in another thread, neither thread stays inside the unit of work."""
    app = SessionScopeMiddleware(responding(Body(lambda: insert("late")(db.session))), db)
    body: Any = app(new_environ(), Server(store).start_response)
    assert list(body) == [b"a", b"b"]
    inside: list[bool] = []

    def close() -> None:
        body.close()
        inside.append(hasattr(db, "session"))

    thread = threading.Thread(target=close)
    thread.start()
    thread.join(5)
    assert (inside, hasattr(db, "session"), store.names()) == ([False], False, ["late"])


def test_each_chunk_in_another_thread(db: Any, store: Store) -> None:
    """If each chunk is read in another thread, all of them use the same session."""
    sessions: set[Any] = set()

    def stream() -> Any:
        for name in ("a", "b", "c"):
            sessions.add(db.session)
            insert(name)(db.session)
            yield name.encode()

    body: Any = SessionScopeMiddleware(responding(stream()), db)(new_environ(), Server(store).start_response)
    chunks: list[bytes] = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: chunks.append(next(body, b"end")))
        thread.start()
        thread.join(5)
    body.close()
    assert (chunks, store.names(), len(sessions)) == ([b"a", b"b", b"c", b"end"], ["a", "b", "c"], 1)


def test_abandoned_body_collected_in_another_thread(db: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is never closed warns, returns its connection, and leaves no thread inside the unit of work."""
    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))

    def stream() -> Any:
        insert("half")(db.session)
        yield b"a"

    bodies: list[Any] = [
        SessionScopeMiddleware(responding(stream()), db)(new_environ(), Server(site.store).start_response)
    ]
    assert next(bodies[0]) == b"a"
    assert db.engine.pool.checkedout() == 1

    def collect() -> None:
        bodies.clear()
        gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    thread.join(5)
    assert wait_for(lambda: db.engine.pool.checkedout() == 0)
    assert any("POST / was never closed" in message for message in seen)
    assert not hasattr(db, "session")
    app = SessionScopeMiddleware(responding([b"a"], work=lambda: insert("next")(db.session)), db)
    assert Server(site.store).serve(app).complete
    assert site.store.names() == ["next"]


# -- wsgi.file_wrapper -----------------------------------------------------------------------------


def test_file_wrapper_reaches_the_server(db: Any, store: Store) -> None:
    """The server receives the file wrapper itself, as sendfile(2) needs it; the unit of work has ended before."""
    kept: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        kept.append(db.session)
        insert("tea")(db.session)
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](io.BytesIO(b"file"))

    environ = new_environ(**{"wsgi.file_wrapper": FileWrapper})
    server = Server(store)
    body = SessionScopeMiddleware(app, db)(environ, server.start_response)
    assert type(body) is FileWrapper
    assert (server.started, store.names()) == (("200 OK", TEXT), ["tea"])
    with pytest.raises(ScopeClosedError):
        count(kept[0])


@pytest.mark.parametrize("orphan", [False, True])
def test_file_wrapper_of_a_failed_commit_is_closed(site: Site, orphan: bool) -> None:
    """If the commit fails, the file is not sent, and is closed."""
    files: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        (add_orphan if orphan else insert("tea"))(site.db.session)
        start_response("200 OK", TEXT)
        files.append(FileWrapper(io.BytesIO(b"file")))
        return files[0]

    wrapped = SessionScopeMiddleware(app, site.db)
    server = Server(site.store).serve(wrapped, **{"wsgi.file_wrapper": FileWrapper})
    assert (server.status, server.complete) == ((500, False) if orphan else (200, True))
    assert files[0].filelike.closed
    assert site.store.names() == ([] if orphan else ["tea"])


# -- several middlewares -----------------------------------------------------------------------------


def test_two_middlewares_for_one_database_are_one(db: Any, store: Store) -> None:
    """Of two middlewares for one database the outer one opens the unit of work, and the inner one does nothing."""
    sessions: set[Any] = set()

    def app(environ: Any, start_response: Any) -> Any:
        sessions.add(db.session)
        insert("tea")(db.session)
        start_response("201 Created", TEXT)
        return [b"a"]

    def between(environ: Any, start_response: Any) -> Any:
        sessions.add(db.session)
        return SessionScopeMiddleware(app, db)(environ, start_response)

    assert Server(store).serve(SessionScopeMiddleware(between, db)).sent[0] == ("201 Created", ["tea"])
    assert len(sessions) == 1


def test_inner_middleware_knows_the_endpoint(db: Any, store: Store) -> None:
    """A policy that only the inner middleware can find applies from the first statement on."""

    @db.policy(read_only)
    def endpoint(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return [f"{count(db.session)}".encode()]

    def authenticate(environ: Any, start_response: Any) -> Any:
        return inner(environ, start_response)

    def queries_first(environ: Any, start_response: Any) -> Any:
        count(db.session)
        return endpoint(environ, start_response)

    inner = SessionScopeMiddleware(queries_first, db, find_policy=lambda: endpoint_policy(endpoint, db))
    server = Server(store).serve(SessionScopeMiddleware(authenticate, db))
    assert (server.error, server.sent[-1]) == (None, (b"0", []))


def test_two_databases(db: Any, store: Store) -> None:
    """Two databases have separate sessions, and both are settled before the first byte."""
    other = Database(store.url, **POOL)

    def app(environ: Any, start_response: Any) -> Any:
        assert db.session is not other.session
        add("one")(db.session)
        if store.backend == "postgresql":
            add("two")(other.session)
        start_response(environ["PATH_INFO"][1:] + " Status", TEXT)
        return [b"a"]

    wrapped = validator(SessionScopeMiddleware(validator(SessionScopeMiddleware(app, other)), db))
    both = ["one", "two"] if store.backend == "postgresql" else ["one"]
    assert Server(store).serve(wrapped, path="/400").sent[0] == ("400 Status", [])
    assert Server(store).serve(wrapped, path="/201").sent[0] == ("201 Status", both)
    assert other.engine.pool.checkedout() == 0
    other.dispose()


def test_environ_used_again(db: Any, store: Store) -> None:
    """An outer middleware that retries with the same environ gets a new unit of work."""
    sessions: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        sessions.append(db.session)
        insert(f"try {len(sessions)}")(db.session)
        if len(sessions) == 1:
            raise ConnectionError
        start_response("201 Created", TEXT)
        return [b"a"]

    def retrying(environ: Any, start_response: Any) -> Any:
        try:
            return wrapped(environ, start_response)
        except ConnectionError:
            return wrapped(environ, start_response)

    wrapped = SessionScopeMiddleware(app, db)
    assert Server(store).serve(retrying).complete
    assert (store.names(), sessions[0] is sessions[1]) == (["try 2"], False)


def test_an_environ_that_outlives_its_request_has_no_scopes(db: Any, store: Store) -> None:
    """After the request its environ lists no units of work, whether they are still referenced or not."""
    kept: list[Any] = []
    environ = new_environ()
    app = SessionScopeMiddleware(responding(iter([b"a"]), work=lambda: kept.append(db._unit_of_work())), db)
    body: Any = app(environ, Server(store).start_response)
    assert open_units(environ) == kept
    body.close()
    assert open_units(environ) == []
    kept.clear()
    del body
    assert open_units(environ) == []


# -- threads, and the rest ---------------------------------------------------------------------------


def test_nothing_leaks_to_the_next_request_of_the_thread(db: Any, store: Store) -> None:
    """However a request ends, its thread is in no unit of work afterwards."""

    def fails(environ: Any, start_response: Any) -> Any:
        raise RuntimeError

    def stream_fails() -> Any:
        yield b"a"
        raise RuntimeError

    def scope_left_open(name: str = "own") -> Any:
        with db.session_scope() as session:
            insert(name)(session)
            yield b"a"

    for app in (fails, responding(stream_fails()), responding([b"a"]), responding(scope_left_open())):
        Server(store).serve(SessionScopeMiddleware(app, db))
        assert not hasattr(db, "session")
    assert store.names() == ["own"]
    body: Any = SessionScopeMiddleware(responding(scope_left_open("interrupted")), db)(
        new_environ(), Server(store).start_response
    )
    next(body)
    assert not hasattr(db, "session")
    body.close()
    assert store.names() == ["own"]


def test_requests_that_take_turns_in_one_thread(db: Any, store: Store) -> None:
    """Bodies of several requests that are read alternately in one thread each keep their own session."""

    def stream(name: str) -> Any:
        session = db.session
        for number in range(3):
            assert db.session is session
            insert(f"{name}{number}")(session) if store.backend == "postgresql" else None
            yield b"a"

    apps = {name: SessionScopeMiddleware(responding(stream(name)), db) for name in "abc"}
    bodies: list[Any] = [app(new_environ("GET"), Server(store).start_response) for app in apps.values()]
    for _ in range(3):
        for body in bodies:
            next(body)
    for body in reversed(bodies):
        assert list(body) == []
        body.close()
    assert len(store.names()) == (9 if store.backend == "postgresql" else 0)


def test_discarded_work_is_logged(db: Any, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Work that is discarded after an error is logged at INFO, with its request."""
    caplog.set_level(logging.INFO, "session_plugin")
    app = responding([b"a"], "404 Not Found", work=lambda: insert("tea")(db.session))
    Server(store).serve(SessionScopeMiddleware(app, db), path="/tea")
    assert [record.getMessage() for record in caplog.records if record.name == "session_plugin"][-1:] == [
        "POST /tea: ROLLBACK, its work is discarded (status 404)"
    ]


def test_the_outcome_that_a_policy_gets_for_a_failure(db: Any, store: Store) -> None:
    """The outcome of a failed request has the exception, handled or not.

    The outcome of a truncated response has its status and ``interrupted=True``.
    """
    seen: list[Any] = []

    def decide(outcome: Outcome) -> Decision:
        seen.append((outcome.status, repr(outcome.error), outcome.interrupted))
        return Decision(False, "only looks")

    def query() -> None:
        db.use(decide)
        count(db.session)

    def raises(environ: Any, start_response: Any) -> Any:
        query()
        raise ValueError("boom")

    def handles(environ: Any, start_response: Any) -> Any:
        query()
        start_response("201 Created", TEXT)
        catching(start_response, "500 Oops")
        return [b"sorry"]

    def cut_short() -> Any:
        query()
        yield b"a"

    for app in (raises, handles):
        Server(store).serve(SessionScopeMiddleware(app, db))
    body: Any = SessionScopeMiddleware(responding(cut_short()), db)(new_environ(), Server(store).start_response)
    next(body)
    body.close()
    assert seen == [(None, "ValueError('boom')", False), (500, "ValueError('boom')", False), (200, "None", True)]


def test_policy_chosen_in_the_app(db: Any, store: Store) -> None:
    """A policy that the app chooses with `db.use()` applies to the request."""

    def app(environ: Any, start_response: Any) -> Any:
        db.use(lambda outcome: Decision(outcome.method == "PUT", "PUT only"))
        insert(environ["REQUEST_METHOD"])(db.session)
        start_response("200 OK", TEXT)
        return [b"a"]

    for method in ("POST", "PUT"):
        Server(store).serve(SessionScopeMiddleware(app, db), method=method)
    assert store.names() == ["PUT"]
    assert commit_on_success.name == "commit_on_success"


@pytest.mark.parametrize("body", [[b"a", b"b"], (b"a",), []])
def test_whole_body_closes_the_unit_of_work(db: Any, site: Site, body: Any) -> None:
    """A body that is a list or a tuple is sent by the server alone, and many test clients never close a response."""
    sessions: list[Any] = []
    loaded: list[Any] = []

    def work() -> None:
        sessions.append(db.scope)
        add("tea")(db.session)
        db.session.flush()
        loaded.append(db.session.get(Parent, "tea"))

    app = SessionScopeMiddleware(responding(body, work=work), db)
    assert app(new_environ(), Server(site.store).start_response) == body
    assert (sessions[0].closed, site.store.names()) == (True, ["tea"])
    with db.session_scope() as session:
        session.delete(loaded[0])


def test_work_after_write_is_settled_before_a_whole_body_ends(db: Any, site: Site) -> None:
    """Work that an app does between its ``write()`` and its body, a list, is committed before the last byte."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", TEXT)(b"a")
        insert("late")(db.session)
        return [b"b"]

    served = Server(site.store).serve(SessionScopeMiddleware(app, db))
    assert (served.complete, site.store.names()) == (True, ["late"])
