import click
from flask import Blueprint, Flask, jsonify, request
from flask_sqlalchemy_lite import SQLAlchemy
from sqlalchemy import ForeignKey, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class StatsBase(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    orders: Mapped[list["Order"]] = relationship(back_populates="customer")


class Order(Base):
    __tablename__ = "order"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    customer_id: Mapped[int] = mapped_column(ForeignKey("customer.id"))
    customer: Mapped[Customer] = relationship(back_populates="orders")


class Visit(StatsBase):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]


db = SQLAlchemy(
    engine_options={"pool_pre_ping": True},
    session_options={"expire_on_commit": False, "binds": {StatsBase: "stats"}},
)
shop = Blueprint("shop", __name__, cli_group=None)


def create_app(config=None):
    app = Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": "sqlite:///shop.db", "stats": "sqlite:///stats.db"}
    app.config.update(config or {})
    db.init_app(app)
    app.register_blueprint(shop)
    return app


@shop.app_errorhandler(IntegrityError)
def conflict(error):
    db.session.rollback()
    return {"error": "conflict"}, 409


@shop.post("/customers")
def create_customer():
    customer = Customer(name=request.json["name"])
    db.session.add(customer)
    db.session.commit()
    return {"id": customer.id, "name": customer.name}, 201


@shop.get("/customers/<name>")
def show_customer(name):
    customer = db.one_or_abort(select(Customer).where(Customer.name == name))
    db.session.add(Visit(path=request.path))
    db.session.commit()
    return {"name": customer.name, "orders": [order.item for order in customer.orders]}


@shop.post("/customers/<int:ident>/orders")
def create_order(ident):
    customer = db.get_or_abort(Customer, ident, abort_kwargs={"description": "No such customer."})
    db.session.add(Order(item=request.json["item"], customer=customer))
    if request.json["item"] == "gold":
        return {"error": "out of stock"}, 409
    db.session.commit()
    return {}, 201


@shop.get("/orders")
def list_orders():
    return jsonify(db.session.scalars(select(Order.item).order_by(Order.id)).all())


@shop.delete("/orders/<int:ident>")
def delete_order(ident):
    db.session.delete(db.get_or_abort(Order, ident))
    db.session.commit()
    return "", 204


@shop.cli.command("restock")
@click.argument("item")
def restock(item):
    """Order ITEM for every customer."""
    customers = db.session.scalars(select(Customer)).all()
    db.session.add_all(Order(item=item, customer=customer) for customer in customers)
    db.session.commit()
    click.echo(f"{len(customers)} ordered")
