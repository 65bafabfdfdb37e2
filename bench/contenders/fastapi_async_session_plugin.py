"""session_plugin."""

from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from bench.shop import HELLO, Item, async_chunks
from session_plugin import read_only_autocommit
from session_plugin.fastapi import AsyncSessionPlugin


def make_app(url, engine_options, autocommit=False):
    db = AsyncSessionPlugin(url, **engine_options)
    app = FastAPI()
    db.init_app(app)
    under_policy = db.policy(read_only_autocommit) if autocommit else lambda endpoint: endpoint
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

    return app, db
