"""The floor without SQLAlchemy's ``async with``: cheaper, but a cancelled request may not release its connection."""

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options):
    engine = create_async_engine(url, **engine_options)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    app = FastAPI()

    @app.get("/bare")
    async def bare():
        return HELLO

    @app.get("/declared")
    async def declared():
        session = sessions()
        try:
            return HELLO
        finally:
            await session.close()

    @app.get("/items/{item_id}")
    async def read(item_id: int):
        session = sessions()
        try:
            item = await session.get(Item, item_id)
            return {"id": item.id, "name": item.name}
        finally:
            await session.close()

    @app.post("/items/{name}", status_code=201)
    async def write(name: str):
        session = sessions()
        try:
            item = Item(name=name)
            session.add(item)
            await session.flush()
            await session.commit()
            return {"id": item.id}
        except BaseException:
            await session.rollback()
            raise
        finally:
            await session.close()

    @app.get("/stream/{item_id}")
    async def stream(item_id: int):
        session = sessions()
        try:
            await session.get(Item, item_id)
        finally:
            await session.close()
        return StreamingResponse(async_chunks())

    return app, engine
