"""The ledger in FastAPI, with ``async def`` endpoints::

    uvicorn example_apps.ledger_fastapi_async:app

``LEDGER_DATABASE`` is the URL of its database; without it, the ledger is in memory and lost when the app stops.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from session_plugin import read_only
from session_plugin.fastapi import AsyncSessionPlugin

from . import ledger_models as ledger
from .ledger_models import EQUITY, Account, Base, Notice, Transfer
from .ledger_schemas import AccountIn, DepositsIn, StatementIn, TransferIn

db = AsyncSessionPlugin(os.environ.get("LEDGER_DATABASE", "sqlite+aiosqlite://"), metadata=Base.metadata)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    await db.create_all()
    async with db.session_scope() as session:
        await session.run_sync(ledger.open_books)
    yield


app = FastAPI(lifespan=lifespan)
db.init_app(app)
ledger.enforce_foreign_keys(db.engine.sync_engine)
SessionDep = Annotated[AsyncSession, Depends(db.get_session)]


async def book(session: AsyncSession, source: str, target: str, amount: int) -> Transfer:
    transfer = Transfer.between(source, target, amount)
    session.add(transfer)
    await session.flush()  # sets its id; the COMMIT follows before the response is sent
    return transfer


@app.exception_handler(IntegrityError)
async def refused(request: Request, error: IntegrityError) -> JSONResponse:
    # COMMIT may have raised it after the endpoint returned its 201; the client then receives this 409 instead.
    return JSONResponse({"error": "the database refused it"}, 409)


@app.post("/accounts", status_code=201)
async def create_account(account: AccountIn, session: SessionDep) -> Any:
    session.add(Account(name=account.name))
    await book(session, EQUITY, account.name, account.deposit)
    return {"name": account.name}


@app.get("/accounts")
@db.policy(read_only)
async def list_accounts(session: SessionDep) -> Any:
    return dict((await session.execute(ledger.balances())).all())


@app.get("/notices")
@db.policy(read_only)
async def list_notices(session: SessionDep) -> Any:
    return [notice.text for notice in await session.scalars(select(Notice).order_by(Notice.id))]


@app.post("/transfers", status_code=201)
async def create_transfer(order: TransferIn, session: SessionDep) -> Any:
    await session.execute(ledger.locked(order.source))
    transfer = await book(session, order.source, order.target, order.amount)
    if await session.scalar(ledger.balance(order.source)) < 0:
        # The response is returned, not raised; the transfer is rolled back all the same.
        return JSONResponse({"error": "insufficient funds"}, 400)
    if order.receipt_to:
        db.on_commit(send_receipt, order.receipt_to, order.source, transfer.id)
    return {"transfer": transfer.id}


async def send_receipt(address: str, account: str, transfer_id: int) -> None:
    # The transfer is durable by now. An error here is logged, and neither undoes it nor changes the response.
    if "@" not in address:
        raise ValueError(f"{address!r} is no e-mail address")
    db.session.add(Notice(account_name=account, text=f"receipt for transfer {transfer_id} to {address}"))


@app.post("/transfers/crash")
async def crash(order: TransferIn, session: SessionDep) -> Any:
    await book(session, order.source, order.target, order.amount)
    raise RuntimeError("a fault after the transfer was booked")


@app.get("/export")
async def export(session: SessionDep) -> Any:
    async def lines() -> AsyncGenerator[str]:
        yield "transfer,account,amount\n"
        async for row in await session.stream(ledger.journal().execution_options(yield_per=100)):
            yield "{},{},{}\n".format(*row)

    return StreamingResponse(lines(), media_type="text/csv")


@app.post("/deposits")
async def import_deposits(order: DepositsIn, session: SessionDep) -> Any:
    async def receipts() -> AsyncGenerator[str]:
        # One transaction for the whole stream, committed before its last byte. If the client leaves, it rolls back.
        for account, amount in order.deposits:
            transfer = await book(session, EQUITY, account, amount)
            yield f"{account},{transfer.id}\n"

    return StreamingResponse(receipts(), media_type="text/csv")


@app.post("/statements", status_code=202)
async def order_statement(order: StatementIn, background: BackgroundTasks) -> Any:
    background.add_task(write_statement, order.account)
    return {"status": "the statement will follow"}


async def write_statement(account: str) -> None:
    # Runs after the response, in a separate transaction.
    total = await db.session.scalar(ledger.balance(account))
    db.session.add(Notice(account_name=account, text=f"statement for {account}: {total}"))
