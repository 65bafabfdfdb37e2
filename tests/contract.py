"""The promises, each stated once.  Every adapter runs them on every database it serves.

Each test ends with `Harness.settle_down`: nothing checked out of the pool, no transaction open on
the server.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError, ResourceClosedError
from sqlalchemy.orm import Session

from session_plugin import ScopeClosedError

from .harness import Act, ConflictError, HandledError, Harness, Parent, add, add_orphan, hold, insert, wait_for


class Contract:
    """Put `on(SomeHarness)` above a subclass to run it."""

    @pytest.fixture
    def app(self, running: Harness) -> Any:
        running.store.clear()
        running.log.clear()
        yield running
        running.settle_down()

    # -- 2: nothing for nothing ------------------------------------------------------------------

    def test_unused_session_takes_nothing(self, app: Harness) -> None:
        """Asked for but unused: no checkout."""
        taken = []

        def work(session: Session) -> None:
            taken.append(app.sync_engine.pool.checkedout())
            assert not session.in_transaction()

        assert app.request(Act(work)).status == 201
        assert taken == [0]

    # -- 3: truth --------------------------------------------------------------------------------

    def test_success_is_durable(self, app: Harness) -> None:
        """A client that reads a success finds its data."""
        assert app.request(Act(add("tea"))).status == 201
        assert app.store.names() == ["tea"]

    def test_failed_flush_is_told(self, app: Harness) -> None:
        """A constraint that the last flush violates is no success."""
        app.request(Act(add("tea")))
        reply = app.request(Act(add("tea")))
        self.assert_refused(app, reply, IntegrityError)
        assert app.store.names() == ["tea"]

    def test_failed_commit_is_told(self, app: Harness) -> None:
        """A constraint that only COMMIT checks is no success, and the app's own handler answers."""

        def work(session: Session) -> None:
            insert("tea")(session)
            add_orphan(session)

        reply = app.request(Act(work, background=insert("never")))
        self.assert_refused(app, reply, app.store.commit_error)
        assert app.store.names() == []

    def test_failed_commit_does_not_poison_the_pool(self, app: Harness) -> None:
        """The rows of a failed commit are not there for the requests after it, on any connection."""
        app.request(Act(add_orphan))
        for _ in range(6):
            assert app.request(Act(lambda session: session.merge(Parent(name="nobody")))).status == 201
        assert app.store.names() == ["nobody"]

    def test_failed_commit_of_a_stream_sends_nothing_of_it(self, app: Harness) -> None:
        """The endpoint's work is settled before the first byte of a stream."""
        reply = app.request(Act(add_orphan, stream=[insert("late")]))
        self.assert_refused(app, reply, app.store.commit_error)
        assert app.store.names() == []

    def assert_refused(self, app: Harness, reply: Any, error: type[Exception]) -> None:
        if app.answers_failed_commits:
            assert (reply.status, reply.json["handled"]) == (409, error.__name__)
        else:
            assert reply.status == 500

    # -- 4: no phantom commit --------------------------------------------------------------------

    def test_swallowed_error_does_not_pass_as_committed(self, app: Harness) -> None:
        """A transaction that the server has aborted is no success."""
        insert_twice = insert_and_swallow_an_error(app)
        reply = app.request(Act(insert_twice))
        if app.store.backend in ("sqlite", "mariadb"):  # whose transactions survive a failed statement
            assert (reply.status, app.store.names()) == (201, ["tea"])
        else:
            assert (reply.status, app.store.names()) == (500, [])

    def test_explicit_commit_of_an_aborted_transaction_raises(self, app: Harness) -> None:
        """The user's own commit() is no phantom either."""
        insert_twice = insert_and_swallow_an_error(app)

        def work(session: Session) -> None:
            insert_twice(session)
            session.commit()

        reply = app.request(Act(work))
        assert (reply.status == 201) == (app.store.names() == ["tea"])

    def test_recovered_savepoint_commits(self, app: Harness) -> None:
        """An error inside a savepoint that was rolled back forbids nothing."""

        def work(session: Session) -> None:
            insert("tea")(session)
            with pytest.raises(IntegrityError), session.begin_nested():
                session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

        assert app.request(Act(work)).status == 201
        assert app.store.names() == ["tea"]

    # -- 5: roll back ----------------------------------------------------------------------------

    def test_unhandled_exception_rolls_back(self, app: Harness) -> None:
        """An exception that nobody handles is a 500 and writes nothing."""
        assert app.request(Act(insert("tea"), error=RuntimeError("boom"))).status == 500
        assert app.store.names() == []

    def test_handled_exception_rolls_back(self, app: Harness) -> None:
        """An exception that the app answers with an error writes nothing."""
        assert app.request(Act(insert("tea"), error=ConflictError())).status == 409
        assert app.store.names() == []

    def test_exception_handled_as_a_success_rolls_back(self, app: Harness) -> None:
        """An exception rolls back even if its handler answers 200."""
        reply = app.request(Act(insert("tea"), error=HandledError()))
        if app.answers_failed_commits:
            assert (reply.status, reply.json) == (200, {"rows": 0})
        else:  # a plain app has no handlers
            assert reply.status == 500
        assert app.store.names() == []

    @pytest.mark.parametrize("status", [400, 404, 500, 503])
    def test_returned_error_rolls_back(self, app: Harness, status: int) -> None:
        """A status of 400 or more that is returned, not raised, writes nothing."""
        assert app.request(Act(insert("tea"), status=status)).status == status
        assert app.store.names() == []

    @pytest.mark.parametrize("status", [200, 204, 303])
    def test_returned_success_commits(self, app: Harness, status: int) -> None:
        """A status below 400 commits."""
        assert app.request(Act(insert("tea"), status=status)).status == status
        assert app.store.names() == ["tea"]

    def test_raised_redirect_commits(self, app: Harness) -> None:
        """An exception that is itself a response below 400 is a success."""
        assert app.request(Act(insert("tea"), redirect=True)).status == 302
        assert app.store.names() == ["tea"]

    def test_failed_commit_under_a_raised_redirect_is_told(self, app: Harness) -> None:
        """A redirect is no success either if its commit fails."""
        reply = app.request(Act(add_orphan, redirect=True))
        self.assert_refused(app, reply, app.store.commit_error)
        assert app.store.names() == []

    def test_doomed_scope_rolls_back(self, app: Harness) -> None:
        """doom() rolls back whatever the response says."""

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.doom("dry run")

        assert app.request(Act(work)).status == 201
        assert app.store.names() == []

    def test_explicit_commit_stays(self, app: Harness) -> None:
        """What the user's code committed stays committed; the rest rolls back."""

        def work(session: Session) -> None:
            insert("kept")(session)
            session.commit()
            insert("lost")(session)

        assert app.request(Act(work, status=400)).status == 400
        assert app.store.names() == ["kept"]

    # -- 7: early release ------------------------------------------------------------------------

    def test_connection_is_back_before_the_body(self, app: Harness) -> None:
        """Slow readers hold no connection: while streams are open, the whole pool is free."""
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

    def test_loaded_objects_stay_readable_in_the_stream(self, app: Harness) -> None:
        """A settling that commits expires nothing."""
        read: list[Any] = []
        loaded: list[Parent] = []

        def work(session: Session) -> None:
            insert("tea")(session)
            loaded.extend(session.scalars(select(Parent)))

        def late(session: Session) -> None:
            read.append((loaded[0].name, session.in_transaction()))

        assert app.request(Act(work, stream=[late])).complete
        assert read == [("tea", False)]

    def test_result_opened_before_settling_is_closed_by_it(self, app: Harness) -> None:
        """A yield_per result does not go on reading from a connection that was given back."""
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

    def test_connection_is_back_before_background_work(self, app: Harness) -> None:
        """Background work holds no connection that it does not use."""
        held: list[int] = []

        def background(session: Session) -> None:
            held.append(app.sync_engine.pool.checkedout())

        act = Act(insert("tea"), background=background)
        assert app.request(act).status == 201
        assert act.done.wait(20)
        assert held == [0]

    # -- 8: truth to the last byte ---------------------------------------------------------------

    def test_streamed_work_is_durable_at_the_last_byte(self, app: Harness) -> None:
        """A complete stream means that what it did with the session is committed."""
        reply = app.request(Act(insert("early"), stream=[insert("late"), insert("later")]))
        assert (reply.status, reply.complete, reply.body) == (201, True, b"chunkchunk")
        assert app.store.names() == ["early", "late", "later"]

    def test_failing_commit_cuts_the_stream(self, app: Harness) -> None:
        """A stream whose commit fails reaches the client incomplete."""
        reply = app.request(Act(insert("early"), stream=[insert("late"), add_orphan]))
        assert not reply.complete
        assert app.store.names() == ["early"]

    def test_error_in_the_stream_rolls_its_work_back(self, app: Harness) -> None:
        """A stream that an error cuts short keeps nothing of what it did."""

        def boom(session: Session) -> None:
            raise RuntimeError("boom")

        reply = app.request(Act(insert("early"), stream=[insert("late"), boom]))
        assert not reply.complete
        assert app.store.names() == ["early"]

    def test_client_that_leaves_rolls_the_stream_back(self, app: Harness) -> None:
        """A stream whose reader left keeps nothing of what it did."""
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

    def test_background_work_is_a_transaction_of_its_own(self, app: Harness) -> None:
        """What a background task does is committed when it ends well."""
        act = Act(insert("early"), background=insert("late"))
        assert app.request(act).status == 201
        assert act.done.wait(20)
        app.settle_down()
        assert app.store.names() == ["early", "late"]

    def test_failing_background_work_rolls_back(self, app: Harness, caplog: pytest.LogCaptureFixture) -> None:
        """A background task that fails keeps nothing, changes nothing of the response, and is an error in the log."""

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
        """After a failed flush the handler's session works, and nothing from before is saved."""
        app.request(Act(add("tea")))

        def work(session: Session) -> None:
            insert("lost")(session)
            insert("tea")(session)

        reply = app.request(Act(work))
        if app.answers_failed_commits:
            assert (reply.status, reply.json) == (409, {"handled": "IntegrityError", "rows": 1})
        assert app.store.names() == ["tea"]

    # -- 10: hooks -------------------------------------------------------------------------------

    def test_hooks_run_once_the_data_is_durable(self, app: Harness) -> None:
        """on_commit hooks run in order, once, with the data durable and no transaction open."""
        log: list[Any] = []

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.on_commit(lambda: log.append(("first", app.store.names(), session.in_transaction())))
            app.db.on_commit(log.append, "second")
            app.db.on_rollback(log.append, "rollback")

        assert app.request(Act(work)).status == 201
        assert log == [("first", ["tea"], False), "second"]

    def test_hooks_of_a_failed_commit_do_not_run(self, app: Harness) -> None:
        """A failed commit runs the on_rollback hooks, and no other."""
        log: list[Any] = []

        def work(session: Session) -> None:
            add_orphan(session)
            app.db.on_commit(log.append, "commit")
            app.db.on_rollback(log.append, "rollback")

        app.request(Act(work))
        assert log == ["rollback"]

    def test_failing_hook_stops_nothing(self, app: Harness, caplog: pytest.LogCaptureFixture) -> None:
        """A failing hook is logged; the response and the other hooks are as if it had not."""
        log: list[Any] = []

        def boom() -> None:
            raise RuntimeError("boom")

        def work(session: Session) -> None:
            insert("tea")(session)
            app.db.on_commit(boom)
            app.db.on_commit(log.append, "after")

        assert app.request(Act(work)).status == 201
        assert (log, app.store.names()) == (["after"], ["tea"])
        assert "boom" in [str(record.exc_info[1]) for record in caplog.records if record.exc_info]

    # -- 11: after the end, refusal --------------------------------------------------------------

    def test_session_refuses_after_the_end(self, app: Harness) -> None:
        """A session kept beyond its request never silently reopens."""
        kept: list[Session] = []
        app.request(Act(lambda session: kept.append(session)))
        assert wait_for(lambda: kept[0]._unit_of_work.closed)
        with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
            kept[0].execute(text("SELECT 1"))

    # -- 1 and 15: one request, one session; a crowd is served in turn ---------------------------

    def test_crowd_on_a_small_pool_is_served(self, app: Harness) -> None:
        """Four times as many requests as connections: all are served, each in its own session."""
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
        """An endpoint that knows nothing of the database is left alone."""
        assert app.request(Act(use_session=False)).status == 201


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What session_plugin itself has logged as an error."""
    ours = [record for record in caplog.records if record.name == "session_plugin"]
    return [record.getMessage() for record in ours if record.levelname == "ERROR"]


def insert_and_swallow_an_error(app: Harness) -> Any:
    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    return work


def on(harness_class: type[Harness]) -> Any:
    """Runs a contract class on each database that the harness serves."""
    cases = [pytest.param((harness_class, driver), id=driver) for driver in harness_class.drivers]
    return pytest.mark.parametrize("running", cases, indirect=True, scope="class")
