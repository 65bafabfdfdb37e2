"""advanced-alchemy's FastAPI extension, in its autocommit mode."""

from typing import Annotated

from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, AsyncSessionConfig, SQLAlchemyAsyncConfig
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options):
    engine = create_async_engine(url, **engine_options)
    app = FastAPI()
    config = SQLAlchemyAsyncConfig(
        engine_instance=engine,
        session_config=AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    )
    alchemy = AdvancedAlchemy(config, app)
    SessionDep = Annotated[AsyncSession, Depends(alchemy.provide_session())]  # noqa: N806

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
