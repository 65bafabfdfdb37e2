"""fastapi-async-sqlalchemy, whose middleware commits."""

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from sqlalchemy.ext.asyncio import create_async_engine

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options):
    engine = create_async_engine(url, **engine_options)
    SQLAlchemyMiddleware, db = create_middleware_and_session_proxy()  # noqa: N806
    app = FastAPI()
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)

    @app.get("/bare")
    async def bare():
        return HELLO

    @app.get("/declared")
    async def declared():
        db.session  # noqa: B018
        return HELLO

    @app.get("/items/{item_id}")
    async def read(item_id: int):
        item = await db.session.get(Item, item_id)
        return {"id": item.id, "name": item.name}

    @app.post("/items/{name}", status_code=201)
    async def write(name: str):
        item = Item(name=name)
        db.session.add(item)
        await db.session.flush()
        return {"id": item.id}

    @app.get("/stream/{item_id}")
    async def stream(item_id: int):
        await db.session.get(Item, item_id)
        return StreamingResponse(async_chunks())

    return app, engine
