import pytest

from session_plugin.testing import fail_next_commit, leave_midstream

from .ledger_flask import app, db
from .ledger_promises import Client, LedgerPromises, Reply


class FlaskClient(Client):
    def __init__(self, session):
        self.session = session

    def send(self, method, path, body=None, *, leave=False):
        if leave:
            left = leave_midstream(app, method, path, json=body)
            return Reply(left.status, left.body.decode(), complete=False)
        response = app.test_client().open(path, method=method, json=body)
        chunks, complete = [], False
        try:
            chunks.extend(response.response)
            complete = True
        except Exception:
            complete = False  # a server closes the connection; the client sees nothing else
        response.close()
        return Reply(response.status_code, b"".join(chunks).decode(), complete)

    def rows(self, statement):
        return list(self.session.execute(statement))

    def checked_out(self):
        return db.engine.pool.checkedout() - 1  # without the test's own connection

    def fail_next_commit(self, failure):
        fail_next_commit(db, failure)


@pytest.fixture(scope="session")
def session_plugin_database():
    return db


@pytest.fixture
def client(db_session):
    return FlaskClient(db_session)


class TestLedgerFlask(LedgerPromises):
    def test_page(self):
        """The ledger's HTML page is served at ``/``."""
        reply = self.client.send("GET", "/")
        assert reply.status == 200
        assert "<title>" in reply.text
