"""The floor: a session in each view, committed before the response, rolled back on an error, closed."""

from flask import Flask, Response
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from bench.shop import HELLO, Item, chunks


def make_app(url, engine_options, commit_reads=False):
    engine = create_engine(url, **engine_options)
    sessions = sessionmaker(engine)
    reading = sessions.begin if commit_reads else sessions
    app = Flask(__name__)

    @app.get("/bare")
    def bare():
        return HELLO

    @app.get("/declared")
    def declared():
        with sessions():
            return HELLO

    @app.get("/items/<int:item_id>")
    def read(item_id):
        with reading() as session:
            item = session.get(Item, item_id)
            return {"id": item.id, "name": item.name}

    @app.post("/items/<name>")
    def write(name):
        with sessions.begin() as session:
            item = Item(name=name)
            session.add(item)
            session.flush()
            return {"id": item.id}, 201

    @app.get("/stream/<int:item_id>")
    def stream(item_id):
        with sessions() as session:
            session.get(Item, item_id)
        return Response(chunks())

    return app, engine
