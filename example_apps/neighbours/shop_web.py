"""The web app of the shop.  It creates its plugin from the database that the workers use."""

from collections.abc import Callable

from flask import Flask, jsonify

from session_plugin.flask import SessionPlugin

from .shop_database import Order
from .shop_database import db as shared

db = SessionPlugin(shared)


def create_app(enqueue: Callable[[int], object]) -> Flask:
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/orders/<item>")
    def create_order(item):
        order = Order(item=item)
        db.session.add(order)
        db.session.flush()
        db.on_commit(enqueue, order.id)  # the task is sent only after the order was committed
        return jsonify(id=order.id), 201

    return app
