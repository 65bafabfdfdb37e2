"""Which rows stay readable after a rollback that discards work, and which are expired."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import ForeignKey, String, inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    attribute_keyed_dict,
    deferred,
    mapped_column,
    relationship,
    selectinload,
)

from session_plugin import Outcome
from session_plugin.scope import rows

from .drivers import SYNC
from .units import Units, on

FAILED = Outcome(status=409)
Work = Callable[[Session], Any]


class Base(DeclarativeBase):
    pass


class Team(Base):
    __tablename__ = "rows_team"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(50))
    users: Mapped[list[User]] = relationship(back_populates="team")


class User(Base):
    __tablename__ = "rows_user"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    about: Mapped[str | None] = deferred(mapped_column(String(50)))
    team_id: Mapped[int | None] = mapped_column(ForeignKey("rows_team.id"))
    team: Mapped[Team | None] = relationship(back_populates="users")
    notes: Mapped[dict[str, Note]] = relationship(collection_class=attribute_keyed_dict("body"), back_populates="user")


class Note(Base):
    __tablename__ = "rows_note"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    body: Mapped[str] = mapped_column(String(50))
    user_id: Mapped[int] = mapped_column(ForeignKey("rows_user.id"))
    user: Mapped[User] = relationship(back_populates="notes")


@pytest.fixture
def stored(units: Units) -> Iterator[Units]:
    """Two users of one team, and one without; the first one has a note."""
    engine = units.store.engine
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
        team = Team(id=1, name="red")
        session.add_all([User(id=1, name="ann", about="a", team=team), User(id=2, name="bob", team=team)])
        session.flush()
        session.add_all([Note(id=1, body="hello", user_id=1), User(id=3, name="joe")])
    yield units


def load(session: Session, ident: int = 1) -> User:
    options = selectinload(User.team).selectinload(Team.users), selectinload(User.notes)
    return session.scalars(select(User).where(User.id == ident).options(*options)).one()


def add_user(session: Session) -> None:
    session.add(User(id=4, name="new"))
    session.flush()


def roll_back(units: Units, work: Work) -> tuple[Any, bool]:
    """Load a user, do ``work``, settle as failed; return the user's values, or None, and if it is attached."""
    found: list[Any] = []

    def steps(session: Session) -> None:
        user = load(session)
        found.append(user)
        work(session)

    def look(session: Session) -> tuple[Any, bool]:
        user = found[0]
        values = dict(inspect(user).dict)
        assert ("name" in values) is ("team_id" in values)
        return values if "name" in values else None, user in session

    if not units.is_async:
        with units.db.session_scope() as session:
            steps(session)
            units.db.scope.settle(FAILED)
            return look(session)

    async def run() -> tuple[Any, bool]:
        async with units.db.session_scope() as session:
            await session.run_sync(steps)
            await units.db.scope.asettle(FAILED)
            return look(session.sync_session)

    result: tuple[Any, bool] = units.runner.run(run())
    return result


def flush_that_fails(session: Session) -> None:
    session.add(User(id=5, name="bob"))
    with pytest.raises(IntegrityError):
        session.flush()


def pending(session: Session) -> None:
    session.add(User(id=4, name="new"))


def changed_elsewhere(session: Session) -> None:
    load(session, 3).name = "eve"
    session.flush()


def statement(session: Session) -> None:
    session.execute(text("UPDATE rows_user SET name = 'eve' WHERE id = 1"))


def write_and_read(session: Session) -> None:
    add_user(session)
    session.scalars(select(User)).all()


def driver(session: Session) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute("UPDATE rows_user SET name = 'eve' WHERE id = 1")
    cursor.close()


UNTOUCHED = [add_user, pending, flush_that_fails, changed_elsewhere, statement, write_and_read, driver]


@pytest.mark.parametrize("work", UNTOUCHED)
def test_a_row_that_was_not_changed_stays_loaded(work: Work, stored: Units) -> None:
    """A row that was read before the first write stays loaded, with its relationships, whatever else was written."""
    values, attached = roll_back(stored, work)
    assert attached
    assert values is not None and (values["name"], values["team"].name) == ("ann", "red")
    assert [user.id for user in values["team"].users] == [1, 2]
    assert {key: note.body for key, note in values["notes"].items()} == {"hello": "hello"}


def change(session: Session) -> None:
    load(session).name = "eve"


def change_and_flush(session: Session) -> None:
    change(session)
    session.flush()


def change_after_a_write(session: Session) -> None:
    add_user(session)
    change_and_flush(session)


def change_and_fail(session: Session) -> None:
    change(session)
    flush_that_fails(session)


def delete(session: Session) -> None:
    session.execute(text("DELETE FROM rows_note"))
    session.delete(load(session))


def delete_and_flush(session: Session) -> None:
    session.delete(load(session).notes["hello"])
    session.delete(load(session))
    session.flush()


def refresh_after_a_write(session: Session) -> None:
    statement(session)
    session.refresh(load(session))


def refresh_after_a_raw_write(session: Session) -> None:
    driver(session)
    session.refresh(load(session))
    pending(session)
    session.flush()


def expunge(session: Session) -> None:
    add_user(session)
    session.expire(load(session))


CHANGED = [
    change,
    change_and_flush,
    change_after_a_write,
    change_and_fail,
    delete,
    delete_and_flush,
    refresh_after_a_write,
    refresh_after_a_raw_write,
    expunge,
]


@pytest.mark.parametrize("work", CHANGED)
def test_a_row_that_was_changed_or_read_anew_is_expired(work: Work, stored: Units) -> None:
    """No value that was rolled back can be read: what was changed, deleted or read after a write is expired."""
    assert roll_back(stored, work) == (None, True)


def attach_note(session: Session) -> None:
    session.add(Note(id=2, body="two", user=load(session)))
    session.flush()


def attach_note_after_a_write(session: Session) -> None:
    add_user(session)
    attach_note(session)


def attach_pending_note(session: Session) -> None:
    session.add(Note(id=2, body="two", user=load(session)))


def load_notes_after_a_write(session: Session) -> None:
    session.expire(load(session), ["notes"])
    session.add(Note(id=2, body="two", user_id=1))
    session.flush()
    assert set(load(session).notes) == {"hello", "two"}


def change_note_after_a_write(session: Session) -> None:
    add_user(session)
    load(session).notes["hello"].body = "bye"
    session.flush()


@pytest.mark.parametrize(
    "work",
    [attach_note, attach_note_after_a_write, attach_pending_note, load_notes_after_a_write, change_note_after_a_write],
)
def test_a_collection_that_was_changed_is_expired_alone(work: Work, stored: Units) -> None:
    """A row stays loaded if only a collection of it was changed or read after a write; the collection is expired."""
    values, attached = roll_back(stored, work)
    assert attached and values is not None
    assert values["name"] == "ann"
    assert "notes" not in values


@on("sqlite+pysqlite")
def test_what_is_beside_a_change_stays_loaded(stored: Units) -> None:
    """A row that was loaded after one that is expired, and a relationship after one that was not loaded."""
    with stored.db.session_scope() as session:
        changed = load(session)
        user = session.scalars(select(User).where(User.id == 3).options(selectinload(User.notes))).one()
        add_user(session)
        changed.name = "eve"
        session.flush()
        stored.db.scope.settle(FAILED)
        assert "name" not in inspect(changed).dict
        values = inspect(user).dict
        assert (values["name"], values["notes"]) == ("joe", {})
        assert "team" not in values


@on(*SYNC)
def test_what_was_expired_alone_is_loaded_at_its_next_use(stored: Units) -> None:
    """What a row lacks after the rollback is loaded as it is in the database."""
    with stored.db.session_scope() as session:
        user = load(session)
        attach_note(session)
        stored.db.scope.settle(FAILED)
        assert not session.in_transaction()
        assert (user.name, [*user.notes], user.about) == ("ann", ["hello"], "a")


def test_a_column_that_was_loaded_after_a_write_is_expired_alone(stored: Units) -> None:
    """A deferred column that was read after a write is expired, and the rest of its row is not."""

    def work(session: Session) -> None:
        session.execute(text("UPDATE rows_user SET about = 'b'"))
        assert load(session).about == "b"

    values, _ = roll_back(stored, work)
    assert values is not None and values["name"] == "ann"
    assert "about" not in values


def test_a_row_that_was_read_after_a_write_is_expired(stored: Units) -> None:
    """A row that was read after the first write may hold values that are rolled back."""
    found: list[Any] = []

    def work(session: Session) -> None:
        statement(session)
        session.expunge_all()
        found.append(load(session))

    roll_back(stored, work)
    assert "name" in inspect(found[0]).expired_attributes


def test_rows_that_are_no_longer_in_the_session_are_left_alone(stored: Units) -> None:
    """A row that was expunged, or garbage-collected, after the first write is not touched."""
    found: list[Any] = []

    def work(session: Session) -> None:
        load(session, 2)
        add_user(session)
        found.append(load(session))
        session.expunge(found[0])
        gc.collect()

    values, attached = roll_back(stored, work)
    assert not attached and values["name"] == "ann"


def test_a_rollback_of_the_user_expires_all_rows(stored: Units) -> None:
    """An explicit ``rollback()`` expires every row, as in SQLAlchemy, also after a flush that failed."""

    def work(session: Session) -> None:
        user = load(session)
        flush_that_fails(session)
        session.rollback()
        assert "name" in inspect(user).expired_attributes
        user = load(session)
        add_user(session)
        session.rollback()
        assert "name" in inspect(user).expired_attributes

    stored.run(work)


def test_a_savepoint_keeps_what_was_read_before_it(stored: Units) -> None:
    """After a savepoint was rolled back too, the rows that were read before the first write stay loaded."""

    def work(session: Session) -> None:
        with pytest.raises(LookupError), session.begin_nested():
            add_user(session)
            raise LookupError
        add_user(session)

    values, _ = roll_back(stored, work)
    assert values is not None and values["name"] == "ann"


def test_hooks_of_a_rollback_can_read_the_rows(stored: Units) -> None:
    """An ``on_rollback`` hook reads a row that was not changed."""
    read: list[str] = []

    def work(session: Session) -> None:
        user = load(session)
        stored.db.on_rollback(lambda: read.append(user.name))
        add_user(session)

    roll_back(stored, work)
    assert read == ["ann"]


def test_very_many_rows_are_not_remembered(stored: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of work that has loaded very many rows does not hold their values twice; all of them are expired."""
    monkeypatch.setattr(rows, "MANY_ROWS", 2)
    assert roll_back(stored, add_user) == (None, True)
