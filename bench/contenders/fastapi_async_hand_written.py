"""The floor: a session in each endpoint, committed before the response, rolled back on an error, closed."""

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options, commit_reads=False):
    engine = create_async_engine(url, **engine_options)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    reading = sessions.begin if commit_reads else sessions
    app = FastAPI()

    @app.get("/bare")
    async def bare():
        return HELLO

    @app.get("/declared")
    async def declared():
        async with sessions():
            return HELLO

    @app.get("/items/{item_id}")
    async def read(item_id: int):
        async with reading() as session:
            item = await session.get(Item, item_id)
            return {"id": item.id, "name": item.name}

    @app.post("/items/{name}", status_code=201)
    async def write(name: str):
        async with sessions.begin() as session:
            item = Item(name=name)
            session.add(item)
            await session.flush()
            return {"id": item.id}

    @app.get("/stream/{item_id}")
    async def stream(item_id: int):
        async with sessions() as session:
            await session.get(Item, item_id)
        return StreamingResponse(async_chunks())

    return app, engine
