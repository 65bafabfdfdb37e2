import pytest
from app import Customer, PurchaseOrder, Visit, create_app, db
from sqlalchemy import func, select


@pytest.fixture
def app():
    app = create_app(
        {"TESTING": True, "SQLALCHEMY_DATABASE_URI": "sqlite://", "SQLALCHEMY_BINDS": {"stats": "sqlite://"}}
    )
    with app.app_context():
        db.create_all()
        yield app
        db.session.remove()
        db.drop_all()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def ada(app):
    customer = Customer(name="Ada")
    db.session.add(customer)
    db.session.commit()
    return customer


def test_create_customer(client):
    response = client.post("/customers", json={"name": "Grace"})
    assert (response.status_code, response.json) == (201, {"id": 1, "name": "Grace"})
    assert db.session.get(Customer, 1).name == "Grace"


def test_a_name_is_taken_once(client, ada):
    response = client.post("/customers", json={"name": ada.name})
    assert (response.status_code, response.json) == (409, {"error": "conflict", "customers": 1})


def test_show_customer(client, ada):
    ada.orders.append(PurchaseOrder(item="tea"))
    db.session.commit()
    assert client.get("/customers/Ada").json == {"name": "Ada", "orders": ["tea"]}
    assert db.session.scalars(select(Visit.path)).all() == ["/customers/Ada"]


def test_no_such_customer(client, ada):
    assert client.get("/customers/Grace").status_code == 404
    assert "No such customer." in client.post("/customers/2/orders", json={"item": "tea"}).text


def test_rename_customer(client, ada):
    assert ada.name == "Ada"
    assert client.patch("/customers/Ada", json={"name": "Ada L."}).json == {"name": "Ada L."}
    assert ada.name == "Ada L."


def test_a_refused_name_is_not_saved(client, ada):
    assert client.patch("/customers/Ada", json={"name": ""}).status_code == 400
    db.session.rollback()
    assert ada.name == "Ada"


def test_a_refused_order_is_not_saved(client, ada):
    assert client.post(f"/customers/{ada.id}/orders", json={"item": "gold"}).status_code == 409
    db.session.rollback()
    assert db.session.scalar(select(func.count()).select_from(PurchaseOrder)) == 0


def test_orders_by_page(client, ada):
    for item in ("tea", "coffee", "milk"):
        assert client.post(f"/customers/{ada.id}/orders", json={"item": item}).status_code == 201
    assert client.get("/orders").json == {"items": ["tea", "coffee"], "total": 3, "has_next": True}
    assert client.get("/orders?page=2").json == {"items": ["milk"], "total": 3, "has_next": False}
    assert client.get("/orders?page=3").status_code == 404


def test_delete_order(client, ada):
    ident = client.post(f"/customers/{ada.id}/orders", json={"item": "tea"}).json["id"]
    assert client.delete(f"/orders/{ident}").status_code == 204
    assert db.session.get(PurchaseOrder, ident) is None
    assert ada.orders == []


def test_restock(app, ada):
    result = app.test_cli_runner().invoke(args=["restock", "sugar"])
    assert result.output == "1 ordered\n"
    assert [order.item for order in ada.orders] == ["sugar"]
