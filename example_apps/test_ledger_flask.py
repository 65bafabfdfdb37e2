import pytest

from .ledger_flask import app, db
from .ledger_models import open_books
from .ledger_promises import Answer, Client, LedgerPromises


class FlaskClient(Client):
    def send(self, method, path, body=None, *, leave=False):
        response = app.test_client().open(path, method=method, json=body)
        chunks, complete = [], False
        try:
            for chunk in response.response:
                chunks.append(chunk)
                if leave:
                    break
            else:
                complete = True
        except Exception:
            complete = False  # a server closes the connection, which is all that its client sees
        response.close()
        return Answer(response.status_code, b"".join(chunks).decode(), complete)

    def rows(self, statement):
        with db.engine.connect() as connection:
            return list(connection.execute(statement))

    def checked_out(self):
        return db.engine.pool.checkedout()


@pytest.fixture
def client():
    db.create_all()
    with db.session_scope() as session:
        open_books(session)
    yield FlaskClient()
    db.drop_all()
    db.dispose()


class TestLedgerFlask(LedgerPromises):
    def test_page(self):
        """The page for a person to click is there."""
        answer = self.client.send("GET", "/")
        assert answer.status == 200
        assert "<title>" in answer.text
