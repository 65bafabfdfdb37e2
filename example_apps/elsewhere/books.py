"""What the apps here share: the ledger's own part, which knows of no framework."""

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy.orm import Session

from session_plugin import AsyncDatabase, Database

from .. import ledger_models as ledger
from ..ledger_models import EQUITY, Base, Transfer

logger = logging.getLogger(__name__)


class DryRunError(Exception):
    """Shows what would be booked.  Its handler answers a success, and nothing may be written."""


def database() -> Database[Session]:
    """The one that ``LEDGER_DATABASE`` names; without it, in memory and forgotten at the end."""
    return Database(os.environ.get("LEDGER_DATABASE", "sqlite://"), metadata=Base.metadata)


def async_database() -> AsyncDatabase[Any]:
    """The same for an async driver."""
    return AsyncDatabase(os.environ.get("LEDGER_DATABASE", "sqlite+aiosqlite://"), metadata=Base.metadata)


def open_books(db: Database[Any]) -> None:
    ledger.enforce_foreign_keys(db.engine)
    db.create_all()
    with db.session_scope() as session:
        ledger.open_books(session)


async def open_books_async(db: AsyncDatabase[Any]) -> None:
    ledger.enforce_foreign_keys(db.engine.sync_engine)
    await db.create_all()
    async with db.session_scope() as session:
        await session.run_sync(ledger.open_books)


def book(session: Session, source: str, target: str, amount: int) -> int:
    """Book a transfer; only COMMIT checks that its accounts exist."""
    transfer = Transfer.between(source, target, amount)
    session.add(transfer)
    session.flush()  # its id, now
    return transfer.id


def book_and_check(session: Session, order: dict[str, Any]) -> tuple[int, bool]:
    """Book, and only then look: the transfer's id, and whether its source can pay."""
    transfer = book(session, order["source"], order["target"], order["amount"])
    if order.get("dry_run"):
        raise DryRunError(f"transfer {transfer}")
    return transfer, session.scalar(ledger.balance(order["source"])) >= 0


def refusal(error: Exception) -> dict[str, str]:
    """What the error handlers answer with a 409; COMMIT may have raised it, after the endpoint had returned."""
    logger.warning("refused: %s", error)
    return {"error": "the database refused it"}


def balances(session: Session) -> dict[str, int]:
    return dict(session.execute(ledger.balances()).all())


def deposit(session: Session, account: str, amount: int) -> str:
    return f"{account},{book(session, EQUITY, account, amount)}\n"


def deposits(session: Session, orders: Iterable[tuple[str, int]]) -> Iterator[str]:
    """One transaction for the whole stream, committed before its last byte."""
    for account, amount in orders:
        yield deposit(session, account, amount)
