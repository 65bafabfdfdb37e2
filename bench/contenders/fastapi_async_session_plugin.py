"""This project."""

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from bench.shop import HELLO, Item, async_chunks
from session_plugin import read_only
from session_plugin.fastapi import AsyncSessionPlugin

QUICK_READ = replace(read_only, name="quick_read", isolation_level="AUTOCOMMIT")


def make_app(url, engine_options, quick_read=False):
    db = AsyncSessionPlugin(url, **engine_options)
    app = FastAPI()
    db.init_app(app)
    under_policy = db.policy(QUICK_READ) if quick_read else lambda endpoint: endpoint
    SessionDep = Annotated[AsyncSession, Depends(db.get_session)]  # noqa: N806

    @app.get("/bare")
    async def bare():
        return HELLO

    @app.get("/declared")
    async def declared(session: SessionDep):
        return HELLO

    @app.get("/items/{item_id}")
    @under_policy
    async def read(item_id: int, session: SessionDep):
        item = await session.get(Item, item_id)
        return {"id": item.id, "name": item.name}

    @app.post("/items/{name}", status_code=201)
    async def write(name: str, session: SessionDep):
        item = Item(name=name)
        session.add(item)
        await session.flush()
        return {"id": item.id}

    @app.get("/stream/{item_id}")
    async def stream(item_id: int, session: SessionDep):
        await session.get(Item, item_id)
        return StreamingResponse(async_chunks())

    return app, db.engine
