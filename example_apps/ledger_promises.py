"""What every app promises its clients, in one test class; each test file adds a client for its framework."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Executable, func, select
from sqlalchemy.exc import IntegrityError

from .ledger_models import Entry, Notice, balances, journal


@dataclass(frozen=True)
class Reply:
    """What a client received; ``complete`` is false if the response was truncated."""

    status: int
    text: str
    complete: bool


class Client(ABC):
    @abstractmethod
    def send(self, method: str, path: str, body: Any = None, *, leave: bool = False) -> Reply:
        """Send a request; with ``leave``, disconnect after the first chunk of the response."""

    @abstractmethod
    def rows(self, statement: Executable) -> list[Any]:
        """Rows that the database holds, read through the test's session."""

    @abstractmethod
    def checked_out(self) -> int:
        """How many connections the app has checked out."""

    @abstractmethod
    def fail_next_commit(self, failure: Any) -> None:
        """Make the app's next commit fail."""


class LedgerPromises:
    @pytest.fixture(autouse=True)
    def ledger(self, client):
        """Alice has 100 and Bob has 1; at the end the books balance and no connection is held."""
        self.client = client
        assert self.post("/accounts", name="alice", deposit=100).status == 201
        assert self.post("/accounts", name="bob", deposit=1).status == 201
        yield
        sums = select(func.sum(Entry.amount)).group_by(Entry.transfer_id)
        assert {total for (total,) in client.rows(sums)} == {0}
        assert client.checked_out() == 0

    def post(self, path, *, leave=False, **body):
        return self.client.send("POST", path, body, leave=leave)

    def transfer(self, target="bob", amount=30, path="/transfers", **more):
        return self.post(path, source="alice", target=target, amount=amount, **more)

    def balances(self):
        return dict(self.client.rows(balances()))

    def notices(self):
        return [text for (text,) in self.client.rows(select(Notice.text).order_by(Notice.id))]

    def test_success_is_durable(self):
        """When a client receives a 201, the transfer is in the database."""
        assert self.transfer().status == 201
        assert self.balances() == {"alice": 70, "bob": 31, "equity": -101}
        assert json.loads(self.client.send("GET", "/accounts").text) == self.balances()

    def test_returned_error_rolls_back(self):
        """If an endpoint writes a transfer and then returns a 400, the transfer is rolled back."""
        assert self.transfer(amount=101).status == 400
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_failed_commit_reaches_the_error_handler(self):
        """If COMMIT fails, the client receives the error handler's response, and nothing is written."""
        reply = self.transfer(target="nobody")
        assert (reply.status, json.loads(reply.text)) == (409, {"error": "the database refused it"})
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    @pytest.mark.parametrize(("failure", "status"), [(IntegrityError, 409), ("serialization", 500)])
    def test_commit_that_fails_for_another_reason(self, failure, status):
        """Whatever makes COMMIT fail, the client receives an error, nothing is written, and a retry succeeds."""
        self.client.fail_next_commit(failure)
        assert self.transfer().status == status
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}
        assert self.transfer().status == 201

    def test_failed_flush_reaches_the_error_handler(self):
        """Creating an account that exists already fails in the flush, and the same error handler handles it."""
        assert self.post("/accounts", name="bob", deposit=1).status == 409
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_exception_rolls_back(self):
        """If an endpoint writes a transfer and then raises, the client gets a 500 and the transfer is rolled back."""
        assert self.transfer(path="/transfers/crash").status == 500
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_export_is_complete(self):
        """A stream can run a query after its request was settled, and its response is complete."""
        reply = self.client.send("GET", "/export")
        lines = [",".join(map(str, row)) for row in self.client.rows(journal())]
        assert reply.complete
        assert reply.text.splitlines() == ["transfer,account,amount", *lines]

    def test_complete_stream_is_durable(self):
        """What a stream writes is committed before its last byte is sent."""
        reply = self.post("/deposits", deposits=[("alice", 1), ("bob", 2)])
        assert reply.complete
        assert [line.split(",")[0] for line in reply.text.splitlines()] == ["alice", "bob"]
        assert self.balances() == {"alice": 101, "bob": 3, "equity": -104}

    def test_abandoned_stream_rolls_back(self):
        """If a client disconnects in the middle of an import, the import is rolled back."""
        reply = self.post("/deposits", deposits=[("alice", 1)] * 500, leave=True)
        assert not reply.complete
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_stream_that_cannot_commit_breaks_off(self):
        """A stream whose COMMIT fails is truncated, so it never looks complete to the client."""
        reply = self.post("/deposits", deposits=[("nobody", 2), ("alice", 1)])
        assert (reply.status, reply.complete) == (200, False)
        assert [line.split(",")[0] for line in reply.text.splitlines()] == ["nobody", "alice"]
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_background_work_is_durable(self):
        """Background work after the response is committed in a separate transaction."""
        assert self.post("/statements", account="alice").status == 202
        assert self.notices() == ["statement for alice: 100"]

    def test_hook_runs_after_commit(self):
        """A receipt is written only after its transfer was committed."""
        assert self.transfer(amount=101, receipt_to="alice@example.com").status == 400
        assert self.transfer(target="nobody", receipt_to="alice@example.com").status == 409
        assert self.notices() == []
        reply = self.transfer(receipt_to="alice@example.com")
        assert self.notices() == [f"receipt for transfer {json.loads(reply.text)['transfer']} to alice@example.com"]

    def test_failing_hook_changes_nothing(self, caplog):
        """An error in a hook is logged; the client still receives its 201, and the database holds the transfer."""
        assert self.transfer(receipt_to="no address").status == 201
        assert self.balances() == {"alice": 70, "bob": 31, "equity": -101}
        assert self.notices() == []
        assert [record.getMessage() for record in caplog.records if record.name == "session_plugin"] == [
            "The hook send_receipt failed"
        ]
