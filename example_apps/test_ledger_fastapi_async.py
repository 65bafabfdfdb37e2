import pytest

from session_plugin.testing import fail_next_commit

from .asgi_client import ASGIClient
from .ledger_fastapi_async import app, db
from .ledger_promises import LedgerPromises


class AsyncClient(ASGIClient):
    def rows(self, statement):
        return list(self.run(self.session.execute(statement)))

    def checked_out(self):
        return db.engine.pool.checkedout() - 1  # without the test's own connection

    def fail_next_commit(self, failure):
        fail_next_commit(db, failure)


@pytest.fixture
def client(run, entered):
    with entered(db.isolated()) as session, AsyncClient(app, run, session) as client:
        yield client


class TestLedgerFastAPIAsync(LedgerPromises):
    pass
