"""advanced-alchemy's Flask extension, in its autocommit mode."""

from advanced_alchemy.extensions.flask import AdvancedAlchemy, SQLAlchemySyncConfig
from flask import Flask, Response
from sqlalchemy import create_engine

from bench.shop import HELLO, Item, chunks


def make_app(url, engine_options):
    engine = create_engine(url, **engine_options)
    app = Flask(__name__)
    alchemy = AdvancedAlchemy(SQLAlchemySyncConfig(engine_instance=engine, commit_mode="autocommit"), app)

    @app.get("/bare")
    def bare():
        return HELLO

    @app.get("/declared")
    def declared():
        alchemy.get_sync_session()
        return HELLO

    @app.get("/items/<int:item_id>")
    def read(item_id):
        item = alchemy.get_sync_session().get(Item, item_id)
        return {"id": item.id, "name": item.name}

    @app.post("/items/<name>")
    def write(name):
        session = alchemy.get_sync_session()
        item = Item(name=name)
        session.add(item)
        session.flush()
        return {"id": item.id}, 201

    @app.get("/stream/<int:item_id>")
    def stream(item_id):
        alchemy.get_sync_session().get(Item, item_id)
        return Response(chunks())

    return app, engine
