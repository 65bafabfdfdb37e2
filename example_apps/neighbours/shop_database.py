"""The database of the shop, which its web app and its workers share.  It imports no web framework."""

import os

from sqlalchemy import func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from session_plugin import Database


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(unique=True)
    packed: Mapped[int] = mapped_column(default=0)
    """How many times it was packed."""
    packed_by: Mapped[int | None]
    """The database server's process that served the connection on which it was packed."""


class Attempt(Base):
    """A row that is kept whether or not the task that wrote it succeeds."""

    __tablename__ = "attempts"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]


db = Database(os.environ["SHOP_DATABASE"], metadata=Base.metadata)


class OutOfTapeError(Exception):
    """An error after which the task can be retried."""


def pack(order_id: int) -> None:
    """Pack an order: one task is one unit of work."""
    with db.session_scope() as session:
        order = session.get_one(Order, order_id)
        order.packed += 1
        order.packed_by = session.scalar(func.pg_backend_pid())
        session.flush()
        with db.session_scope(new=True) as log:
            log.add(Attempt(order_id=order_id))
            log.flush()
            attempts = log.query(Attempt).filter_by(order_id=order_id).count()
        if order.item == "fragile" and attempts < 3:
            raise OutOfTapeError
