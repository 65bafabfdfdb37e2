"""A two-phase commit that fails says, for each engine, what is prepared there and what became of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from session_plugin import AsyncDatabase, Database

from .harness import Base, Child, Parent, add_orphan, insert, wait_for
from .proxy import Proxy
from .test_unknown_outcome import errors_in, notes_of, register_hooks
from .units import Units, on

STEM = re.compile(r"session_plugin-\d{8}T\d{6}Z-[0-9a-f]{12}-(\d+)-(\d+)")


class Banks:
    """A database with two engines, each behind a proxy of its own; ``a`` and ``b`` look at them from outside."""

    def __init__(self, server: Any, driver: str) -> None:
        names = [server.new_database() for _ in range(2)]
        self.proxies = [Proxy(server.url(driver, name)) for name in names]
        self.db = Database(
            {"default": self.proxies[0].url, "other": self.proxies[1].url},
            binds={Child: "other"},
            metadata=Base.metadata,
            twophase=True,
        )
        self.a, self.b = (create_engine(server.admin_url(name), poolclass=NullPool) for name in names)
        for engine in (self.a, self.b):
            Base.metadata.create_all(engine)
        self.names = names

    def work(self, session: Session) -> None:
        insert("tea")(session)
        connection = session.connection(bind_arguments={"mapper": Child.__mapper__})
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET session_replication_role = replica")
        session.add(Child(name="cup", parent="saucer"))
        session.flush()

    def prepared(self) -> list[str]:
        """Return the ids of prepared transactions of both, and roll them back."""
        found = []
        for engine in (self.a, self.b):
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if engine.dialect.name == "postgresql":
                    ids = connection.scalars(
                        text("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
                    ).all()
                    end = "ROLLBACK PREPARED '{}'"
                else:
                    ids = [text_of(row.data) for row in connection.exec_driver_sql("XA RECOVER")]
                    end = "XA ROLLBACK '{}'"
                for each in ids:
                    connection.exec_driver_sql(end.format(each))
                found += ids
        return sorted(found)

    def rows(self) -> list[bool]:
        with self.a.connect() as a, self.b.connect() as b:
            return [
                bool(connection.scalar(text(f"SELECT count(*) FROM {table}")))
                for connection, table in ((a, "parent"), (b, "child"))
            ]

    def close(self) -> None:
        self.db.dispose()
        for proxy in self.proxies:
            proxy.close()


@pytest.fixture(params=["postgresql+psycopg", "postgresql+psycopg2", "mariadb+pymysql"])
def banks(request: pytest.FixtureRequest) -> Iterator[Banks]:
    backend, driver = request.param.split("+")
    banks = Banks(request.getfixturevalue(backend), driver)
    yield banks
    banks.prepared()
    banks.close()


def text_of(data: Any) -> str:
    """MariaDB returns the ids as bytes."""
    return data.decode() if isinstance(data, bytes) else str(data)


def states_in(said: str) -> dict[str, tuple[str, str]]:
    """Return, by database, what is said of its state and of its prepared id."""
    return {
        name: (state, xid)
        for name, state, xid in re.findall(r"/(\w+): ([a-z ]+) \(prepared transaction '([^']+)'\)", said)
    }


def test_a_lost_second_phase_names_what_is_left(banks: Banks, caplog: pytest.LogCaptureFixture) -> None:
    """Each engine, its prepared id and its true state are in the note and in an ERROR; the ids share a stem."""
    with pytest.raises(DBAPIError) as caught, banks.db.session_scope() as session:
        banks.work(session)
        ran = register_hooks(banks.db)
        banks.proxies[1].lose_answer_to(b"COMMIT")
    assert ran == ["unknown"]
    [message] = errors_in(caplog)
    for said in (message, notes_of(caught.value)):
        assert "twophase=True" not in said
        states = states_in(said)
        assert set(states) == set(banks.names)
        [first, second] = (STEM.fullmatch(states[name][1]) for name in banks.names)
        assert first is not None and second is not None
        assert first.string.rpartition("-")[0] == second.string.rpartition("-")[0]
        assert first.string != second.string
        assert states[banks.names[1]][0] == "committed or still prepared"
    wait_for(lambda: banks.rows()[1])
    prepared = banks.prepared()
    state, xid = states_in(message)[banks.names[0]]
    if state == "committed":
        assert (prepared, banks.rows()) == ([], [True, True])
    else:  # it was left for the operator, since the other one may have been committed
        assert state == "prepared"
        assert prepared == [xid]


def test_a_lost_second_phase_leaves_the_other_one_prepared(banks: Banks, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever engine comes first may have committed, so the other one is not rolled back: an operator decides."""
    with pytest.raises(DBAPIError), banks.db.session_scope() as session:
        banks.work(session)
        for proxy in banks.proxies:
            proxy.lose_answer_to(b"COMMIT")
    [message] = errors_in(caplog)
    states = states_in(message)
    assert sorted(state for state, _ in states.values()) == ["committed or still prepared", "prepared"]
    assert wait_for(lambda: sorted(banks.rows()) == [False, True])
    [left] = [xid for state, xid in states.values() if state == "prepared"]
    assert banks.prepared() == [left]


def test_a_lost_first_phase_commits_nothing(banks: Banks, caplog: pytest.LogCaptureFixture) -> None:
    """What may be left prepared is named, and no COMMIT is claimed."""
    with pytest.raises(DBAPIError) as caught, banks.db.session_scope() as session:
        banks.work(session)
        ran = register_hooks(banks.db)
        banks.proxies[1].lose_answer_to(b"PREPARE")
    assert ran == ["rollback"]
    assert banks.rows() == [False, False]
    [message] = errors_in(caplog)
    assert "a prepared transaction may be left" in message
    for said in (message, notes_of(caught.value)):
        assert "committed or" not in said
        assert ": committed" not in said
        states = states_in(said)
        assert states[banks.names[1]][0] == "perhaps prepared"
        assert states.get(banks.names[0], ("rolled back", ""))[0] == "rolled back"
    left = [states_in(message)[banks.names[1]][1]]
    assert wait_for(lambda: banks.prepared() == left)


def test_a_refused_first_phase_leaves_nothing(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What was prepared before it is rolled back, and the note says so; there is nothing for an operator to do."""
    banks = Banks(postgresql, "psycopg")
    seen = set()
    for _ in range(40):
        with pytest.raises(IntegrityError) as caught, banks.db.session_scope() as session:
            insert("tea")(session)
            add_orphan(session)
            ran = register_hooks(banks.db)
        assert ran == ["rollback"]
        said = notes_of(caught.value)
        assert "twophase=True" not in said
        assert ": committed" not in said
        states = states_in(said)
        assert {state for state, _ in states.values()} == {"rolled back"}
        seen.add(len(states))
        if seen == {1, 2}:
            break
    assert seen == {1, 2}
    assert errors_in(caplog) == []
    assert banks.prepared() == []
    assert banks.rows() == [False, False]
    banks.close()


def test_a_prepared_transaction_that_cannot_be_rolled_back(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The connection to the one that is prepared is lost while the other one refuses."""
    banks = Banks(postgresql, "psycopg")
    for _ in range(40):
        with pytest.raises((IntegrityError, DBAPIError)) as caught, banks.db.session_scope() as session:
            insert("tea")(session)
            add_orphan(session)
            banks.proxies[0].lose_answer_to(b"ROLLBACK PREPARED")
        if errors_in(caplog):
            break
    [message] = errors_in(caplog)
    assert states_in(message)[banks.names[0]][0] == "perhaps prepared"
    assert isinstance(caught.value, DBAPIError)
    banks.close()


def test_the_ids_of_one_unit_of_work(postgresql: Any) -> None:
    """Transactions of one unit of work are counted, and so are the engines of each; a Core id is SQLAlchemy's own."""
    banks = Banks(postgresql, "psycopg")
    ids: list[str] = []
    for engine in banks.db.engines.values():
        event.listen(engine, "begin_twophase", lambda connection, xid: ids.append(xid))
    with banks.db.session_scope() as session:
        banks.work(session)
        session.commit()
        session.get(Parent, "tea")
    with banks.db.engine.connect() as connection, connection.begin_twophase():
        pass
    matched = [STEM.fullmatch(each) for each in ids]
    assert [match and match.groups() for match in matched] == [("1", "1"), ("1", "2"), ("2", "1"), None]
    assert len({each[: each.rindex("-", 0, each.rindex("-"))] for each in ids[:3]}) == 1
    assert all(len(each) <= 64 for each in ids)  # MySQL's limit
    banks.close()


def test_an_async_session(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It has ids of the same kind; its second phase is lost at whichever engine comes first."""
    names = [postgresql.new_database() for _ in range(2)]
    urls = [postgresql.url("asyncpg", name) for name in names]
    proxy = Proxy(urls[1])
    for name in names:
        engine = create_engine(postgresql.admin_url(name), poolclass=NullPool)
        Base.metadata.create_all(engine)

    async def work() -> None:
        db = AsyncDatabase({"default": urls[0], "other": proxy.url}, binds={Child: "other"}, twophase=True)
        with pytest.raises(DBAPIError) as caught:
            async with db.session_scope() as session:
                await session.run_sync(insert("tea"))
                connection = await session.connection(bind_arguments={"mapper": Child.__mapper__})
                await connection.exec_driver_sql("SET session_replication_role = replica")
                session.add(Child(name="cup", parent="saucer"))
                await session.flush()
                ran = register_hooks(db)
                proxy.lose_answer_to(b"COMMIT")
        assert ran == ["unknown"]
        states = states_in(notes_of(caught.value))
        assert set(states) == set(names)
        assert all(STEM.fullmatch(xid) for _, xid in states.values())
        await db.dispose()

    asyncio.run(work())
    with postgresql.admin.connect() as connection:
        ids = connection.scalars(text("SELECT gid FROM pg_prepared_xacts")).all()
    for name in names:
        engine = create_engine(postgresql.admin_url(name), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for xid in connection.scalars(
                text("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
            ).all():
                assert xid in ids
                connection.exec_driver_sql(f"ROLLBACK PREPARED '{xid}'")
    proxy.close()


@on("postgresql+psycopg")
def test_two_phases_without_a_session(units: Units) -> None:
    """A Core connection has no guard."""
    with units.db.engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
        transaction.prepare()
        transaction.rollback()
    assert units.store.names() == []
