import pytest

from .asgi_client import ASGIClient
from .ledger_fastapi_sync import app, db
from .ledger_promises import LedgerPromises


class SyncClient(ASGIClient):
    def rows(self, statement):
        with db.engine.connect() as connection:
            return list(connection.execute(statement))

    def checked_out(self):
        return db.engine.pool.checkedout()


@pytest.fixture
def client(run):
    with SyncClient(app, run) as client:
        yield client
        db.drop_all()


class TestLedgerFastAPISync(LedgerPromises):
    pass
