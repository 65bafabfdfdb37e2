"""The ledger that every app here uses: accounts, and transfers whose entries sum to zero.

The amounts are whole cents.  COMMIT checks an entry's account, and no statement before it, so the apps
can show an error that no flush raises.
"""

from sqlalchemy import CheckConstraint, Engine, ForeignKey, Select, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

EQUITY = "equity"
"""The account that deposits come from, so that they are transfers too; only this account may be overdrawn."""


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    name: Mapped[str] = mapped_column(primary_key=True)


def account_reference() -> ForeignKey:
    return ForeignKey("account.name", deferrable=True, initially="DEFERRED")


class Transfer(Base):
    __tablename__ = "transfer"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int] = mapped_column(CheckConstraint("amount > 0"))
    entries: Mapped[list["Entry"]] = relationship()

    @classmethod
    def between(cls, source: str, target: str, amount: int) -> "Transfer":
        entries = [Entry(account_name=source, amount=-amount), Entry(account_name=target, amount=amount)]
        return cls(amount=amount, entries=entries)


class Entry(Base):
    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    transfer_id: Mapped[int] = mapped_column(ForeignKey("transfer.id"))
    account_name: Mapped[str] = mapped_column(account_reference(), index=True)
    amount: Mapped[int]


class Notice(Base):
    """A message to an account's owner, written by a hook or by background work."""

    __tablename__ = "notice"

    id: Mapped[int] = mapped_column(primary_key=True)
    account_name: Mapped[str] = mapped_column(account_reference())
    text: Mapped[str]


def locked(name: str) -> Select[tuple[Account]]:
    """Lock one account, so that two transfers from it cannot both spend its last cent.

    ``key_share`` permits the foreign key checks of transfers into the account, which would
    otherwise deadlock.  SQLite needs no row lock, because its writers take turns, and gets none.
    """
    return select(Account).where(Account.name == name).with_for_update(key_share=True)


def balance(name: str) -> Select[tuple[int]]:
    return select(func.coalesce(func.sum(Entry.amount), 0)).where(Entry.account_name == name)


def balances() -> Select[tuple[str, int]]:
    total = func.coalesce(func.sum(Entry.amount), 0)
    return select(Account.name, total).outerjoin(Entry).group_by(Account.name).order_by(Account.name)


def journal() -> Select[tuple[int, str, int]]:
    return select(Entry.transfer_id, Entry.account_name, Entry.amount).order_by(Entry.id)


def open_books(session: Session) -> None:
    if session.get(Account, EQUITY) is None:
        session.add(Account(name=EQUITY))


def enforce_foreign_keys(engine: Engine) -> None:
    """Turn on foreign key checks, which SQLite makes only on connections that request them."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def ask(dbapi_connection, connection_record):
            cursor = dbapi_connection.cursor()
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.execute("PRAGMA journal_mode = WAL")  # readers and a writer do not block each other
            cursor.close()
