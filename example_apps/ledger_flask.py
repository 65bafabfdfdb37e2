"""The ledger in Flask::

    flask --app example_apps.ledger_flask run

``LEDGER_DATABASE`` is the URL of its database; without it, the ledger is in memory and lost when the app stops.
"""

import os
from pathlib import Path
from typing import Any

from flask import Flask, Response, abort, jsonify, request, send_file
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from session_plugin import read_only
from session_plugin.flask import SessionPlugin

from . import ledger_models as ledger
from .ledger_models import EQUITY, Account, Base, Notice, Transfer

db = SessionPlugin(os.environ.get("LEDGER_DATABASE", "sqlite://"), metadata=Base.metadata)
app = Flask(__name__)
db.init_app(app)

ledger.enforce_foreign_keys(db.engine)
db.create_all()
with db.session_scope() as startup_session:
    ledger.open_books(startup_session)


def posted(**kinds: type) -> list[Any]:
    """The named fields of the posted JSON object, in that order."""
    try:
        return [kind(request.json[name]) for name, kind in kinds.items()]
    except (KeyError, TypeError, ValueError):
        abort(400, f"Post a JSON object with {', '.join(kinds)}.")


def book(source: str, target: str, amount: int) -> Transfer:
    transfer = Transfer.between(source, target, amount)
    db.session.add(transfer)
    db.session.flush()  # sets its id; the COMMIT follows before the response is sent
    return transfer


@app.errorhandler(IntegrityError)
def refused(error: IntegrityError) -> Any:
    # COMMIT may have raised it after the endpoint returned its 201; the client then receives this 409 instead.
    return {"error": "the database refused it"}, 409


@app.get("/")
def page() -> Any:
    return send_file(Path(__file__).with_name("ledger_page.html"))


@app.post("/accounts")
def create_account() -> Any:
    name, deposit = posted(name=str, deposit=int)
    db.session.add(Account(name=name))
    book(EQUITY, name, deposit)
    return {"name": name}, 201


@app.get("/accounts")
@db.policy(read_only)
def list_accounts() -> Any:
    return dict(db.session.execute(ledger.balances()).all())


@app.get("/notices")
@db.policy(read_only)
def list_notices() -> Any:
    return [notice.text for notice in db.session.scalars(select(Notice).order_by(Notice.id))]


@app.post("/transfers")
def create_transfer() -> Any:
    source, target, amount = posted(source=str, target=str, amount=int)
    db.session.execute(ledger.locked(source))
    transfer = book(source, target, amount)
    if db.session.scalar(ledger.balance(source)) < 0:
        return {"error": "insufficient funds"}, 400  # returned, not raised; the transfer is rolled back
    if address := request.json.get("receipt_to"):
        db.on_commit(send_receipt, address, source, transfer.id)
    return {"transfer": transfer.id}, 201


def send_receipt(address: str, account: str, transfer_id: int) -> None:
    # The transfer is durable by now. An error here is logged, and neither undoes it nor changes the response.
    if "@" not in address:
        raise ValueError(f"{address!r} is no e-mail address")
    db.session.add(Notice(account_name=account, text=f"receipt for transfer {transfer_id} to {address}"))


@app.post("/transfers/crash")
def crash() -> Any:
    book(*posted(source=str, target=str, amount=int))
    raise RuntimeError("a fault after the transfer was booked")


@app.get("/export")
def export() -> Any:
    def lines() -> Any:
        yield "transfer,account,amount\n"
        for row in db.session.execute(ledger.journal().execution_options(yield_per=100)):
            yield "{},{},{}\n".format(*row)

    return Response(lines(), mimetype="text/csv")


@app.post("/deposits")
def import_deposits() -> Any:
    (deposits,) = posted(deposits=list)

    def receipts() -> Any:
        # One transaction for the whole stream, committed before its last byte. If the client leaves, it rolls back.
        for account, amount in deposits:
            yield f"{account},{book(EQUITY, account, amount).id}\n"

    return Response(receipts(), mimetype="text/csv")


@app.post("/statements")
def order_statement() -> Any:
    (account,) = posted(account=str)
    response = jsonify(status="the statement will follow")
    response.status_code = 202
    response.call_on_close(lambda: write_statement(account))
    return response


def write_statement(account: str) -> None:
    # Runs after the response, in a separate transaction.
    total = db.session.scalar(ledger.balance(account))
    db.session.add(Notice(account_name=account, text=f"statement for {account}: {total}"))
