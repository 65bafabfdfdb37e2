import pytest

from session_plugin.testing import fail_next_commit

from .asgi_client import ASGIClient
from .ledger_fastapi_sync import app, db
from .ledger_promises import LedgerPromises


class SyncClient(ASGIClient):
    def rows(self, statement):
        return list(self.session.execute(statement))

    def checked_out(self):
        return db.engine.pool.checkedout() - 1  # without the test's own connection

    def fail_next_commit(self, failure):
        fail_next_commit(db, failure)


@pytest.fixture
def client(run):
    with db.isolated() as session, SyncClient(app, run, session) as client:
        yield client


class TestLedgerFastAPISync(LedgerPromises):
    pass
