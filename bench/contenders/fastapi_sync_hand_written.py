"""The floor: a session in each endpoint, committed before the response, rolled back on an error, closed."""

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options, commit_reads=False):
    engine = create_engine(url, **engine_options)
    sessions = sessionmaker(engine)
    reading = sessions.begin if commit_reads else sessions
    app = FastAPI()

    @app.get("/bare")
    def bare():
        return HELLO

    @app.get("/declared")
    def declared():
        with sessions():
            return HELLO

    @app.get("/items/{item_id}")
    def read(item_id: int):
        with reading() as session:
            item = session.get(Item, item_id)
            return {"id": item.id, "name": item.name}

    @app.post("/items/{name}", status_code=201)
    def write(name: str):
        with sessions.begin() as session:
            item = Item(name=name)
            session.add(item)
            session.flush()
            return {"id": item.id}

    @app.get("/stream/{item_id}")
    def stream(item_id: int):
        with sessions() as session:
            session.get(Item, item_id)
        return StreamingResponse(async_chunks())

    return app, engine
