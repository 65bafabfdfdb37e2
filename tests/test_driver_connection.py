"""The driver's own connection, which job queues use, is inside the transaction of the session that it comes from."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from session_plugin import commit_on_success, read_only_autocommit

from .units import Units, on


@on("sqlite+aiosqlite", "postgresql+psycopg_async", "postgresql+asyncpg")
@pytest.mark.parametrize("ends", ["error", "success"])
@pytest.mark.parametrize("sync", [False, True])
def test_work_of_the_driver_ends_with_the_unit_of_work(units: Units, ends: str, sync: bool) -> None:
    """It may be sent before any statement of the session, with the first of which asyncpg would begin."""

    async def work() -> None:
        async with units.db.session_scope() as session:
            if sync:
                raw = await session.run_sync(lambda session: session.connection().connection)
            else:
                raw = await (await session.connection()).get_raw_connection()
            await raw.driver_connection.execute("INSERT INTO parent (name) VALUES ('raw')")
            if ends == "error":
                raise LookupError

    with nullcontext() if ends == "success" else pytest.raises(LookupError):
        units.runner.run(work())
    assert units.store.names() == ([] if ends == "error" else ["raw"])


@on("postgresql+asyncpg")
def test_the_transaction_begins_once(units: Units) -> None:
    """A session that has begun, and one that reads without transactions, send nothing more."""

    async def statements(policy: Any, *, query: bool) -> list[str]:
        sent: list[str] = []

        def note(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
            sent.append(statement)

        event.listen(Engine, "before_cursor_execute", note)
        try:
            async with units.db.session_scope() as session:
                units.db.use(policy)
                if query:
                    await session.execute(text("SELECT 2"))
                await session.connection()
        finally:
            event.remove(Engine, "before_cursor_execute", note)
        return [statement for statement in sent if statement.startswith("SELECT ") and statement[7:].isdigit()]

    assert units.runner.run(statements(commit_on_success, query=False)) == ["SELECT 1"]
    assert units.runner.run(statements(commit_on_success, query=True)) == ["SELECT 2"]
    assert units.runner.run(statements(read_only_autocommit, query=False)) == []
    assert units.runner.run(statements(read_only_autocommit, query=True)) == ["SELECT 2"]
