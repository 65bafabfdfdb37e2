"""The promises of session_plugin, each stated once.  Every adapter runs them on every database that it supports.

Each test ends with `Harness.settle_down`: no connection is checked out of the pool, and no transaction is open on
the server.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError, ResourceClosedError
from sqlalchemy.orm import Session

from session_plugin import ScopeClosedError

from .harness import (
    Act,
    ConflictError,
    HandledError,
    Harness,
    Parent,
    Sibling,
    add,
    add_orphan,
    count,
    hold,
    insert,
    release,
    wait_for,
)


class Interruption(BaseException):
    """As gevent's Timeout and the like, which handlers for `Exception` do not catch."""


class Contract:
    """Put `on(SomeHarness)` above a subclass to run the contract on that harness."""

    @pytest.fixture
    def app(self, running: Harness) -> Any:
        running.store.clear()
        running.log.clear()
        yield running
        running.settle_down()

    # -- 2: no session, no connection and no transaction unless they are used ----------------------

    def test_unused_session_checks_out_no_connection(self, app: Harness) -> None:
        """A session that an endpoint asks for but does not use checks out no connection."""
        taken = []

        def work(session: Session) -> None:
            taken.append(app.sync_engine.pool.checkedout())
            assert not session.in_transaction()

        assert app.request(Act(work)).status == 201
        assert taken == [0]

    # -- 6: clean connections --------------------------------------------------------------------

    def test_the_end_waits_for_a_connection_that_is_being_taken(self, app: Harness) -> None:
        """An error beside a thread or task that is connecting: the app handles that error; the other one is refused."""
        siblings: list[Sibling] = []

        def work(session: Any) -> None:
            siblings.append(sibling := Sibling(session, app.sync_engine))
            state = session._unit_of_work.transaction
            sibling.let_go_once(lambda: state.late is not None)

        reply = app.request(Act(work, error=HandledError()))
        if app.answers_failed_commits:
            assert (reply.status, reply.json) == (200, {"rows": 0})
        else:  # a plain app has no handlers
            assert reply.status == 500
        assert siblings[0].ended.wait(10)
        assert isinstance(siblings[0].error, ScopeClosedError)
        assert app.store.names() == []

    def test_a_success_beside_a_connection_that_is_being_taken(self, app: Harness) -> None:
        """Half of the work is not committed: that is concurrent use, and no success."""
        siblings: list[Sibling] = []

        def work(session: Any) -> None:
            session.add(Parent(name="half"))
            siblings.append(sibling := Sibling(session, app.sync_engine))
            state = session._unit_of_work.transaction
            sibling.let_go_once(lambda: state.late is not None)

        assert app.request(Act(work)).status == 500
        assert siblings[0].ended.wait(10)
        assert isinstance(siblings[0].error, ScopeClosedError)
        assert app.store.names() == []

    def test_a_connection_that_arrives_after_the_end(self, app: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is discarded where it arrives, and whoever was taking it is refused."""
        monkeypatch.setattr("session_plugin.scope.lifecycle.LONGEST_WAIT", 0.02)
        siblings: list[Sibling] = []

        def work(session: Any) -> None:
            siblings.append(sibling := Sibling(session, app.sync_engine))
            unit = session._unit_of_work
            sibling.let_go_once(lambda: unit.closed and not unit.in_transaction)

        assert app.request(Act(work, error=KeyError("not handled"))).status == 500
        assert siblings[0].ended.wait(10)
        assert isinstance(siblings[0].error, ScopeClosedError)
        assert app.store.names() == []

    # -- 3: a success response means that the data is committed ------------------------------------

    def test_success_is_durable(self, app: Harness) -> None:
        """The data of a request is committed when the client receives a success response."""
        assert app.request(Act(add("tea"))).status == 201
        assert app.store.names() == ["tea"]

    def test_failed_flush_is_an_error_response(self, app: Harness) -> None:
        """A flush that violates a constraint at the end of the request leads to an error response."""
        app.request(Act(add("tea")))
        reply = app.request(Act(add("tea")))
        self.assert_refused(app, reply, IntegrityError)
        assert app.store.names() == ["tea"]

    def test_failed_commit_is_an_error_response(self, app: Harness) -> None:
        """A failed COMMIT rolls back, and the client receives the error handler's response."""

        def work(session: Session) -> None:
            insert("tea")(session)
            add_orphan(session)

        reply = app.request(Act(work, background=insert("never")))
        self.assert_refused(app, reply, app.store.commit_error)
        assert app.store.names() == []

    def test_rows_of_a_failed_commit_do_not_reappear(self, app: Harness) -> None:
        """After a failed commit, no later request sees its rows, whichever pooled connection it uses."""
        app.request(Act(add_orphan))
        for _ in range(6):
            assert app.request(Act(lambda session: session.merge(Parent(name="nobody")))).status == 201
        assert app.store.names() == ["nobody"]

    def test_failed_commit_before_a_stream_sends_no_chunk(self, app: Harness) -> None:
        """If the commit before a stream fails, the client receives the error response and no part of the stream."""
        reply = app.request(Act(add_orphan, stream=[insert("late")]))
        self.assert_refused(app, reply, app.store.commit_error)
        assert app.store.names() == []

    def assert_refused(self, app: Harness, reply: Any, error: type[Exception]) -> None:
        if app.answers_failed_commits:
            assert (reply.status, reply.json["handled"]) == (409, error.__name__)
        else:
            assert reply.status == 500

    # -- 4: no success response for a transaction that was not committed ---------------------------

    def test_swallowed_error_of_an_aborted_transaction_is_no_success(self, app: Harness) -> None:
        """A request that swallows an error which aborted its transaction does not receive a success response."""
        insert_twice = insert_and_swallow_an_error(app)
        reply = app.request(Act(insert_twice))
        if app.store.backend in ("sqlite", "mariadb"):  # their transactions survive a failed statement
            assert (reply.status, app.store.names()) == (201, ["tea"])
        else:
            assert (reply.status, app.store.names()) == (500, [])

    def test_explicit_commit_of_an_aborted_transaction_raises(self, app: Harness) -> None:
        """commit() called by the user's code raises if the server has aborted the transaction."""
        insert_twice = insert_and_swallow_an_error(app)

        def work(session: Session) -> None:
            insert_twice(session)
            session.commit()

        reply = app.request(Act(work))
        assert (reply.status == 201) == (app.store.names() == ["tea"])

    def test_recovered_savepoint_commits(self, app: Harness) -> None:
        """An error inside a savepoint that was rolled back does not prevent the commit."""

        def work(session: Session) -> None:
            insert("tea")(session)
            with pytest.raises(IntegrityError), session.begin_nested():
                session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

        assert app.request(Act(work)).status == 201
        assert app.store.names() == ["tea"]

    # -- 5: roll back ----------------------------------------------------------------------------

    def test_unhandled_exception_rolls_back(self, app: Harness) -> None:
        """An unhandled exception leads to a 500 response, and nothing is written."""
        assert app.request(Act(insert("tea"), error=RuntimeError("boom"))).status == 500
        assert app.store.names() == []

    def test_handled_exception_rolls_back(self, app: Harness) -> None:
        """An exception that the app turns into an error response rolls back."""
        assert app.request(Act(insert("tea"), error=ConflictError())).status == 409
        assert app.store.names() == []

    def test_exception_handled_as_a_success_rolls_back(self, app: Harness) -> None:
        """An exception rolls back even if its error handler returns a 200 response."""
        reply = app.request(Act(insert("tea"), error=HandledError()))
        if app.answers_failed_commits:
            assert (reply.status, reply.json) == (200, {"rows": 0})
        else:  # a plain app has no error handlers
            assert reply.status == 500
        assert app.store.names() == []

    @pytest.mark.parametrize("status", [400, 404, 500, 503])
    def test_returned_error_rolls_back(self, app: Harness, status: int) -> None:
        """A response with a status of 400 or more rolls back, even if no exception was raised."""
        assert app.request(Act(insert("tea"), status=status)).status == status
        assert app.store.names() == []

    @pytest.mark.parametrize("status", [200, 204, 303])
    def test_returned_success_commits(self, app: Harness, status: int) -> None:
        """A response with a status below 400 commits."""
        assert app.request(Act(insert("tea"), status=status)).status == status
        assert app.store.names() == ["tea"]

    def test_raised_redirect_commits(self, app: Harness) -> None:
        """A raised exception that is itself a response with a status below 400 commits."""
        assert app.request(Act(insert("tea"), redirect=True)).status == 302
        assert app.store.names() == ["tea"]

    def test_failed_commit_of_a_raised_redirect_is_an_error_response(self, app: Harness) -> None:
        """If the commit of a raised redirect fails, the client receives the error response, not the redirect."""
        reply = app.request(Act(add_orphan, redirect=True))
        self.assert_refused(app, reply, app.store.commit_error)
        assert app.store.names() == []

    def test_doomed_scope_rolls_back(self, app: Harness) -> None:
        """doom() rolls back whatever the status of the response is."""

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.doom("dry run")

        assert app.request(Act(work)).status == 201
        assert app.store.names() == []

    def test_explicit_commit_is_kept(self, app: Harness) -> None:
        """Data that the user's code committed stays committed if the request rolls back later."""

        def work(session: Session) -> None:
            insert("kept")(session)
            session.commit()
            insert("lost")(session)

        assert app.request(Act(work, status=400)).status == 400
        assert app.store.names() == ["kept"]

    @pytest.mark.parametrize("replaced", [403, 503, KeyError])
    def test_an_error_response_after_the_commit_is_logged(
        self, app: Harness, replaced: int | type[Exception], caplog: pytest.LogCaptureFixture
    ) -> None:
        """If a middleware makes an error of a success, its work is rolled back, or the log warns that it was not."""
        reply = app.request(Act(insert("tea"), replaced=replaced))
        status = replaced if isinstance(replaced, int) else 500
        assert reply.status == status
        if app.settles_inside_middleware:
            assert app.store.names() == ["tea"]
            (message,) = logged(caplog, "WARNING")
            assert message.startswith(
                f"POST /act: its work was committed under status 201, and the client receives status {status}"
            )
        else:
            assert app.store.names() == []

    def test_only_committed_work_of_a_success_is_logged(self, app: Harness, caplog: pytest.LogCaptureFixture) -> None:
        """Not what was read, rolled back or committed explicitly, nor a success that is replaced by another one."""

        def work(session: Session) -> None:
            insert("kept")(session)
            session.commit()

        app.request(Act(count, replaced=500))
        app.request(Act(insert("lost"), status=404, replaced=500))
        app.request(Act(work, replaced=500))
        app.request(Act(insert("tea"), replaced=202))
        assert app.store.names() == ["kept", "tea"]
        assert logged(caplog, "WARNING") == []

    # -- 7: early release ------------------------------------------------------------------------

    def test_connection_is_released_before_the_body(self, app: Harness) -> None:
        """While a response body is streamed, the request holds no connection, however slow the client is."""
        gate = threading.Event()
        held: list[int] = []

        def wait(session: Session) -> None:
            held.append(app.sync_engine.pool.checkedout())
            gate.wait(5)

        app.act = Act(insert("tea"), status=200, stream=[wait])
        with app.connect() as connection:
            connection.request("POST", "/act")
            response = connection.getresponse()
            assert response.read(5) == b"chunk"
            wait_for(lambda: held)
            gate.set()
            assert response.read() == b""
        assert held == [0]

    def test_released_connections_serve_others(self, app: Harness) -> None:
        """After a query and a release(), more requests than there are connections wait for something else at once."""
        gate, waiting = threading.Event(), []

        def work(session: Session) -> None:
            assert count(session) >= 0
            release(app.db)
            waiting.append(session)
            if len(waiting) == 7:
                gate.set()
            hold(gate)
            assert gate.is_set()
            insert(f"tea {waiting.index(session)}")(session)

        act = Act(work)
        with ThreadPoolExecutor(7) as pool:
            replies = list(pool.map(lambda _: app.request(act), range(7)))
        assert {reply.status for reply in replies} == {201}
        assert len(app.store.names()) == 7

    def test_release_in_a_stream(self, app: Harness) -> None:
        """A stream that reads in batches holds no connection while the client reads one."""
        held: list[int] = []

        def batch(session: Session) -> None:
            assert count(session) == 1
            release(app.db)
            held.append(app.sync_engine.pool.checkedout())

        app.request(Act(insert("tea")))
        reply = app.request(Act(count, status=200, stream=[batch, batch]))
        assert (reply.status, reply.complete, held) == (200, True, [0, 0])

    def test_loaded_objects_are_readable_in_the_stream(self, app: Harness) -> None:
        """A commit by settling does not expire loaded objects, so a stream reads them without a new transaction."""
        read: list[Any] = []
        loaded: list[Parent] = []

        def work(session: Session) -> None:
            insert("tea")(session)
            loaded.extend(session.scalars(select(Parent)))

        def late(session: Session) -> None:
            read.append((loaded[0].name, session.in_transaction()))

        assert app.request(Act(work, stream=[late])).complete
        assert read == [("tea", False)]

    @pytest.mark.parametrize("flushes", [True, False])
    def test_unchanged_rows_are_readable_after_a_rollback(self, flushes: bool, app: Harness) -> None:
        """A rollback that discards work leaves the rows readable that this work did not change."""
        assert app.request(Act(insert("tea"))).status == 201
        read: list[Any] = []
        loaded: list[Parent] = []

        def work(session: Session) -> None:
            loaded.append(session.scalars(select(Parent)).one())
            session.add(Parent(name="coffee"))
            if flushes:
                session.flush()

        def late(session: Session) -> None:
            read.append((loaded[0].name, session.in_transaction()))

        assert app.request(Act(work, status=409, stream=[late])).complete
        assert read == [("tea", False)]
        assert app.store.names() == ["tea"]

    def test_settling_closes_open_results(self, app: Harness) -> None:
        """Settling closes an open yield_per result, so that it cannot read from a connection that was released."""
        results: list[Any] = []
        errors: list[BaseException] = []

        def work(session: Session) -> None:
            session.add_all(Parent(name=f"row {number}") for number in range(50))
            session.flush()
            result = session.scalars(select(Parent).execution_options(yield_per=5))
            next(result)
            results.append(result)

        def late(session: Session) -> None:
            try:
                results[0].all()
            except ResourceClosedError as error:
                errors.append(error)

        app.request(Act(work, stream=[late]))
        assert [type(error) for error in errors] == [ResourceClosedError]

    def test_connection_is_released_before_background_work(self, app: Harness) -> None:
        """When background work starts, the request's connection has been returned to the pool."""
        held: list[int] = []

        def background(session: Session) -> None:
            held.append(app.sync_engine.pool.checkedout())

        act = Act(insert("tea"), background=background)
        assert app.request(act).status == 201
        assert act.done.wait(20)
        assert held == [0]

    # -- 8: a complete stream means that its work is committed -------------------------------------

    def test_work_of_a_complete_stream_is_committed(self, app: Harness) -> None:
        """When the client has received a complete stream, the work that the stream did in the session is committed."""
        reply = app.request(Act(insert("early"), stream=[insert("late"), insert("later")]))
        assert (reply.status, reply.complete, reply.body) == (201, True, b"chunkchunk")
        assert app.store.names() == ["early", "late", "later"]

    def test_failed_commit_cuts_off_the_stream(self, app: Harness) -> None:
        """A stream whose commit fails is cut off, so that the client sees an incomplete response."""
        reply = app.request(Act(insert("early"), stream=[insert("late"), add_orphan]))
        assert not reply.complete
        assert app.store.names() == ["early"]

    def test_exception_in_a_stream_rolls_back(self, app: Harness) -> None:
        """An exception in a stream cuts the stream off and rolls back the stream's work."""

        def boom(session: Session) -> None:
            raise RuntimeError("boom")

        reply = app.request(Act(insert("early"), stream=[insert("late"), boom]))
        assert not reply.complete
        assert app.store.names() == ["early"]

    def test_disconnect_during_a_stream_rolls_back(self, app: Harness) -> None:
        """If the client disconnects during a stream, the stream's work is rolled back."""
        gate = threading.Event()
        finished = threading.Event()

        def wait(session: Session) -> None:
            insert("half")(session)
            hold(gate)

        def finish(session: Session) -> None:
            finished.set()

        app.leave_during(Act(insert("early"), stream=[wait, *[insert(f"n{i}") for i in range(20)], finish]), gate)
        app.settle_down()
        assert app.store.names() == ["early"]

    def test_background_work_has_its_own_transaction(self, app: Harness) -> None:
        """A background task that ends without an error commits its work in a transaction of its own."""
        act = Act(insert("early"), background=insert("late"))
        assert app.request(act).status == 201
        assert act.done.wait(20)
        app.settle_down()
        assert app.store.names() == ["early", "late"]

    @pytest.mark.parametrize("stream", [(), (insert("streamed"),)], ids=["whole", "stream"])
    def test_each_background_callable_is_a_unit_of_work(self, app: Harness, stream: Any) -> None:
        """One that fails keeps what those before it did, and each begins with the connection given back."""
        held: list[int] = []

        def broken(session: Session) -> None:
            held.append(app.sync_engine.pool.checkedout())
            insert("lost")(session)
            raise RuntimeError("boom")

        if app.shows_background_callables:
            act = Act(insert("early"), stream=stream, before=insert("kept"), background=broken)
            assert app.request(act).status == 201
            assert act.done.wait(20)
            app.settle_down()
            assert held == [0]
            assert app.store.names() == ["early", "kept", *(["streamed"] if stream else [])]

    def test_background_callable_that_fails_at_commit(self, app: Harness, caplog: pytest.LogCaptureFixture) -> None:
        """Its own work is lost, which is an error in the log, and counts as an exception of the callable."""
        if app.shows_background_callables:
            act = Act(insert("early"), before=add_orphan, background=insert("never"))
            assert app.request(act).status == 201
            assert wait_for(lambda: errors(caplog))
            app.settle_down()
            assert not act.done.is_set()
            assert app.store.names() == ["early"]
            assert len(errors(caplog)) == 1

    def test_failing_background_work_rolls_back(self, app: Harness, caplog: pytest.LogCaptureFixture) -> None:
        """A failing background task rolls back, leaves the response unchanged, and is logged as an error."""

        def background(session: Session) -> None:
            insert("late")(session)
            raise RuntimeError("boom")

        for broken in (background, add_orphan):
            act = Act(insert(broken.__name__), background=broken)
            assert app.request(act).status == 201
            assert act.done.wait(20)
            app.settle_down()
        assert app.store.names() == ["add_orphan", "background"]
        wait_for(lambda: len(errors(caplog)) == 2)
        assert len(errors(caplog)) == 2

    # -- 9: error handlers can query -------------------------------------------------------------

    def test_error_handlers_can_query(self, app: Harness) -> None:
        """After a failed flush, the error handler can query its session, and the request's work is not saved."""
        app.request(Act(add("tea")))

        def work(session: Session) -> None:
            insert("lost")(session)
            insert("tea")(session)

        reply = app.request(Act(work))
        if app.answers_failed_commits:
            assert (reply.status, reply.json) == (409, {"handled": "IntegrityError", "rows": 1})
        assert app.store.names() == ["tea"]

    # -- 10: hooks -------------------------------------------------------------------------------

    def test_hooks_run_after_the_commit(self, app: Harness) -> None:
        """on_commit hooks run once and in order, after the commit and with no transaction open."""
        log: list[Any] = []

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.on_commit(lambda: log.append(("first", app.store.names(), session.in_transaction())))
            app.db.on_commit(log.append, "second")
            app.db.on_rollback(log.append, "rollback")

        assert app.request(Act(work)).status == 201
        assert log == [("first", ["tea"], False), "second"]

    def test_hooks_of_a_failed_commit_do_not_run(self, app: Harness) -> None:
        """A failed commit runs the on_rollback hooks only."""
        log: list[Any] = []

        def work(session: Session) -> None:
            add_orphan(session)
            app.db.on_commit(log.append, "commit")
            app.db.on_rollback(log.append, "rollback")

        app.request(Act(work))
        assert log == ["rollback"]

    @pytest.mark.parametrize("error", [RuntimeError, Interruption, SystemExit, KeyboardInterrupt])
    def test_failing_hook_is_logged(
        self, app: Harness, caplog: pytest.LogCaptureFixture, error: type[BaseException]
    ) -> None:
        """A hook that fails, by whatever exception, is logged, and affects neither the response nor other hooks."""
        log: list[Any] = []

        def boom() -> None:
            raise error("boom")

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.on_commit(boom)
            app.db.on_commit(log.append, "after")

        assert app.request(Act(work)).status == 201
        assert (log, app.store.names()) == (["after"], ["tea"])
        assert "boom" in [str(record.exc_info[1]) for record in caplog.records if record.exc_info]

    def test_hook_of_an_explicit_commit_is_interrupted(self, app: Harness) -> None:
        """So it is after an explicit commit, and in a hook of a rollback; what was committed stays a success."""
        log: list[Any] = []

        def boom() -> None:
            raise Interruption("boom")

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.on_commit(boom)
            app.db.on_commit(log.append, "committed")
            session.commit()
            insert("milk")(session)
            app.db.on_rollback(boom)
            app.db.on_rollback(log.append, "rolled back")
            session.rollback()

        assert app.request(Act(work)).status == 201
        assert (log, app.store.names()) == (["committed", "rolled back"], ["tea"])

    def test_listener_is_interrupted_after_the_commit(self, app: Harness, caplog: pytest.LogCaptureFixture) -> None:
        """A listener of the user's that SQLAlchemy calls after the COMMIT changes nothing, whatever it raises."""
        log: list[Any] = []

        def boom(session: Session) -> None:
            raise Interruption("boom")

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.on_commit(log.append, "committed")
            event.listen(session, "after_commit", boom)

        assert app.request(Act(work)).status == 201
        assert (log, app.store.names()) == (["committed"], ["tea"])
        assert "boom" in [str(record.exc_info[1]) for record in caplog.records if record.exc_info]

    # -- 11: a closed session cannot be reused -----------------------------------------------------

    def test_closed_session_cannot_be_reused(self, app: Harness) -> None:
        """A session that is used after its request has ended raises `ScopeClosedError`."""
        kept: list[Session] = []
        app.request(Act(lambda session: kept.append(session)))
        assert wait_for(lambda: kept[0]._unit_of_work.closed)
        with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
            kept[0].execute(text("SELECT 1"))

    # -- 1 and 15: one session for each request; waiting requests are served in order --------------

    def test_more_requests_than_connections_are_served(self, app: Harness) -> None:
        """All requests are served when there are several times as many of them as pooled connections."""
        sessions: set[int] = set()
        lock = threading.Lock()

        def work(session: Session) -> None:
            with lock:
                sessions.add(id(session))
            assert session.scalar(select(func.count()).select_from(Parent)) == 0

        act = Act(work)
        with ThreadPoolExecutor(20) as pool:
            replies = list(pool.map(lambda _: app.request(act), range(60)))
        assert {reply.status for reply in replies} == {201}

    def test_endpoint_without_a_session(self, app: Harness) -> None:
        """A request that does not use the database succeeds."""
        assert app.request(Act(use_session=False)).status == 201


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that session_plugin itself has logged at level ERROR."""
    return logged(caplog, "ERROR")


def logged(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    """The messages that session_plugin itself has logged at ``level``."""
    ours = [record for record in caplog.records if record.name == "session_plugin"]
    return [record.getMessage() for record in ours if record.levelname == level]


def insert_and_swallow_an_error(app: Harness) -> Any:
    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    return work


def on(harness_class: type[Harness]) -> Any:
    """Run a contract class on each database that the harness supports."""
    cases = [pytest.param((harness_class, driver), id=driver) for driver in harness_class.drivers]
    return pytest.mark.parametrize("running", cases, indirect=True, scope="class")
