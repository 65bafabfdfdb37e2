import click
from flask import Blueprint, Flask, abort, jsonify, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError

db = SQLAlchemy()
shop = Blueprint("shop", __name__, cli_group=None)


class Customer(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String(80), unique=True, nullable=False)
    orders = db.relationship("PurchaseOrder", back_populates="customer", cascade="all, delete-orphan")


class PurchaseOrder(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    item = db.Column(db.String(80), nullable=False)
    customer_id = db.Column(db.ForeignKey("customer.id"), nullable=False)
    customer = db.relationship("Customer", back_populates="orders")


class Visit(db.Model):
    __bind_key__ = "stats"
    id = db.Column(db.Integer, primary_key=True)
    path = db.Column(db.String(200), nullable=False)


def create_app(config=None):
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///shop.db"
    app.config["SQLALCHEMY_BINDS"] = {"stats": "sqlite:///stats.db"}
    app.config.update(config or {})
    db.init_app(app)
    app.register_blueprint(shop)
    return app


@shop.app_errorhandler(IntegrityError)
def conflict(error):
    db.session.rollback()
    return {"error": "conflict", "customers": Customer.query.count()}, 409


@shop.post("/customers")
def create_customer():
    customer = Customer(name=request.json["name"])
    db.session.add(customer)
    db.session.commit()
    return {"id": customer.id, "name": customer.name}, 201


@shop.get("/customers/<name>")
def show_customer(name):
    customer = Customer.query.filter_by(name=name).first_or_404()
    db.session.add(Visit(path=request.path))
    db.session.commit()
    return {"name": customer.name, "orders": [order.item for order in customer.orders]}


@shop.patch("/customers/<name>")
def rename_customer(name):
    customer = Customer.query.filter_by(name=name).first_or_404()
    customer.name = request.json["name"]
    if not customer.name:
        return {"error": "a name, please"}, 400
    db.session.commit()
    return {"name": customer.name}


@shop.post("/customers/<int:ident>/orders")
def create_order(ident):
    customer = db.get_or_404(Customer, ident, description="No such customer.")
    order = PurchaseOrder(item=request.json["item"], customer=customer)
    db.session.add(order)
    db.session.flush()
    if order.item == "gold":
        abort(409)
    db.session.commit()
    return {"id": order.id}, 201


@shop.get("/orders")
def list_orders():
    page = db.paginate(db.select(PurchaseOrder).order_by(PurchaseOrder.id), per_page=2)
    return jsonify(items=[order.item for order in page.items], total=page.total, has_next=page.has_next)


@shop.delete("/orders/<int:ident>")
def delete_order(ident):
    db.session.delete(db.get_or_404(PurchaseOrder, ident))
    db.session.commit()
    return "", 204


@shop.cli.command("restock")
@click.argument("item")
def restock(item):
    """Order ITEM for every customer."""
    for customer in db.session.execute(db.select(Customer)).scalars():
        customer.orders.append(PurchaseOrder(item=item))
    db.session.commit()
    click.echo(f"{PurchaseOrder.query.filter_by(item=item).count()} ordered")
