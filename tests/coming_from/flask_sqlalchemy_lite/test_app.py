import pytest
from app import Base, Customer, Order, StatsBase, Visit, create_app, db
from sqlalchemy import select


@pytest.fixture
def app():
    app = create_app({"TESTING": True, "SQLALCHEMY_ENGINES": {"default": "sqlite://", "stats": "sqlite://"}})
    with app.app_context():
        Base.metadata.create_all(db.engine)
        StatsBase.metadata.create_all(db.engines["stats"])
    return app


@pytest.fixture
def app_ctx(app):
    with app.app_context() as context:
        yield context


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def ada(app_ctx):
    customer = Customer(name="Ada")
    db.session.add(customer)
    db.session.commit()
    return customer


def test_create_customer(app, client):
    response = client.post("/customers", json={"name": "Grace"})
    assert (response.status_code, response.json) == (201, {"id": 1, "name": "Grace"})
    with app.app_context():
        assert db.session.get(Customer, 1).name == "Grace"


def test_a_name_is_taken_once(client):
    assert client.post("/customers", json={"name": "Grace"}).status_code == 201
    assert client.post("/customers", json={"name": "Grace"}).status_code == 409
    assert client.post("/customers", json={"name": "Ada"}).status_code == 201


def test_show_customer(client, ada):
    db.session.add(Order(item="tea", customer=ada))
    db.session.commit()
    assert client.get("/customers/Ada").json == {"name": "Ada", "orders": ["tea"]}
    assert db.session.scalars(select(Visit.path)).all() == ["/customers/Ada"]


def test_no_such_customer(client):
    assert client.get("/customers/Grace").status_code == 404
    assert "No such customer." in client.post("/customers/2/orders", json={"item": "tea"}).text


def test_orders(app, client):
    client.post("/customers", json={"name": "Ada"})
    for item, status in (("tea", 201), ("gold", 409), ("milk", 201)):
        assert client.post("/customers/1/orders", json={"item": item}).status_code == status
    assert client.get("/orders").json == ["tea", "milk"]
    assert client.delete("/orders/1").status_code == 204
    with app.app_context():
        assert db.session.scalars(select(Order.item)).all() == ["milk"]


def test_restock(app, client, ada):
    assert app.test_cli_runner().invoke(args=["restock", "sugar"]).output == "1 ordered\n"
    assert client.get("/orders").json == ["sugar"]


def test_a_session_of_ones_own(app_ctx):
    with db.sessionmaker() as session:
        session.add(Customer(name="Ada"))
        session.commit()
    assert db.session.scalar(select(Customer.name)) == "Ada"
