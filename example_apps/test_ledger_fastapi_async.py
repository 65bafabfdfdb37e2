import pytest

from .asgi_client import ASGIClient
from .ledger_fastapi_async import app, db
from .ledger_promises import LedgerPromises


class AsyncClient(ASGIClient):
    def rows(self, statement):
        async def read():
            async with db.engine.connect() as connection:
                return list(await connection.execute(statement))

        return self.run(read())

    def checked_out(self):
        return db.engine.pool.checkedout()


@pytest.fixture
def client(run):
    with AsyncClient(app, run) as client:
        yield client
        run(db.drop_all())


class TestLedgerFastAPIAsync(LedgerPromises):
    pass
