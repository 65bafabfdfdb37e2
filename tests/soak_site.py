"""The bank that `soak.py` puts under load: transfers between accounts, one endpoint variant for each kind of request.

A transfer writes three rows: two balances and an entry.  Other transactions see all of them or none.
"""

import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from sqlalchemy import ForeignKey, func, select, text, update
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from session_plugin import commit_on_success

SITE = "SESSION_PLUGIN_SOAK_SITE"
DATABASE = "SESSION_PLUGIN_SOAK_DATABASE"
"""The names of the environment variables that choose the site and its database."""

POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 10}
ACCOUNTS = 20
NOBODY = -1
SERIALIZABLE = replace(commit_on_success, name="serializable", isolation_level="SERIALIZABLE")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Entry(Base):
    """One transfer; the existence of its accounts is checked by COMMIT only."""

    __tablename__ = "entry"
    token: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[int] = mapped_column(ForeignKey(Account.id, deferrable=True, initially="DEFERRED"))
    target: Mapped[int] = mapped_column(ForeignKey(Account.id, deferrable=True, initially="DEFERRED"))
    amount: Mapped[int]


class FailedError(Exception):
    """An exception without an error handler."""


class HandledError(Exception):
    """The site's error handler returns a 200 response."""


@dataclass(frozen=True)
class Transfer:
    """The transfer that a request asks for; the client chooses its token."""

    token: str
    source: int
    target: int
    amount: int

    def of(self, part: str) -> "Transfer":
        """A transfer with the same values for another part of the request."""
        return replace(self, token=f"{self.token} {part}")


def transfer(session: Session, wanted: Transfer) -> None:
    """Move the amount; the pauses let other transactions run in between, which must not see part of it."""
    for account, amount in ((wanted.source, -wanted.amount), (wanted.target, wanted.amount)):
        session.execute(update(Account).filter_by(id=account).values(balance=Account.balance + amount))
        session.execute(select(func.pg_sleep(random.random() / 200)))
    session.add(Entry(**vars(wanted)))


def work(session: Session, kind: str, wanted: Transfer) -> None:
    """Do the work that a kind of request does before its response."""
    if kind == "look":
        session.scalar(select(func.sum(Account.balance)))
        return
    if kind == "serializable":
        session.scalar(select(func.sum(Account.balance)))
    transfer(session, wanted)
    if kind == "orphan":
        transfer(session, replace(wanted.of("orphan"), target=NOBODY))
    if kind == "slow":
        session.execute(text("SET LOCAL statement_timeout = 5"))
        session.execute(select(func.pg_sleep(0.05)))
    if kind == "swallowed":
        session.flush()
        try:
            session.execute(text("SELECT 1/0"))
        except DBAPIError:
            pass
    if kind == "raised":
        raise FailedError
    if kind == "handled":
        raise HandledError


KINDS = {
    "transfer": 8, "serializable": 3, "hook": 2, "new": 2, "stream": 3, "background": 3, "refused": 2, "raised": 1,
    "handled": 1, "orphan": 2, "slow": 1, "swallowed": 1, "look": 2,
}  # fmt: skip
"""The kinds of requests, and their relative frequency."""
STATUSES = {"refused": 409}


def status_of(error: Exception) -> int:
    """503 if the connection was lost, because it is then unknown whether a COMMIT succeeded; otherwise 409."""
    lost = isinstance(error, PoolTimeoutError) or getattr(error, "connection_invalidated", False)
    return 503 if lost else 409


def answer(error: Exception) -> dict[str, str]:
    return {"error": repr(error)}


def make_flask() -> Any:
    from flask import Flask, Response, request

    from session_plugin.flask import SessionPlugin

    db = SessionPlugin(os.environ[DATABASE], **POOL)
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/flask/<kind>/<token>")
    def act(kind: str, token: str) -> Any:
        wanted = Transfer(token, *(request.args.get(name, type=int) for name in ("source", "target", "amount")))
        if kind == "serializable":
            db.use(SERIALIZABLE)
        if kind == "new":
            with db.session_scope(new=True) as audit:
                transfer(audit, wanted.of("audit"))
        work(db.session, kind, wanted)
        if kind == "hook":
            db.on_commit(lambda: transfer(db.session, wanted.of("hook")))
        response = Response(chunks(wanted) if kind == "stream" else "done", STATUSES.get(kind, 201))
        if kind == "background":
            response.call_on_close(lambda: transfer(db.session, wanted.of("late")))
        return response

    def chunks(wanted: Transfer) -> Iterator[str]:
        yield "chunk"
        transfer(db.session, wanted.of("late"))
        yield "chunk"

    @app.get("/held")
    def held() -> Any:
        return {"flask": db.engine.pool.checkedout(), "worker": os.getpid()}

    for kind in (DBAPIError, PoolTimeoutError, PendingRollbackError):
        app.register_error_handler(kind, lambda error: (answer(error), status_of(error)))
    app.register_error_handler(HandledError, lambda error: answer(error))
    return app


def make_fastapi() -> Any:
    from fastapi import BackgroundTasks, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    from session_plugin.fastapi import AsyncSessionPlugin, SessionPlugin

    adb = AsyncSessionPlugin(os.environ[DATABASE].replace("+psycopg:", "+asyncpg:"), **POOL)
    db = SessionPlugin(os.environ[DATABASE], **POOL)
    app = FastAPI()
    db.init_app(app)
    adb.init_app(app)
    Wanted = Annotated[Transfer, Depends(Transfer)]

    @app.post("/async/{kind}/{token}")
    async def act(
        kind: str, wanted: Wanted, session: Annotated[AsyncSession, Depends(adb.get_session)], tasks: BackgroundTasks
    ) -> Any:
        async def late(part: str) -> None:
            await adb.session.run_sync(transfer, wanted.of(part))

        async def chunks() -> AsyncIterator[str]:
            yield "chunk"
            await late("late")
            yield "chunk"

        if kind == "serializable":
            adb.use(SERIALIZABLE)
        if kind == "new":
            async with adb.session_scope(new=True) as audit:
                await audit.run_sync(transfer, wanted.of("audit"))
        await session.run_sync(work, kind, wanted)
        if kind == "hook":
            adb.on_commit(late, "hook")
        if kind == "background":
            tasks.add_task(late, "late")
        if kind == "stream":
            return StreamingResponse(chunks(), 201)
        return PlainTextResponse("done", STATUSES.get(kind, 201), background=tasks)

    @app.post("/sync/{kind}/{token}")
    def act_in_thread(
        kind: str, wanted: Wanted, session: Annotated[Session, Depends(db.get_session)], tasks: BackgroundTasks
    ) -> Any:
        def late(part: str) -> None:
            transfer(db.session, wanted.of(part))

        def chunks() -> Iterator[str]:
            yield "chunk"
            late("late")
            yield "chunk"

        if kind == "serializable":
            db.use(SERIALIZABLE)
        if kind == "new":
            with db.session_scope(new=True) as audit:
                transfer(audit, wanted.of("audit"))
        work(session, kind, wanted)
        if kind == "hook":
            db.on_commit(late, "hook")
        if kind == "background":
            tasks.add_task(late, "late")
        if kind == "stream":
            return StreamingResponse(chunks(), 201)
        return PlainTextResponse("done", STATUSES.get(kind, 201), background=tasks)

    @app.get("/held")
    async def held() -> Any:
        pools = {"sync": db.engine.pool.checkedout(), "async": adb.engine.pool.checkedout()}
        return {**pools, "worker": os.getpid()}

    async def failed(request: Request, error: Exception) -> Any:
        return JSONResponse(answer(error), status_of(error))

    async def handled(request: Request, error: Exception) -> Any:
        return JSONResponse(answer(error))

    for kind in (DBAPIError, PoolTimeoutError, PendingRollbackError):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(HandledError, handled)
    return app


if SITE in os.environ:
    print(f"{os.environ[SITE]} starts in {os.getpid()}", file=sys.stderr)
    app = make_flask() if os.environ[SITE] == "flask" else make_fastapi()
