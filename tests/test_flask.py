"""The Flask integration, used as in real apps."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from weakref import ref
from wsgiref.validate import validator

import click
import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    copy_current_request_context,
    flash,
    g,
    get_flashed_messages,
    redirect,
    render_template_string,
    request,
    request_finished,
    send_file,
    session,
    stream_with_context,
)
from flask.views import MethodView, View
from sqlalchemy import MetaData, delete, event, make_url, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import ObjectDeletedError
from werkzeug.debug import DebuggedApplication
from werkzeug.exceptions import Conflict, Forbidden, HTTPException, InternalServerError
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import RequestRedirect
from werkzeug.wsgi import ClosingIterator

from session_plugin import (
    ConfigurationError,
    Database,
    Decision,
    NoScopeError,
    PolicyError,
    ReadOnlyError,
    ScopeClosedError,
    commit_on_success,
    manual,
    read_only,
)
from session_plugin.engines.backends import SQLite
from session_plugin.flask import SessionPlugin
from session_plugin.wsgi import SessionScopeMiddleware

from .apps import FlaskHarness
from .contract import Contract, on
from .harness import POOL, Base, Child, Parent, Store, add, add_orphan, count, insert
from .wsgi_site import TEXT, Server, Site, module_store, new_environ, store

__all__ = ["module_store", "store"]

FAILING: dict[str, Callable[[Session], None]] = {"flush": lambda session: twice(session), "commit": add_orphan}


@on(FlaskHarness)
class TestContract(Contract):
    """The promises of the contract."""


def twice(session: Session) -> None:
    insert("lost")(session)
    session.connection().execute(Parent.__table__.insert(), {"name": "lost"})


def flask_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = "secret"
    app.config.update(config)
    app.logger.disabled = True
    return app


@pytest.fixture
def site(store: Store) -> Iterator[Site]:
    """A Flask app with a plugin on each database; fails if a connection or a transaction is left open at the end."""
    app = flask_app()
    db = SessionPlugin(store.url, metadata=Base.metadata, **POOL)
    db.init_app(app)
    with Site(store, app, db).checked() as site:
        yield site


@pytest.fixture
def app(site: Site) -> Any:
    return site.app


@pytest.fixture
def db(site: Site) -> Any:
    return site.db


# -- why the commit is not in a teardown function --------------------------------------------------


def test_teardown_commit_sends_success_for_a_failed_commit(store: Store) -> None:
    """A commit in a teardown function sends a 201 for a failed commit, so the tests below can fail."""
    app = flask_app()
    database = Database(store.url, **POOL)

    @app.before_request
    def begin() -> None:
        g.session = database.sessionmaker()

    @app.teardown_request
    def end(error: BaseException | None) -> None:
        with closing(g.session):
            if error is None:
                g.session.commit()

    @app.post("/orphan")
    def orphan() -> Any:
        g.session.add(Child(name="x" * 3, parent="nobody"))
        g.session.connection().execute(Parent.__table__.insert(), {"name": "tea"})
        g.session.add(Parent(name="tea"))
        return {}, 201

    @app.post("/handled")
    def handled() -> Any:
        insert("handled")(g.session)
        abort(409)

    started: list[str] = []
    with pytest.raises(IntegrityError):
        app(new_environ(path="/orphan"), lambda status, headers: started.append(status))
    assert (started, store.names()) == (["201 CREATED"], [])
    assert app.test_client().post("/handled").status_code == 409
    assert store.names() == ["handled"]
    database.dispose()


# -- one session for each request ------------------------------------------------------------------


def test_all_parts_of_a_request_share_one_session(site: Site, app: Any, db: Any) -> None:
    """Request functions, views, nested app contexts, templates, signals and streams share one session."""
    seen: dict[str, Any] = {}
    keep = lambda place: seen.update({place: db.session})  # noqa: E731
    blueprint = Blueprint("b", __name__)
    app.before_request(lambda: keep("before_request"))
    blueprint.before_request(lambda: keep("blueprint"))
    app.after_request(lambda response: keep("after_request") or response)
    app.teardown_request(lambda error: keep("teardown_request"))
    app.teardown_appcontext(lambda error: keep("teardown_appcontext"))
    app.context_processor(lambda: keep("context_processor") or {"note": keep})

    def finished(sender: Any, response: Any, **_: Any) -> None:
        keep("signal")

    request_finished.connect(finished, app)

    @blueprint.post("/one")
    def one() -> Any:
        keep("view")
        with app.app_context():
            keep("nested app context")
        with db.session_scope():
            keep("session_scope")
        keep("scoped_session") if db.scoped_session() is db.session else None
        render_template_string("{{ note('template') or '' }}")

        def stream() -> Any:
            yield b"a"
            keep("stream")

        return app.response_class(stream_with_context(stream()))

    app.register_blueprint(blueprint)
    assert site.ask("/one").complete
    assert set(seen) == {
        *("before_request", "blueprint", "after_request", "teardown_request", "teardown_appcontext"),
        *("context_processor", "signal", "view", "nested app context", "session_scope", "scoped_session"),
        *("template", "stream"),
    }
    assert len(set(map(id, seen.values()))) == 1


class Names(MethodView):
    def __init__(self, db: Any) -> None:
        self.db = db

    def get(self) -> Any:
        return {"rows": count(self.db.session)}

    def post(self) -> Any:
        insert("method view")(self.db.session)
        return {}, 201


class Put(View):
    methods = ("POST",)

    def __init__(self, db: Any) -> None:
        self.db = db

    def dispatch_request(self) -> Any:
        insert("view class")(self.db.session)
        return {}, 201


def test_views_of_every_kind(site: Site, app: Any, db: Any) -> None:
    """Functions, coroutines, classes and method views commit on success and roll back on an error."""
    app.add_url_rule("/class", view_func=Put.as_view("class", db))
    app.add_url_rule("/method", view_func=Names.as_view("method", db))

    @app.post("/async")
    async def coroutine() -> Any:
        insert("coroutine")(db.session)
        return {}, 201

    @app.post("/async-fails")
    async def coroutine_fails() -> Any:
        insert("lost")(db.session)
        raise Forbidden

    assert [site.ask(path).status for path in ("/class", "/method", "/async", "/async-fails")] == [201, 201, 201, 403]
    assert site.store.names() == ["coroutine", "method view", "view class"]


@pytest.mark.parametrize("when", ["before init_app", "after init_app"])
def test_after_request_writes_are_in_the_transaction(store: Store, when: str) -> None:
    """What an after_request function writes is part of the transaction, in either order of registration."""
    app, db = flask_app(), SessionPlugin(store.url, **POOL)

    def audit(response: Any) -> Any:
        insert(f"audit {response.status_code}")(db.session)
        return response

    if when == "before init_app":
        app.after_request(audit)
    db.init_app(app)
    if when == "after init_app":
        app.after_request(audit)
    app.add_url_rule("/<int:status>", "view", lambda status: ({}, status), methods=["POST"])
    with Site(store, app, db).checked() as site:
        assert [site.ask("/201").status, site.ask("/400").status] == [201, 400]
    assert store.names() == ["audit 201"]


def test_response_of_before_request_commits(site: Site, app: Any, db: Any) -> None:
    """A response from a before_request function commits, although no view is called."""

    @app.before_request
    def handle() -> Any:
        insert("before")(db.session)
        return {}, 201

    assert (site.ask("/").status, site.store.names()) == (201, ["before"])


def test_objects_of_a_request_are_readable_after_it(site: Site, app: Any, db: Any) -> None:
    """A test can read the objects that a request loaded after the request has ended."""
    loaded: list[Any] = []

    @app.post("/")
    def view() -> Any:
        insert("tea")(db.session)
        g.user = db.session.get(Parent, "tea")
        loaded.append(g.user)
        return {}

    with app.test_client() as client:
        client.post("/")
        assert g.user.name == "tea"
    assert loaded[0].name == "tea"


def test_thread_of_a_request_does_not_share_its_session(site: Site, app: Any, db: Any) -> None:
    """A copied request context brings Flask's request to a thread, but not the session."""
    seen: list[Any] = []

    @app.post("/")
    def view() -> Any:
        @copy_current_request_context
        def work() -> None:
            seen.append(db.session is own)
            with db.session_scope() as scoped:
                seen.append(scoped is own)

        own = db.session
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(5)
        return {}

    assert (site.ask("/").status, seen) == (200, [False, False])


# -- failed commits -----------------------------------------------------------------------------------


@pytest.fixture
def failing(app: Any, db: Any) -> Any:
    """Routes /flush and /commit that fail at that point, with a session cookie, ``g`` and an after_request function."""

    @app.before_request
    def load() -> None:
        g.user = "ada"

    @app.post("/<where>")
    def view(where: str) -> Any:
        session["visits"] = session.get("visits", 0) + 1
        flash("kept")
        FAILING[where](db.session)
        return {}, 201

    @app.after_request
    def header(response: Any) -> Any:
        response.headers["X-User"] = g.user
        return response


HANDLED = [IntegrityError, SQLAlchemyError, Exception, 500, InternalServerError]


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("where", FAILING)
@pytest.mark.parametrize("handled", HANDLED, ids=str)
def test_failed_commit_calls_the_error_handler(site: Site, app: Any, db: Any, handled: Any, where: str) -> None:
    """A failed commit calls the same error handler as a failed flush; cookie, ``g`` and headers are intact."""

    @app.errorhandler(handled)
    def handle(error: Any) -> Any:
        original = getattr(error, "original_exception", error)
        messages = get_flashed_messages()
        return {"error": type(original).__name__, "rows": count(db.session), "user": g.user, "flashed": messages}, 409

    reply = site.ask(f"/{where}")
    assert (reply.status, reply.headers["X-User"]) == (409, "ada")
    assert app.json.loads(reply.body) == {"error": "IntegrityError", "rows": 0, "user": "ada", "flashed": ["kept"]}
    cookie = reply.cookies["session"].value
    with app.test_request_context("/", headers={"Cookie": f"session={cookie}"}):
        assert session["visits"] == 1
    assert site.store.names() == []


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("where", FAILING)
def test_failed_commit_without_a_handler(site: Site, app: Any, where: str) -> None:
    """A failed commit without an error handler is Flask's own 500, with the headers of after_request functions."""
    reply = site.ask(f"/{where}")
    assert (reply.status, reply.headers["X-User"], site.store.names()) == (500, "ada", [])


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("where", FAILING)
@pytest.mark.parametrize("key", ["TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS"])
def test_failed_commit_propagates_where_errors_do(site: Site, app: Any, where: str, key: str) -> None:
    """A failed commit propagates the original exception if the app propagates exceptions, and nothing is written."""
    app.config[key] = True
    with pytest.raises(IntegrityError):
        app.test_client().post(f"/{where}")
    assert site.store.names() == []


def test_blueprint_handlers_take_precedence(site: Site, app: Any, db: Any) -> None:
    """The error handler of a view's blueprint takes precedence over the app's."""
    blueprint = Blueprint("b", __name__)

    @blueprint.post("/inside")
    def inside() -> Any:
        add_orphan(db.session)
        return {}, 201

    app.add_url_rule("/outside", "outside", inside, methods=["POST"])
    blueprint.register_error_handler(IntegrityError, lambda error: ("blueprint", 409))
    app.register_error_handler(IntegrityError, lambda error: ("app", 409))
    app.register_blueprint(blueprint)
    assert [site.ask("/inside").body, site.ask("/outside").body] == [b"blueprint", b"app"]


def test_failed_commit_calls_an_async_handler(site: Site, app: Any, db: Any) -> None:
    """A coroutine function can be the error handler of a failed commit."""

    @app.post("/")
    def view() -> Any:
        add_orphan(db.session)
        return {}, 201

    @app.errorhandler(IntegrityError)
    async def handle(error: Any) -> Any:
        return {"rows": count(db.session)}, 409

    assert (site.ask("/").status, site.store.names()) == (409, [])


@pytest.mark.parametrize("orphan", [True, False])
def test_error_in_the_handler_of_a_failed_commit(site: Site, app: Any, db: Any, orphan: bool) -> None:
    """An error handler that fails leads to a 500, and neither its work nor the view's is saved."""

    @app.post("/")
    def view() -> Any:
        (add_orphan if orphan else twice)(db.session)
        return {}, 201

    @app.errorhandler(IntegrityError)
    def handle(error: Any) -> Any:
        insert("handler")(db.session)
        raise RuntimeError("boom")

    assert (site.ask("/").status, site.store.names()) == (500, [])


@pytest.mark.parametrize("ends", [add_orphan, twice])
def test_writes_of_error_handlers_are_rolled_back(site: Site, app: Any, db: Any, ends: Any) -> None:
    """What an error handler writes is rolled back, unless it uses a unit of work of its own."""

    @app.post("/")
    def view() -> Any:
        ends(db.session)
        return {}, 201

    @app.errorhandler(IntegrityError)
    def handle(error: Any) -> Any:
        with db.session_scope() as audit:
            insert("audit")(audit)
        insert("lost")(db.session)
        return {}, 200

    assert (site.ask("/").status, site.store.names()) == (200, ["audit"])


def test_redirect_raised_in_a_commit_saves_nothing(site: Site, app: Any, db: Any) -> None:
    """An exception that a listener raises in a commit makes the commit fail, even if it is a redirect response."""

    @app.post("/")
    def view() -> Any:
        insert("lost")(db.session)
        event.listen(db.session, "before_commit", lambda session: abort(redirect("/elsewhere")), once=True)
        return {}, 201

    @app.after_request
    def audit(response: Any) -> Any:
        insert(f"audit {response.status_code}")(db.session)
        return response

    assert (site.ask("/").status, site.store.names()) == (302, [])


def test_mounted_app_without_the_plugin(store: Store) -> None:
    """If a mounted app without the plugin handles a failed commit, what its error handler writes is rolled back."""
    outer, inner = flask_app(), flask_app()
    db = SessionPlugin(Database(store.url, **POOL))
    outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/inner": inner})  # type: ignore[method-assign]
    db.init_app(outer)
    shared = db.database_for(outer)
    inner.add_url_rule("/", "view", lambda: (add_orphan(shared.session) or {}, 201), methods=["POST"])
    inner.register_error_handler(IntegrityError, lambda error: (insert("lost")(shared.session) or "fine", 200))
    with Site(store, outer, shared).checked() as site:
        assert (site.ask("/inner/").body, store.names()) == (b"fine", [])


def test_response_of_a_failed_commit_is_closed(site: Site, app: Any, db: Any) -> None:
    """After a failed commit, the response's call_on_close functions run, but what they write is rolled back."""
    closed: list[str] = []

    @app.post("/")
    def view() -> Any:
        add_orphan(db.session)
        response = app.response_class("fine", 201)

        @response.call_on_close
        def clean_up() -> None:
            closed.append("closed")
            insert("late")(db.session)

        return response

    assert (site.ask("/").status, closed, site.store.names()) == (500, ["closed"], [])


# -- raised, handled, returned -------------------------------------------------------------------------


class Teapot(HTTPException):
    code = 418


class Done(HTTPException):
    code = 202


def raising(error: Exception) -> Callable[[], Any]:
    def view() -> Any:
        raise error

    return view


ENDINGS = {
    "abort(404)": (lambda: abort(404), 404, False),
    "abort(Response 400)": (lambda: abort(Flask.response_class("no", 400)), 400, False),
    "abort(Response 201)": (lambda: abort(Flask.response_class("yes", 201)), 201, True),
    "abort(redirect)": (lambda: abort(redirect("/elsewhere")), 302, True),
    "RequestRedirect": (raising(RequestRedirect("/elsewhere")), 308, True),
    "HTTPException subclass": (raising(Teapot()), 418, False),
    "HTTPException below 400": (raising(Done()), 202, True),
    "error": (raising(RuntimeError("boom")), 500, False),
    "returned 422": (lambda: ({}, 422), 422, False),
    "returned redirect": (lambda: redirect("/elsewhere"), 302, True),
    "returned exception": (lambda: Conflict(), 409, False),
    "nothing returned": (lambda: None, 500, False),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_response_of_a_view_decides(site: Site, app: Any, db: Any, ending: str) -> None:
    """An error rolls back, whether it is raised or returned; a raised response with a status below 400 commits."""
    end, status, saved = ENDINGS[ending]

    @app.post("/")
    def view() -> Any:
        insert("tea")(db.session)
        return end()

    assert (site.ask("/").status, site.store.names()) == (status, ["tea"] if saved else [])


@pytest.mark.parametrize("raised", [RuntimeError("boom"), Forbidden(), Teapot()], ids=repr)
@pytest.mark.parametrize("handled", [Exception, "its class"], ids=str)
def test_handled_as_a_success_rolls_back(site: Site, app: Any, db: Any, raised: Any, handled: Any) -> None:
    """An exception rolls back before its error handler runs, even if the handler returns a 200 response."""

    @app.post("/")
    def view() -> Any:
        insert("tea")(db.session)
        raise raised

    @app.errorhandler(type(raised) if handled == "its class" else handled)
    def handle(error: Any) -> Any:
        return {"rows": count(db.session)}, 200

    reply = site.ask("/")
    assert (reply.status, app.json.loads(reply.body), site.store.names()) == (200, {"rows": 0}, [])


@pytest.mark.parametrize("handled", [False, True])
@pytest.mark.parametrize("where", ["before_request", "after_request", "request_finished", "template", "user loader"])
def test_errors_outside_of_the_view_roll_back(site: Site, app: Any, db: Any, where: str, handled: bool) -> None:
    """An error outside of the view rolls back, whatever status the response has."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        insert(where)(db.session)
        raise RuntimeError("boom")

    if where == "before_request":
        app.before_request(fail)
    elif where == "after_request":
        app.after_request(fail)
    elif where == "request_finished":
        request_finished.connect(fail, app)
    elif where == "user loader":
        app.url_value_preprocessor(fail)
    if handled:
        app.register_error_handler(500, lambda error: ("fine", 200))

    @app.post("/")
    def view() -> Any:
        insert("view")(db.session)
        return render_template_string("{{ fail() }}", fail=fail if where == "template" else str)

    assert (site.ask("/").status, site.store.names()) == (200 if handled else 500, [])


def test_error_in_a_teardown_function_cuts_off_the_response(site: Site, app: Any, db: Any) -> None:
    """If a teardown function fails after a commit, the response is a cut-off success; without a write it is a 500."""

    @app.teardown_request
    def fail(error: Any) -> None:
        raise RuntimeError("boom")

    @app.post("/write")
    def write() -> Any:
        insert("tea")(db.session)
        return {}, 201

    @app.post("/read")
    def read() -> Any:
        return {"rows": count(db.session)}

    reply = site.ask("/write")
    assert (reply.status, reply.complete, site.store.names()) == (201, False, ["tea"])
    assert site.ask("/read").status == 500


@pytest.mark.parametrize("used", [False, True])
def test_session_scope_in_a_teardown_function_commits(site: Site, app: Any, db: Any, used: bool) -> None:
    """In a teardown function, session_scope() opens a unit of work that the status of the response does not affect."""

    @app.teardown_request
    def note(error: Any) -> None:
        with db.session_scope() as own:
            insert("note")(own)

    @app.post("/")
    def refuse() -> Any:
        if used:
            insert("lost")(db.session)
        return {}, 400

    assert (site.ask("/").status, site.store.names()) == (400, ["note"])


def test_handled_error_of_another_app_does_not_roll_back(store: Store) -> None:
    """If two apps share a unit of work in a cascade, the first one's 404 does not roll back the second one's work."""
    shared = Database(store.url, **POOL)
    first, second = flask_app(), flask_app()
    SessionPlugin(shared).init_app(first)
    SessionPlugin(shared).init_app(second)
    second.add_url_rule("/", "view", lambda: (insert("tea")(shared.session) or {}, 201), methods=["POST"])

    def cascade(environ: Any, start_response: Any) -> Any:
        statuses: list[str] = []
        body = first(environ, lambda status, headers, exc_info=None: statuses.append(status))
        body.close()
        return second(environ, start_response) if statuses[0].startswith("404") else body

    with Site(store, SessionScopeMiddleware(cascade, shared), shared).checked() as site:
        assert (site.ask("/").status, store.names()) == (201, ["tea"])


# -- streams -------------------------------------------------------------------------------------------


def test_stream_queries_and_writes(site: Site, app: Any, db: Any) -> None:
    """A generator uses the request's session, and its work is committed before the last byte."""

    @app.post("/")
    def view() -> Any:
        insert("early")(db.session)

        @stream_with_context
        def stream() -> Any:
            yield f"{count(db.session)}"
            insert("late")(db.session)
            yield f"{count(db.session)}"

        return app.response_class(stream())

    assert (site.ask("/").body, site.store.names()) == (b"12", ["early", "late"])


def test_stream_that_fails_before_its_first_byte(site: Site, app: Any, db: Any) -> None:
    """A stream that fails before its first byte is a cut-off success, because the view's work is committed."""

    @app.post("/")
    def view() -> Any:
        insert("early")(db.session)

        def stream() -> Any:
            raise RuntimeError("boom")
            yield ""

        return app.response_class(stream_with_context(stream()), 201)

    reply = site.ask("/")
    assert (reply.status, reply.complete, site.store.names()) == (201, False, ["early"])


def test_stream_abandoned_and_collected_elsewhere(
    site: Site, app: Any, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is abandoned and collected in another thread leaks neither its session nor its connection."""
    recorded: list[str] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: recorded.append(str(unraisable.exc_value)))

    @app.post("/stream")
    def stream() -> Any:
        def chunks() -> Any:
            insert("half")(db.session)
            yield "a"
            yield "b"

        return app.response_class(stream_with_context(chunks()))

    @app.post("/<name>")
    def view(name: str) -> Any:
        insert(name)(db.session)
        return {}, 201

    def abandon() -> None:
        bodies: list[Any] = [app(new_environ(path="/stream"), Server(site.store).start_response)]
        next(bodies[0])
        collector = threading.Thread(target=lambda: (bodies.clear(), gc.collect()))
        collector.start()
        collector.join(5)
        for name in ("one", "two"):
            assert Server(site.store).serve(app, path=f"/{name}").status == 201

    thread = threading.Thread(target=abandon)
    thread.start()
    thread.join(10)
    assert (site.store.names(), db.engine.pool.checkedout()) == (["one", "two"], 0)
    assert any("POST /stream was never closed" in message for message in recorded)


def test_send_file_commits_first(site: Site, app: Any, db: Any) -> None:
    """send_file() commits before the file is sent."""

    @app.post("/")
    def view() -> Any:
        insert("tea")(db.session)
        return send_file(BytesIO(b"file"), "text/plain")

    assert (site.ask("/").body, site.store.names()) == (b"file", ["tea"])


# -- wrappers -----------------------------------------------------------------------------------------


def buffering(app: Any) -> Any:
    """A middleware that starts the response when it has read the whole body."""

    def middleware(environ: Any, start_response: Any) -> Any:
        started: list[Any] = []
        body = app(environ, lambda *args: started.append(args))
        chunks = list(body)
        if hasattr(body, "close"):
            body.close()
        start_response(*started[0])
        return chunks

    return middleware


def validating(app: Any) -> Any:
    """The standard library's validator, with a string for the one number that Werkzeug's server puts in the environ."""
    valid = validator(app)

    def middleware(environ: Any, start_response: Any) -> Any:
        environ["REMOTE_PORT"] = str(environ["REMOTE_PORT"])
        return valid(environ, start_response)

    return middleware


WRAPPERS = {
    "ProxyFix": ProxyFix,
    "buffering": buffering,
    "debugger": lambda app: DebuggedApplication(app, evalex=False),
    "validator": validating,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("when", ["before init_app", "after init_app"])
def test_wrappers_around_the_app(store: Store, wrapper: str, when: str) -> None:
    """A middleware around ``app.wsgi_app`` does not change the promises, and the app's error handlers still respond."""
    app, db = flask_app(), SessionPlugin(store.url, **POOL)
    if when == "after init_app":
        db.init_app(app)
    app.wsgi_app = WRAPPERS[wrapper](app.wsgi_app)  # type: ignore[method-assign]
    if when == "before init_app":
        db.init_app(app)

    @app.post("/<name>")
    def view(name: str) -> Any:
        (add_orphan if name == "orphan" else insert(name))(db.session)
        return {}, 201

    app.register_error_handler(IntegrityError, lambda error: ("conflict", 409))
    with Site(store, app, db).checked() as site:
        assert site.ask("/orphan").status == 409
        assert store.names() == []
        assert (site.ask("/tea").status, store.names()) == (201, ["tea"])


@pytest.mark.parametrize("late", [False, True])
def test_failed_commit_of_a_middleware_inside(store: Store, late: bool) -> None:
    """A failed commit of a middleware's work leads to an error response, even if the middleware uses write().

    The app's error handlers respond as long as the request is in progress; later, the server receives the error.
    """
    app, db = flask_app(), SessionPlugin(store.url, **POOL)
    flask_wsgi_app = app.wsgi_app

    def writing(environ: Any, start_response: Any) -> Any:
        arguments: list[Any] = []

        def start(*args: Any) -> Any:
            arguments[:] = args
            return print if late else send()

        def send() -> Any:
            add_orphan(db.session)
            write = start_response(*arguments)
            write(b"first ")
            return write

        body = list(flask_wsgi_app(environ, start))
        if late:
            send()
        return body

    app.wsgi_app = writing  # type: ignore[method-assign]
    db.init_app(app)

    @app.post("/")
    def view() -> Any:
        return app.response_class(iter(["success"]), 201)

    app.register_error_handler(IntegrityError, lambda error: (iter(["conflict"]), 409))
    app.register_error_handler(500, lambda error: ("sorry", 500))
    with Site(store, app, db).checked() as site:
        if late:
            assert type(Server(store).serve(app).error) is IntegrityError
        else:
            assert (site.ask("/").status, site.ask("/").body) == (409, b"conflict")
            del app.error_handler_spec[None][None][IntegrityError]
            assert (site.ask("/").status, site.ask("/").body) == (500, b"sorry")
    assert store.names() == []


def test_body_of_a_middleware_is_closed_after_a_failed_commit(store: Store) -> None:
    """If a commit fails in a middleware, the body that the middleware has created is closed."""
    app, db, closed = flask_app(), SessionPlugin(store.url, **POOL), []
    flask_wsgi_app = app.wsgi_app

    def auditing(environ: Any, start_response: Any) -> Any:
        def start(*args: Any) -> Any:
            add_orphan(db.session)
            return start_response(*args)

        return ClosingIterator(flask_wsgi_app(environ, start), lambda: closed.append("closed"))

    app.wsgi_app = auditing  # type: ignore[method-assign]
    db.init_app(app)
    app.add_url_rule("/", "view", lambda: ({}, 201), methods=["POST"])
    with Site(store, app, db).checked() as site:
        assert (site.ask("/").status, closed, store.names()) == (500, ["closed"], [])


def test_middleware_inside_receives_the_final_status(store: Store) -> None:
    """A middleware inside the plugin never receives a success status for a failed commit."""
    app, db, recorded = flask_app(), SessionPlugin(store.url, **POOL), []
    flask_wsgi_app = app.wsgi_app

    def noting(environ: Any, start_response: Any) -> Any:
        return flask_wsgi_app(environ, lambda status, *args: recorded.append(status) or start_response(status, *args))

    app.wsgi_app = noting  # type: ignore[method-assign]
    db.init_app(app)

    @app.post("/")
    def view() -> Any:
        add_orphan(db.session)
        return {}, 201

    with Site(store, app, db).checked() as site:
        assert site.ask("/").status == 500
    assert recorded == ["500 INTERNAL SERVER ERROR"]


def test_finalize_request_outside_of_a_request(store: Store) -> None:
    """finalize_request() called outside of a request does not end the surrounding unit of work."""
    app, db = flask_app(), SessionPlugin(store.url, **POOL)
    db.init_app(app)
    with app.test_request_context(), db.session_scope() as session:
        insert("tea")(session)
        app.finalize_request("fine")
        assert session.in_transaction()
        session.rollback()
    assert store.names() == []
    db.dispose()


def test_middleware_inside_works_with_the_session(store: Store) -> None:
    """What a middleware inside the plugin writes joins the request's transaction; its error response is passed on."""
    app, db = flask_app(), SessionPlugin(store.url, **POOL)
    flask_wsgi_app = app.wsgi_app

    def auditing(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/broken":
            insert(f"audit {environ['PATH_INFO']}")(db.session)
            return flask_wsgi_app(environ, start_response)
        start_response("200 OK", TEXT)
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", TEXT, sys.exc_info())
        return [b"sorry"]

    app.wsgi_app = auditing  # type: ignore[method-assign]
    db.init_app(app)
    app.add_url_rule("/view", "view", lambda: ({}, 201), methods=["POST"])
    with Site(store, app, db).checked() as site:
        assert [site.ask(path).status for path in ("/view", "/missing")] == [201, 404]
        assert store.names() == ["audit /view"]
        assert (site.ask("/broken").status, site.ask("/broken").body) == (500, b"sorry")


@pytest.mark.parametrize("when", ["before init_app", "after init_app"])
def test_mounted_apps_with_one_database(store: Store, when: str) -> None:
    """Mounted apps that share a database use their own error handlers."""
    shared = Database(store.url, **POOL)
    outer, inner = flask_app(), flask_app()
    db, mounted = SessionPlugin(shared), SessionPlugin(shared)
    mounted.init_app(inner)
    if when == "after init_app":
        db.init_app(outer)
    outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/inner": inner})  # type: ignore[method-assign]
    if when == "before init_app":
        db.init_app(outer)
    for app, name in ((outer, "outer"), (inner, "inner")):
        app.add_url_rule("/orphan", "orphan", lambda: (add_orphan(shared.session) or {}, 201), methods=["POST"])
        app.add_url_rule("/add", "add", lambda name=name: (insert(name)(shared.session) or {}, 201), methods=["POST"])
        app.register_error_handler(IntegrityError, lambda error, name=name: (name, 409))
    with Site(store, outer, shared).checked() as site:
        assert [site.ask(path).body for path in ("/orphan", "/inner/orphan")] == [b"outer", b"inner"]
        assert store.names() == []
        assert [site.ask(path).status for path in ("/add", "/inner/add")] == [201, 201]
        assert store.names() == ["inner", "outer"]


def test_plain_middleware_around_the_app(store: Store) -> None:
    """Under the plain middleware, Flask settles the unit of work, with its error handlers and the view's policy."""
    shared = Database(store.url, **POOL)
    app, db = flask_app(), SessionPlugin(shared)
    db.init_app(app)

    @app.before_request
    def load() -> None:
        count(db.session)

    @app.get("/")
    @db.policy(read_only)
    def report() -> Any:
        insert("tea")(db.session)
        return {}

    @app.post("/")
    def orphan() -> Any:
        add_orphan(db.session)
        return {}, 201

    app.register_error_handler(IntegrityError, lambda error: ("conflict", 409))
    app.register_error_handler(ReadOnlyError, lambda error: ("read only", 403))
    with Site(store, SessionScopeMiddleware(app, shared), shared).checked() as site:
        assert (site.ask("/").status, site.ask("/", "GET").status, store.names()) == (409, 403, [])


def test_two_plugins_on_one_app(store: Store, tmp_path: Any) -> None:
    """Two plugins on one app have separate sessions, and a failed commit of either calls the app's error handler."""
    other_store = Store("sqlite+pysqlite", tmp_path / "other.db")
    app = flask_app()
    db, other = SessionPlugin(store.url, **POOL), SessionPlugin(other_store.url, **POOL)
    db.init_app(app)
    other.init_app(app)

    @app.post("/<fails>")
    def view(fails: str) -> Any:
        insert("here")(db.session)
        insert("there")(other.session)
        {"here": lambda: add_orphan(db.session), "there": lambda: twice_at_commit(other), "none": lambda: None}[fails]()
        return {}, 201

    def twice_at_commit(plugin: Any) -> None:
        plugin.session.execute(Parent.__table__.insert(), {"name": "taken"})
        plugin.session.add(Parent(name="taken"))

    app.register_error_handler(IntegrityError, lambda error: ({"rows": count(db.session)}, 409))
    assert app.extensions["session_plugin"] == [db, other]
    with Site(store, app, db).checked() as site:
        assert (site.ask("/here").status, store.names(), other_store.names()) == (409, [], [])
        assert (site.ask("/there").status, other_store.names()) == (409, [])
        store.clear()
        assert (site.ask("/none").status, store.names(), other_store.names()) == (201, ["here"], ["there"])
        assert other.engine.pool.checkedout() == 0
    other.dispose()
    other_store.engine.dispose()


# -- policies -------------------------------------------------------------------------------------------


def test_read_only_refuses(site: Site, app: Any, db: Any) -> None:
    """In a view with `read_only`, the session and the database refuse to write."""

    @app.before_request
    def load() -> None:
        count(db.session)

    @app.post("/orm")
    @db.policy(read_only)
    def orm() -> Any:
        insert("orm")(db.session)
        return {}, 201

    @app.post("/core")
    @db.policy(read_only)
    async def core() -> Any:
        db.session.execute(Parent.__table__.insert(), {"name": "core"})
        return {}, 201

    @app.post("/write")
    def write() -> Any:
        insert("written")(db.session)
        return {}, 201

    assert [site.ask(path).status for path in ("/orm", "/core", "/write")] == [500, 500, 201]
    assert site.store.names() == ["written"]


def test_policies_of_classes_and_blueprints(site: Site, app: Any, db: Any) -> None:
    """The nearest policy applies: that of the method, the view, its class or its blueprint."""

    @app.before_request
    def load() -> None:
        count(db.session)

    class Decorated(Put):
        decorators = [db.policy(manual)]  # noqa: RUF012

    @db.policy(manual)
    class Marked(Put):
        pass

    class Methods(MethodView):
        @db.policy(manual)
        def post(self) -> Any:
            insert("method")(db.session)
            return {}, 201

        def put(self) -> Any:
            insert("put")(db.session)
            return {}, 201

    def handwritten() -> Any:
        insert("handwritten")(db.session)
        return {}, 201

    reports = db.policy(manual)(Blueprint("reports", __name__))
    nested = Blueprint("nested", __name__)
    nested.post("/nested")(handwritten)
    reports.post("/reports")(handwritten)
    reports.post("/other", endpoint="other")(db.policy(commit_on_success)(handwritten))
    reports.register_blueprint(nested)
    app.register_blueprint(reports)
    app.add_url_rule("/decorated", view_func=Decorated.as_view("decorated", db))
    app.add_url_rule("/marked", view_func=Marked.as_view("marked", db))
    app.add_url_rule("/methods", view_func=Methods.as_view("methods"))

    def saved(path: str, method: str = "POST") -> bool:
        site.store.clear()
        assert site.ask(path, method).status == 201
        return site.store.names() != []

    paths = ["/decorated", "/marked", "/methods", "/reports", "/nested"]
    assert [saved(path) for path in paths] == [False] * len(paths)
    assert (saved("/methods", "PUT"), saved("/other")) == (True, True)
    with pytest.raises(PolicyError):
        db.policy("manual")


def test_policy_above_the_route(site: Site, app: Any, db: Any) -> None:
    """The decorator of the policy may stand above that of the route, and other decorators between them."""

    def other(function: Any) -> Any:
        return wraps(function)(lambda: function())

    @db.policy(manual)
    @app.post("/above")
    def above() -> Any:
        insert("above")(db.session)
        return {}, 201

    @db.policy(manual)
    @other
    @app.post("/between")
    def between() -> Any:
        insert("between")(db.session)
        return {}, 201

    @db.policy(manual)
    @app.post("/outer")
    @other
    @db.policy(commit_on_success)
    def inner() -> Any:
        insert("inner")(db.session)
        return {}, 201

    def view() -> Any:
        insert("view")(db.session)
        return {}, 201

    app.post("/plain", endpoint="plain")(view)
    app.post("/decorated", endpoint="decorated")(db.policy(manual)(view))

    def saved(path: str) -> bool:
        site.store.clear()
        assert site.ask(path).status == 201
        return site.store.names() != []

    paths = ["/above", "/between", "/outer", "/plain", "/decorated"]
    assert [saved(path) for path in paths * 2] == [False, False, True, True, False] * 2


def test_policy_can_depend_on_the_method(store: Store) -> None:
    """A policy can decide by the method of the request, also if the app handles the error."""
    app = flask_app()
    db = SessionPlugin(store.url, policy=lambda outcome: Decision(outcome.method == "PUT", "PUT only"), **POOL)
    db.init_app(app)

    @app.route("/<name>", methods=["POST", "PUT"])
    def view(name: str) -> Any:
        insert(f"{request.method} {name}")(db.session)
        return {} if name == "returns" else abort(404)

    with Site(store, app, db).checked() as site:
        for method in ("POST", "PUT"):
            assert [site.ask(path, method).status for path in ("/returns", "/raises")] == [200, 404]
    assert store.names() == ["PUT raises", "PUT returns"]


def test_policy_for_the_whole_app(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """With ``policy=manual``, only commit() saves, and uncommitted work is logged as a warning."""
    app, db = flask_app(), SessionPlugin(store.url, policy=manual, **POOL)
    db.init_app(app)

    @app.post("/forgotten")
    def forgotten() -> Any:
        insert("forgotten")(db.session)
        return {}, 201

    @app.post("/committed")
    def committed() -> Any:
        insert("committed")(db.session)
        db.session.commit()
        return {}, 201

    with Site(store, app, db).checked() as site:
        assert (site.ask("/forgotten").status, site.ask("/committed").status, store.names()) == (
            201,
            201,
            ["committed"],
        )
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message for message in warnings if message.startswith("POST")] == [
        "POST /forgotten: ROLLBACK, its work is discarded (only an explicit commit() saves under this policy)"
    ]


# -- lookups ---------------------------------------------------------------------------------------------


def test_lookups(site: Site, app: Any, db: Any) -> None:
    """get_or_404() and one_or_404() return the row, or abort with a 404 and the description."""

    @app.get("/get/<name>")
    def get(name: str) -> Any:
        return db.get_or_404(Parent, name, populate_existing=True).name

    @app.get("/one/<prefix>")
    def one(prefix: str) -> Any:
        return db.one_or_404(select(Parent).where(Parent.name.startswith(prefix)), description="No such tea.").name

    @app.get("/described")
    def described() -> Any:
        return db.get_or_404(Parent, "gold", description="We do not sell that.").name

    with db.session_scope() as scope:
        scope.add_all([Parent(name="black"), Parent(name="blue"), Parent(name="green")])
    ask = lambda path: site.ask(path, "GET")  # noqa: E731
    assert [ask(path).body for path in ("/get/black", "/one/g")] == [b"black", b"green"]
    assert [ask(path).status for path in ("/get/red", "/one/r", "/one/bl", "/described")] == [404] * 4
    assert (b"No such tea." in ask("/one/bl").body, b"We do not sell" in ask("/described").body) == (True, True)
    with app.app_context(), pytest.raises(TypeError, match="bogus"):
        db.get_or_404(Parent, "black", bogus=True)


# -- app contexts without a request -------------------------------------------------------------------------


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level and r.name == "session_plugin"]


def test_app_context_saves_only_on_commit(site: Site, app: Any, db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In an app context, only commit() saves; other work is rolled back, with a warning unless an error was raised."""
    caplog.set_level(logging.INFO, "session_plugin")
    with app.app_context():
        add("kept")(db.session)
        db.session.commit()
        add("lost")(db.session)
    assert (site.store.names(), len(messages(caplog, logging.WARNING))) == (["kept"], 1)
    caplog.clear()
    with pytest.raises(KeyError), app.app_context():
        insert("lost")(db.session)
        raise KeyError
    assert (site.store.names(), messages(caplog, logging.WARNING)) == (["kept"], [])
    assert messages(caplog, logging.INFO) == ["app context: ROLLBACK, its work is discarded (KeyError)"]


def test_app_context_has_its_own_session(site: Site, app: Any, db: Any) -> None:
    """Each app context has one session, which is closed at its end; loaded objects can still be read."""
    with app.app_context():
        add("tea")(db.session)
        db.session.commit()
    with app.app_context():
        outer = db.session
        tea = db.session.get(Parent, "tea")
        with app.app_context():
            assert db.session is not outer
        assert db.session is outer
    assert tea.name == "tea"
    with pytest.raises(ScopeClosedError):
        count(outer)
    with pytest.raises(NoScopeError, match="session_scope"):
        db.session  # noqa: B018


def test_session_scope_in_a_thread_beside_an_app_context(site: Site, app: Any, db: Any) -> None:
    """session_scope() works in a thread without an app context, while another thread has one open."""

    def work() -> None:
        with db.session_scope() as scope:
            insert("tea")(scope)

    with app.app_context():
        db.session  # noqa: B018
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(5)
    assert site.store.names() == ["tea"]


def test_session_scope_in_an_app_context_commits(site: Site, app: Any, db: Any) -> None:
    """In an app context, session_scope() opens a unit of work of its own, which commits."""
    with app.app_context():
        before = db.session
        with db.session_scope() as scope:
            assert scope is not before
            assert db.session is scope
            insert("tea")(scope)
        assert db.session is before
    assert site.store.names() == ["tea"]


def test_teardown_functions_use_the_session_of_an_app_context(store: Store) -> None:
    """A teardown function uses the app context's session, even if it was registered before init_app()."""
    app, db = flask_app(), SessionPlugin(store.url, **POOL)
    seen: list[Any] = []
    app.teardown_appcontext(lambda error: seen.append((db.session is seen[0], count(db.session))))
    db.init_app(app)
    with app.app_context():
        seen.append(db.session)
        count(db.session)
    assert (seen[1], db.engine.pool.checkedout()) == ((True, 0), 0)
    db.dispose()


def test_unused_app_context_takes_no_connection(site: Site, app: Any, db: Any) -> None:
    """An app context creates no session unless it is used, and a session that is not used takes no connection."""
    with app.app_context():
        pass
    with app.app_context():
        db.session  # noqa: B018
        db.scope  # noqa: B018
        assert db.engine.pool.checkedout() == 0
    with app.app_context():
        scope = db._unit_of_work()
        app.test_client().get("/")
    assert (scope.closed, scope.has_session) == (True, False)


@pytest.fixture
def renaming(app: Any, db: Any) -> None:
    @app.post("/<old>/<new>")
    def rename(old: str, new: str) -> Any:
        parent = db.session.get(Parent, old)
        db.session.add(Parent(name=new))
        db.session.delete(parent)
        return {}, 201


@pytest.mark.usefixtures("renaming")
def test_request_inside_an_app_context(site: Site, app: Any, db: Any) -> None:
    """A test's app context and a request in it have separate sessions; the context sees what the request committed.

    An app context that has only read does not block the request's write, not even on SQLite.
    """
    with app.app_context():
        add("tea")(db.session)
        db.session.commit()
        outer, tea = db.session, db.session.get(Parent, "tea")
        assert app.test_client().post(f"/{tea.name}/coffee").status_code == 201
        assert db.session is outer
        assert db.session.scalars(select(Parent.name)).all() == ["coffee"]
        assert db.session.get(Parent, "tea") is None
        assert db.engine.pool.checkedout() == 1


def test_object_that_a_request_deleted_knows_its_key(site: Site, app: Any, db: Any) -> None:
    """In an app context, an object knows its key after a request has deleted its row; all else is read anew."""

    @app.delete("/<name>")
    def view(name: str) -> Any:
        db.session.execute(delete(Child))
        db.session.execute(delete(Parent).where(Parent.name == name))
        return {}

    with app.app_context():
        add("tea")(db.session)
        add("coffee")(db.session)
        db.session.add(Child(name="cup", parent="coffee"))
        db.session.commit()
        tea, coffee, cup = db.session.get(Parent, "tea"), db.session.get(Parent, "coffee"), db.session.get(Child, "cup")
        assert app.test_client().delete(f"/{tea.name}").status_code == 200
        assert (tea.name, coffee.name, cup.name) == ("tea", "coffee", "cup")
        with pytest.raises(ObjectDeletedError):
            cup.parent  # noqa: B018
        assert db.session.get(Parent, tea.name) is None
        assert db.session.get(Parent, coffee.name) is coffee
        assert tea.name == "tea"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///shop.db"])
def test_reading_app_context_does_not_block_a_request(tmp_path: Any, url: str) -> None:
    """An app context that has only read does not block a request on SQLite without WAL: in memory, or in a new file."""
    app = Flask(__name__, instance_path=str(tmp_path))
    db = SessionPlugin(url, metadata=Base.metadata, connect_args={"timeout": 0.1})
    logging.getLogger("session_plugin").setLevel(logging.ERROR)
    try:
        db.init_app(app)
        app.add_url_rule("/", "view", lambda: (insert("coffee")(db.session) or {}, 201), methods=["POST"])
        with app.app_context():
            db.create_all()
            assert count(db.session) == 0
            assert app.test_client().post("/").status_code == 201
            assert count(db.session) == 1
    finally:
        logging.getLogger("session_plugin").setLevel(logging.NOTSET)
        db.dispose()


def test_reading_app_context_does_not_block_session_scope(tmp_path: Any) -> None:
    """On SQLite in memory, a script can open a session_scope() for each row that it has read, without more queries."""
    app, statements = flask_app(), []
    db = SessionPlugin("sqlite://", metadata=Base.metadata, connect_args={"timeout": 0.1})
    db.init_app(app)
    with app.app_context():
        db.create_all()
        with db.session_scope() as scope:
            scope.add_all([Parent(name="a"), Parent(name="b")])
        event.listen(db.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        for parent in db.session.scalars(select(Parent).order_by(Parent.name)).all():
            with db.session_scope() as scope:
                assert "test_flask.py" in repr(db.scope)
                scope.add(Parent(name=parent.name * 2))
        assert [statement[:6] for statement in statements if statement[:5] != "BEGIN"] == ["SELECT", "INSERT", "INSERT"]
        parent = db.session.get(Parent, "aa")
        with db.session_scope() as scope:
            scope.delete(scope.get(Parent, "bb"))
            with db.session_scope() as joined:
                assert joined is scope
        parent.name = "A"
        db.session.commit()
        assert db.session.scalars(select(Parent.name).order_by(Parent.name)).all() == ["A", "a", "b"]
    db.dispose()


@pytest.mark.parametrize("module_store", ["postgresql+psycopg"], indirect=True)  # SQLite allows one writer at a time
def test_session_scope_does_not_end_work_of_the_app_context(store: Store) -> None:
    """session_scope() ends neither unsaved work, nor a hook, nor an open result of the app context."""
    app, db, ran = flask_app(), SessionPlugin(store.url, **POOL), []
    db.init_app(app)

    def other_work(name: str) -> None:
        with db.session_scope() as scope:
            insert(name)(scope)

    with app.app_context():
        insert("unsaved")(db.session)
        other_work("a")
        db.session.commit()
    with app.app_context():
        count(db.session)
        db.on_commit(ran.append, "hook")
        other_work("b")
        db.session.commit()
    with app.app_context():
        for name in db.session.scalars(select(Parent.name).execution_options(yield_per=1)):
            other_work(f"{name} read")
    assert (ran, store.names()) == (["hook"], ["a", "a read", "b", "b read", "unsaved", "unsaved read"])
    db.dispose()


def test_unsaved_work_of_the_context_is_logged(site: Site, app: Any, db: Any, caplog: pytest.LogCaptureFixture) -> None:
    """If a request runs while its app context has unsaved work, a warning is logged, and the work is kept."""
    app.add_url_rule("/", "view", lambda: {"rows": count(db.session)})
    with app.app_context():
        insert("tea")(db.session)
        assert app.test_client().get("/").json == {"rows": 0}
        assert "unsaved work" in messages(caplog, logging.WARNING)[0]
        db.session.commit()
        assert app.test_client().get("/").json == {"rows": 1}
    assert len(messages(caplog, logging.WARNING)) == 1


def test_hooks_of_an_app_context_survive_a_request(site: Site, app: Any, db: Any) -> None:
    """A request in an app context does not run or drop the hooks that wait for the context's commit."""
    ran: list[str] = []
    app.add_url_rule("/", "view", lambda: {"rows": count(db.session)})
    with app.app_context():
        count(db.session)
        db.on_commit(ran.append, "hook")
        app.test_client().get("/")
        assert ran == []
        db.session.commit()
    assert ran == ["hook"]


def test_test_request_context_saves_only_on_commit(site: Site, app: Any, db: Any) -> None:
    """``test_request_context()`` behaves like an app context: only commit() saves."""

    @app.post("/")
    def view() -> Any:
        insert("lost")(db.session)
        raise Forbidden

    with app.test_request_context("/", method="POST"):
        assert app.full_dispatch_request().status_code == 403
    assert site.store.names() == []


def test_client_that_preserves_the_context(site: Site, app: Any, db: Any) -> None:
    """``with client:`` keeps the app context open; its session is not the request's, and is closed with the context."""
    app.add_url_rule("/", "view", lambda: (insert("tea")(db.session) or {}, 201), methods=["POST"])
    with app.test_client() as client:
        assert client.post("/").status_code == 201
        assert count(db.session) == 1
        assert client.post("/").status_code == 500
        kept = db.session
        assert count(kept) == 1
    with pytest.raises(ScopeClosedError):
        count(kept)


def test_cli_and_shell(site: Site, app: Any, db: Any) -> None:
    """In a command, which runs in an app context, session_scope() commits, and commit() saves."""

    @app.cli.command("work")
    def work() -> None:
        with db.session_scope() as scope:
            insert("scope")(scope)
        insert("explicit")(db.session)
        db.session.commit()

    assert app.test_cli_runner().invoke(args="work").exit_code == 0
    assert site.store.names() == ["explicit", "scope"]
    if site.store.backend == "sqlite":
        app.shell_context_processor(lambda: {"db": db})
        with app.app_context():
            assert count(app.make_shell_context()["db"].session) == 2
            assert site.store.open_transactions() == []  # a shell that waits at its prompt does not block writers


# -- configuration ------------------------------------------------------------------------------------------


@pytest.fixture
def initialised(tmp_path: Any) -> Any:
    """Create an app and call init_app(); keeps a reference to the app, which a plugin does not."""
    kept: list[Flask] = []

    def initialise(plugin: Any, /, *args: Any, config: Any = None, **options: Any) -> Flask:
        app = Flask(__name__, instance_path=str(tmp_path / "of the app" / "instance"))
        app.config.update(config or {})
        plugin.init_app(app, *args, **options)
        kept.append(app)
        return app

    return initialise


def path_of(engine: Any) -> Any:
    return engine.url.database


def test_configuration_takes_precedence(initialised: Any) -> None:
    """The app's configuration takes precedence over init_app(), and init_app() over the constructor."""
    production = "postgresql+psycopg://production/shop"
    for args in ((), ("postgresql+psycopg://staging/shop",)):
        db = SessionPlugin(production, pool_size=3)
        initialised(db, *args, config={"SQLALCHEMY_DATABASE_URI": "sqlite:////elsewhere/x.db"}, pool_size=4)
        assert (path_of(db.engine), db.engine.pool.size()) == ("/elsewhere/x.db", 4)
    db = SessionPlugin(production)
    initialised(db, "postgresql+psycopg://staging/shop", config={"SQLALCHEMY_DATABASE_URI": None})
    assert db.engine.url.host == "staging"
    db = SessionPlugin(production, pool_size=3, echo=False)
    initialised(db, config={"SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 5}})
    assert db.engine.pool.size() == 5
    db = SessionPlugin(lambda: production)
    initialised(db, config={"SQLALCHEMY_ENGINES": {"default": "sqlite:////elsewhere/x.db"}})
    assert path_of(db.engine) == "/elsewhere/x.db"


def test_configured_engines_replace_those_of_the_code(initialised: Any) -> None:
    """Engines in the app's configuration replace all engines of the constructor, even those with other names."""
    named = {"default": "postgresql+psycopg://production/shop", "reports": "postgresql+psycopg://production/reports"}
    db = SessionPlugin(named)
    initialised(db, config={"SQLALCHEMY_DATABASE_URI": "sqlite:////elsewhere/x.db"})
    assert [*db.engines] == ["default"]
    with pytest.raises(ConfigurationError, match="'reports'"):
        initialised(SessionPlugin(named, binds={Parent: "reports"}), config={"SQLALCHEMY_DATABASE_URI": "sqlite://"})


def test_precedence_of_configuration_keys(initialised: Any) -> None:
    """URI takes precedence over ENGINES, and ENGINES over BINDS, whose default key is None; dicts stay unchanged."""
    binds = {None: "sqlite:////elsewhere/binds.db", "reports": "sqlite:////elsewhere/reports.db"}
    engines = {"default": "sqlite:////elsewhere/engines.db", "other": {"url": "sqlite:///other.db", "pool_size": 2}}
    options = {"pool_size": 3}
    config = {"SQLALCHEMY_BINDS": binds, "SQLALCHEMY_ENGINE_OPTIONS": options}
    db = SessionPlugin()
    initialised(db, config=config)
    assert {name: path_of(engine) for name, engine in db.engines.items()} == {
        "default": "/elsewhere/binds.db",
        "reports": "/elsewhere/reports.db",
    }
    config["SQLALCHEMY_ENGINES"] = engines
    db = SessionPlugin()
    initialised(db, config=config)
    assert (path_of(db.engine), sorted(db.engines)) == ("/elsewhere/engines.db", ["default", "other", "reports"])
    assert [db.engines[name].pool.size() for name in ("default", "other")] == [3, 2]
    config["SQLALCHEMY_DATABASE_URI"] = "sqlite:////elsewhere/uri.db"
    db = SessionPlugin()
    initialised(db, config=config)
    assert path_of(db.engine) == "/elsewhere/uri.db"
    assert binds == {None: "sqlite:////elsewhere/binds.db", "reports": "sqlite:////elsewhere/reports.db"}
    assert engines["other"] == {"url": "sqlite:///other.db", "pool_size": 2}
    assert options == {"pool_size": 3}
    nothing = {"SQLALCHEMY_BINDS": None, "SQLALCHEMY_ENGINES": None, "SQLALCHEMY_ENGINE_OPTIONS": None}
    db = SessionPlugin("sqlite:////elsewhere/x.db")
    initialised(db, config=nothing)
    assert path_of(db.engine) == "/elsewhere/x.db"


def test_relative_sqlite_paths(initialised: Any, tmp_path: Any) -> None:
    """A relative path of an SQLite file is relative to ``instance_path``; other paths are not changed."""
    folder = tmp_path / "of the app" / "instance"
    inside = str(folder / "shop.db")
    for source in ("sqlite:///shop.db", make_url("sqlite:///shop.db"), {"default": {"url": "sqlite:///shop.db"}}):
        for given in (source, lambda source=source: source):
            db = SessionPlugin(given)
            app = initialised(db)
            with app.app_context():
                assert path_of(db.engine) == inside
    assert folder.is_dir()
    db = SessionPlugin("sqlite:///file:shop.db?uri=true")
    with initialised(db).app_context():
        assert path_of(db.engine) == f"file:{inside}"
    for untouched in ("/elsewhere/shop.db", "file:/elsewhere/shop.db?uri=true"):
        db = SessionPlugin(f"sqlite:///{untouched}")
        initialised(db)
        assert path_of(db.engine) == untouched.partition("?")[0]
    for in_memory in ("file:shop?mode=memory&uri=true", "file::memory:?uri=true"):
        url = make_url(f"sqlite:///{in_memory}")
        assert SQLite().in_folder(url, str(folder)) == url
    for memory in ("sqlite://", "sqlite:///:memory:"):
        db = SessionPlugin(memory)
        initialised(db)
        assert "memdb" in str(db.engine.url)


def test_misconfiguration_raises_in_init_app(initialised: Any) -> None:
    """A wrong configuration raises in init_app() and says what to change; init_app() can then be called again."""
    db = SessionPlugin()
    with pytest.raises(ConfigurationError, match="No database is configured"):
        initialised(db)
    app = Flask(__name__)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        db.init_app(app, "not a url")
    with pytest.raises(ConfigurationError, match="async driver"):
        db.init_app(app, "sqlite+aiosqlite:///shop.db")
    with pytest.raises(ConfigurationError, match="pool_sise"):
        db.init_app(app, "sqlite://", pool_sise=3)
    db.init_app(app, "sqlite://")
    with pytest.raises(ConfigurationError, match="called twice"):
        db.init_app(app)


def test_missing_init_app_raises() -> None:
    """Without init_app(), `session` raises an error that names it, in a request and outside."""
    db = SessionPlugin("sqlite://")
    with pytest.raises(NoScopeError, match="init_app"):
        db.session  # noqa: B018
    app = flask_app(TESTING=True)
    app.add_url_rule("/", "view", lambda: str(db.session))
    with pytest.raises(ConfigurationError, match=r"init_app\(app\)"):
        app.test_client().get("/")


def test_one_plugin_serves_many_apps(initialised: Any, tmp_path: Any) -> None:
    """A plugin has a separate database for each app, and raises outside of an app context, because it cannot choose."""
    db = SessionPlugin(metadata=Base.metadata)
    apps = [initialised(db, f"sqlite:///{tmp_path}/{name}.db") for name in ("one", "two")]
    for number, app in enumerate(apps):
        app.add_url_rule("/", "view", lambda n=number: (insert(f"app {n}")(db.session) or {}, 201), methods=["POST"])
        with app.app_context():
            db.create_all()
        assert app.test_client().post("/").status_code == 201
    for number, app in enumerate(apps):
        with app.app_context():
            assert db.session.scalars(select(Parent.name)).all() == [f"app {number}"]
        with db.database_for(app).session_scope() as scope:
            assert count(scope) == 1
    with pytest.raises(NoScopeError, match="2 apps"):
        db.session  # noqa: B018
    for app in apps:
        with app.app_context():
            db.dispose()


def test_methods_of_an_app_keep_their_names() -> None:
    """Wrapped methods of an app keep their names, which profilers and debuggers show."""
    app = flask_app()
    names = ("finalize_request", "handle_user_exception", "handle_exception")
    SessionPlugin("sqlite://").init_app(app)
    assert tuple(getattr(app, name).__name__ for name in names) == names


def test_apps_are_not_kept_alive() -> None:
    """A plugin does not keep its apps alive."""
    db = SessionPlugin("sqlite://")
    apps = [flask_app(), flask_app()]
    db.init_app(apps[0])
    db.init_app(apps[1], lambda: "sqlite://")
    refs = [ref(app) for app in apps]
    apps.clear()
    gc.collect()
    assert [app() for app in refs] == [None, None]


def test_requests_of_a_thread_have_separate_sessions(site: Site, app: Any, db: Any) -> None:
    """After a request has ended in any way, its thread has no unit of work, and the next request has a new session."""
    sessions: list[Any] = []

    @app.post("/<ending>")
    def view(ending: str) -> Any:
        sessions.append(db.session)
        if ending == "raise":
            raise RuntimeError("boom")
        if ending == "exit":
            raise SystemExit
        return {}

    for ending in ("raise", "return", "exit", "return"):
        if ending == "exit":
            with pytest.raises(SystemExit):
                app(new_environ(path="/exit"), lambda *_: None)
        else:
            Server(site.store).serve(app, path=f"/{ending}")
        with pytest.raises(NoScopeError):
            db.scope  # noqa: B018
    assert len(set(map(id, sessions))) == 4
    assert TEXT


def test_metadata_is_there_before_init_app() -> None:
    """Association tables need it at import time."""
    metadata = MetaData()
    assert SessionPlugin(metadata=metadata).metadata is metadata
    with pytest.raises(NoScopeError, match="init_app"):
        SessionPlugin().metadata  # noqa: B018


def test_remove_ends_the_session_of_an_app_context(app: Any, db: Any) -> None:
    """``scoped_session.remove()`` rolls back and gives the connection back, as with Flask-SQLAlchemy."""
    with app.app_context():
        db.scoped_session.remove()  # there is no session yet
        insert("lost")(db.session)
        db.scoped_session.remove()
        assert (db.session.in_transaction(), db.engine.pool.checkedout()) == (False, 0)
        assert count(db.session) == 0


def test_drop_all_after_a_read_in_an_app_context() -> None:
    """The app context's session has only read, and does not lock ``create_all()`` and ``drop_all()`` out on SQLite."""
    app = Flask(__name__)
    db = SessionPlugin("sqlite://", metadata=Base.metadata, connect_args={"timeout": 0.1})
    db.init_app(app)
    with app.app_context():
        db.create_all()
        assert count(db.session) == 0
        db.create_all()
        assert count(db.session) == 0
        db.drop_all()
    db.dispose()


# -- responses that a test client never closes ------------------------------------------------------


@pytest.mark.parametrize("policy", [commit_on_success, manual], ids=["commit_on_success", "manual"])
def test_response_that_is_not_closed(store: Store, policy: Any) -> None:
    """Flask's test client never closes a response; the unit of work ends as soon as no code of the app can run."""
    app, scopes, loaded = flask_app(), [], []
    db = SessionPlugin(store.url, metadata=Base.metadata, policy=policy, **POOL)
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    db.init_app(app)

    @app.post("/<name>")
    def view(name: str) -> Any:
        add(name)(db.session)
        db.session.commit()
        scopes.append(db.scope)
        loaded.append(db.session.get(Parent, name))
        return {}, 201

    @app.errorhandler(404)
    def not_found(error: Exception) -> Any:
        db.session.get(Parent, "tea")
        scopes.append(db.scope)
        return "not found", 404

    with Site(store, app, db).checked():
        client = app.test_client()
        responses = [client.post("/tea"), client.post("/coffee"), client.get("/a/b/c"), client.head("/a/b")]
        assert [response.status_code for response in responses] == [201, 201, 404, 404]
        assert [scope.closed for scope in scopes] == [True] * 4
        assert db.engine.pool.checkedout() == 0
        with app.app_context():
            db.session.delete(loaded[1])
            db.session.commit()
        assert store.names() == ["tea"]


def test_response_of_a_failed_commit_that_is_not_closed(site: Site, app: Any, db: Any) -> None:
    """The response that replaces that of a failed commit ends the unit of work too."""
    scopes: list[Any] = []

    @app.post("/")
    def view() -> Any:
        scopes.append(db.scope)
        add_orphan(db.session)
        return {}, 201

    @app.errorhandler(IntegrityError)
    def refused(error: Exception) -> Any:
        return "refused", 409

    assert app.test_client().post("/").status_code == 409
    assert scopes[0].closed


class Closing(Response):
    """A response that does something when it is closed."""

    closes: ClassVar[list[str]] = []

    def close(self) -> None:
        super().close()
        self.closes.append("closed")


def late_function(db: Any) -> Any:
    response = Response("a")
    response.call_on_close(lambda: insert("late")(db.session))
    return response


@pytest.mark.parametrize("kind", ["stream", "late function", "late function of a teardown", "subclass"])
def test_response_that_may_run_code_is_open_until_it_is_closed(site: Site, app: Any, db: Any, kind: str) -> None:
    """Code of the app that runs while a response is sent, or afterwards, has the session of the request."""
    scopes: list[Any] = []
    responses: dict[str, Callable[[], Any]] = {
        "stream": lambda: Response(iter(["a"])),
        "late function": lambda: late_function(db),
        "subclass": lambda: Closing("a"),
    }

    @app.get("/")
    def view() -> Any:
        scopes.append(db.scope)
        count(db.session)
        g.response = responses.get(kind, lambda: Response("a"))()
        return g.response

    if kind == "late function of a teardown":

        @app.teardown_request
        def add_late_function(error: BaseException | None) -> None:
            g.response.call_on_close(lambda: None)

    body = app.wsgi_app(new_environ(method="GET"), Server(site.store).start_response)
    assert (b"".join(body), scopes[0].closed) == (b"a", False)
    body.close()
    assert scopes[0].closed
    assert Closing.closes == ["closed"] * (kind == "subclass")
    Closing.closes.clear()


@pytest.mark.parametrize(
    ("leave", "saved"),
    [
        (lambda: click.get_current_context().exit(0), True),
        (lambda: sys.exit(0), True),
        (lambda: sys.exit(), True),
        (lambda: click.get_current_context().exit(2), False),
        (lambda: sys.exit("failed"), False),
        (lambda: sys.exit(1), False),
        (click.Abort, False),
    ],
)
@pytest.mark.parametrize("joins", [True, False])
def test_a_command_that_exits_with_code_0_commits(
    leave: Callable[[], Any], saved: bool, joins: bool, tmp_path: Path
) -> None:
    """Leaving a ``session_scope()`` with exit code 0 is a success, also from a block that joined; another is not."""
    app, db = Flask("shop"), SessionPlugin(f"sqlite:///{tmp_path}/shop.db", metadata=Base.metadata)
    db.init_app(app)

    @app.cli.command("work")
    def work() -> None:
        with db.session_scope() as session:
            session.add(Parent(name="tea"))
            with db.session_scope() if joins else contextlib.nullcontext():
                error = leave()
                if error is not None:
                    raise error

    with app.app_context():
        db.create_all()
    code = app.test_cli_runner().invoke(args="work").exit_code
    assert (code == 0) is saved
    with app.app_context():
        assert db.session.scalars(select(Parent.name)).all() == (["tea"] if saved else [])
    db.database_for(app).dispose()  # after the session of the app context has given its connection back


def test_remove_in_a_request(site: Site, app: Any, db: Any) -> None:
    """``scoped_session.remove()`` in a request ends its transaction, and rolls back what was not committed."""

    @app.post("/remove")
    def remove() -> Any:
        insert("lost")(db.session)
        db.scoped_session.remove()
        return {"rows": count(db.session)}

    assert json.loads(site.ask("/remove").body) == {"rows": 0}
