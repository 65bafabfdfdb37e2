"""FastAPI's documented dependency with ``yield``, which commits; with either scope."""

from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options, scope):
    engine = create_async_engine(url, **engine_options)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    app = FastAPI()

    async def get_db():
        async with sessions.begin() as session:
            yield session

    SessionDep = Annotated[AsyncSession, Depends(get_db, scope=scope)]  # noqa: N806

    @app.get("/bare")
    async def bare():
        return HELLO

    @app.get("/declared")
    async def declared(session: SessionDep):
        return HELLO

    @app.get("/items/{item_id}")
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

    return app, engine
