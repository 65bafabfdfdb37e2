"""What every app promises its clients, tested once; each test file brings the client of its framework."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Executable, func, select
from sqlalchemy.exc import IntegrityError

from .ledger_models import Entry, Notice, balances, journal


@dataclass(frozen=True)
class Answer:
    """What a client was told; ``complete`` is false if the response broke off."""

    status: int
    text: str
    complete: bool


class Client(ABC):
    @abstractmethod
    def send(self, method: str, path: str, body: Any = None, *, leave: bool = False) -> Answer:
        """Make a request; ``leave`` after the first chunk of the response."""

    @abstractmethod
    def rows(self, statement: Executable) -> list[Any]:
        """What the database holds, read by the session of the test."""

    @abstractmethod
    def checked_out(self) -> int:
        """How many connections the app holds."""

    @abstractmethod
    def fail_next_commit(self, failure: Any) -> None:
        """Let the next commit of the app fail."""


class LedgerPromises:
    @pytest.fixture(autouse=True)
    def ledger(self, client):
        """Alice has 100 and Bob nothing; in the end the books balance, and no connection is held."""
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
        """Who reads a 201 finds the transfer in the database."""
        assert self.transfer().status == 201
        assert self.balances() == {"alice": 70, "bob": 31, "equity": -101}
        assert json.loads(self.client.send("GET", "/accounts").text) == self.balances()

    def test_returned_error_rolls_back(self):
        """A 400 that is returned, after the transfer was written, leaves nothing of it."""
        assert self.transfer(amount=101).status == 400
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_failed_commit_reaches_the_error_handler(self):
        """An error that only COMMIT raises is answered by the app's handler, and nothing is written."""
        answer = self.transfer(target="nobody")
        assert (answer.status, json.loads(answer.text)) == (409, {"error": "the database refused it"})
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    @pytest.mark.parametrize(("failure", "status"), [(IntegrityError, 409), ("serialization", 500)])
    def test_commit_that_fails_for_another_reason(self, failure, status):
        """Whatever makes COMMIT fail, the client is told, and a second attempt is a first one."""
        self.client.fail_next_commit(failure)
        assert self.transfer().status == status
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}
        assert self.transfer().status == 201

    def test_failed_flush_reaches_the_error_handler(self):
        """An account that is there already is answered by the same handler."""
        assert self.post("/accounts", name="bob", deposit=1).status == 409
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_exception_rolls_back(self):
        """A fault after the transfer was written is a 500 that leaves nothing of it."""
        assert self.transfer(path="/transfers/crash").status == 500
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_export_is_complete(self):
        """A stream runs its own query, after its request was settled."""
        answer = self.client.send("GET", "/export")
        lines = [",".join(map(str, row)) for row in self.client.rows(journal())]
        assert answer.complete
        assert answer.text.splitlines() == ["transfer,account,amount", *lines]

    def test_complete_stream_is_durable(self):
        """What a stream writes is committed before its last byte."""
        answer = self.post("/deposits", deposits=[("alice", 1), ("bob", 2)])
        assert answer.complete
        assert [line.split(",")[0] for line in answer.text.splitlines()] == ["alice", "bob"]
        assert self.balances() == {"alice": 101, "bob": 3, "equity": -104}

    def test_abandoned_stream_rolls_back(self):
        """A client that leaves in the middle of an import leaves nothing of it behind."""
        answer = self.post("/deposits", deposits=[("alice", 1)] * 500, leave=True)
        assert not answer.complete
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_stream_that_cannot_commit_breaks_off(self):
        """A stream whose COMMIT fails, and nothing before it, never looks complete."""
        answer = self.post("/deposits", deposits=[("nobody", 2), ("alice", 1)])
        assert (answer.status, answer.complete) == (200, False)
        assert [line.split(",")[0] for line in answer.text.splitlines()] == ["nobody", "alice"]
        assert self.balances() == {"alice": 100, "bob": 1, "equity": -101}

    def test_background_work_is_durable(self):
        """What is written after the response is committed, in a transaction of its own."""
        assert self.post("/statements", account="alice").status == 202
        assert self.notices() == ["statement for alice: 100"]

    def test_hook_runs_after_commit(self):
        """A receipt is written only for a transfer that is durable."""
        assert self.transfer(amount=101, receipt_to="alice@example.com").status == 400
        assert self.transfer(target="nobody", receipt_to="alice@example.com").status == 409
        assert self.notices() == []
        answer = self.transfer(receipt_to="alice@example.com")
        assert self.notices() == [f"receipt for transfer {json.loads(answer.text)['transfer']} to alice@example.com"]

    def test_failing_hook_changes_nothing(self, caplog):
        """A hook that raises is logged; the client has its 201 and the database the transfer."""
        assert self.transfer(receipt_to="no address").status == 201
        assert self.balances() == {"alice": 70, "bob": 31, "equity": -101}
        assert self.notices() == []
        assert [record.getMessage() for record in caplog.records if record.name == "session_plugin"] == [
            "The hook send_receipt failed"
        ]
