"""session_plugin."""

from flask import Flask, Response

from bench.shop import HELLO, Item, chunks
from session_plugin import read_only_autocommit
from session_plugin.flask import SessionPlugin


def make_app(url, engine_options, autocommit=False):
    db = SessionPlugin(url, **engine_options)
    app = Flask(__name__)
    db.init_app(app)
    under_policy = db.policy(read_only_autocommit) if autocommit else lambda endpoint: endpoint

    @app.get("/bare")
    def bare():
        return HELLO

    @app.get("/declared")
    def declared():
        db.session  # noqa: B018
        return HELLO

    @app.get("/items/<int:item_id>")
    @under_policy
    def read(item_id):
        item = db.session.get(Item, item_id)
        return {"id": item.id, "name": item.name}

    @app.post("/items/<name>")
    def write(name):
        item = Item(name=name)
        db.session.add(item)
        db.session.flush()
        return {"id": item.id}, 201

    @app.get("/stream/<int:item_id>")
    def stream(item_id):
        db.session.get(Item, item_id)
        return Response(chunks())

    return app, db
