"""advanced-alchemy's FastAPI extension, in its autocommit mode."""

from typing import Annotated

from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemySyncConfig
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from bench.shop import HELLO, Item, async_chunks


def make_app(url, engine_options):
    engine = create_engine(url, **engine_options)
    app = FastAPI()
    alchemy = AdvancedAlchemy(SQLAlchemySyncConfig(engine_instance=engine, commit_mode="autocommit"), app)
    SessionDep = Annotated[Session, Depends(alchemy.provide_session())]  # noqa: N806

    @app.get("/bare")
    def bare():
        return HELLO

    @app.get("/declared")
    def declared(session: SessionDep):
        return HELLO

    @app.get("/items/{item_id}")
    def read(item_id: int, session: SessionDep):
        item = session.get(Item, item_id)
        return {"id": item.id, "name": item.name}

    @app.post("/items/{name}", status_code=201)
    def write(name: str, session: SessionDep):
        item = Item(name=name)
        session.add(item)
        session.flush()
        return {"id": item.id}

    @app.get("/stream/{item_id}")
    def stream(item_id: int, session: SessionDep):
        session.get(Item, item_id)
        return StreamingResponse(async_chunks())

    return app, engine
