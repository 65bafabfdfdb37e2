"""The table and the endpoints that every contender serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from sqlalchemy import Connection, create_engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import StaticPool

HELLO = {"hello": "world"}
ENDPOINTS = {
    "bare": ("GET", "/bare"),
    "declared": ("GET", "/declared"),
    "read": ("GET", "/items/1"),
    "write": ("POST", "/items/tea"),
}
"""The method and the path of each endpoint; slow clients read ``/stream/1`` in addition."""

ANSWERS = {"bare": b'{"hello":"world"}', "declared": b'{"hello":"world"}', "read": b'{"id":1,"name":"honey"}'}
"""The expected body of each endpoint, without spaces; that of a write contains the new id."""

CHUNK = b"x" * 65_536
CHUNKS = 256
"""More than the kernel buffers for a client that does not read, which is up to 4 MB on Linux."""


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def chunks() -> Iterator[bytes]:
    """A body of 16 MB that does not use the database."""
    for _ in range(CHUNKS):
        yield CHUNK


async def async_chunks() -> AsyncIterator[bytes]:
    for chunk in chunks():
        yield chunk


def engine_options(url: str, **options: object) -> dict[str, object]:
    """The options of every contender's engine: a pool of 5, or the single connection of SQLite in memory."""
    if url.startswith("sqlite"):
        return {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    return {"pool_size": 5, "max_overflow": 0, "pool_timeout": 30, **options}


def fill(connection: Connection) -> None:
    """Create the table and its first row."""
    Base.metadata.create_all(connection)
    connection.execute(insert(Item).values(name="honey"))


def fill_database(url: str) -> None:
    """`fill` the database on a server."""
    engine = create_engine(url)
    with engine.begin() as connection:
        fill(connection)
    engine.dispose()
