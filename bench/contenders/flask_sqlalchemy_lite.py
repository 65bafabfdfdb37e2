"""Flask-SQLAlchemy-Lite; the view commits by hand."""

from flask import Flask, Response
from flask_sqlalchemy_lite import SQLAlchemy

from bench.shop import HELLO, Item, chunks


def make_app(url, engine_options):
    app = Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": url, **engine_options}}
    db = SQLAlchemy(app)

    @app.get("/bare")
    def bare():
        return HELLO

    @app.get("/declared")
    def declared():
        db.session  # noqa: B018
        return HELLO

    @app.get("/items/<int:item_id>")
    def read(item_id):
        item = db.session.get(Item, item_id)
        return {"id": item.id, "name": item.name}

    @app.post("/items/<name>")
    def write(name):
        item = Item(name=name)
        db.session.add(item)
        db.session.flush()
        answer = {"id": item.id}
        db.session.commit()
        return answer, 201

    @app.get("/stream/<int:item_id>")
    def stream(item_id):
        db.session.get(Item, item_id)
        return Response(chunks())

    with app.app_context():
        return app, db.engine
