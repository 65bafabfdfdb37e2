import pytest
from app import Base, Item, app, get_db, restock
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

engine = create_engine("sqlite://", connect_args={"check_same_thread": False}, poolclass=StaticPool)
TestingSessionLocal = sessionmaker(autoflush=False, bind=engine)


def override_get_db():
    db = TestingSessionLocal()
    try:
        yield db
    finally:
        db.close()


app.dependency_overrides[get_db] = override_get_db


@pytest.fixture(autouse=True)
def tables():
    Base.metadata.create_all(bind=engine)
    yield
    Base.metadata.drop_all(bind=engine)


@pytest.fixture
def client():
    with TestClient(app) as client:
        yield client


@pytest.fixture
def tea():
    with TestingSessionLocal() as session:
        session.add(Item(name="tea", stock=2))
        session.commit()


def stock():
    with TestingSessionLocal() as session:
        return session.get(Item, 1).stock


def test_create_item(client):
    response = client.post("/items", json={"name": "tea", "stock": 2})
    assert (response.status_code, response.json()) == (201, {"id": 1, "name": "tea", "stock": 2})
    assert stock() == 2


def test_a_name_is_taken_once(client, tea):
    response = client.post("/items", json={"name": "tea"})
    assert (response.status_code, response.json()) == (409, {"detail": "conflict"})


def test_list_items(client, tea):
    for name in ("milk", "sugar"):
        assert client.post("/items", json={"name": name}).status_code == 201
    assert [item["name"] for item in client.get("/items?skip=1&limit=1").json()] == ["milk"]


def test_sell_item(client, tea):
    assert client.post("/items/1/sales?number=2").json()["stock"] == 0
    assert stock() == 0


def test_what_is_refused_is_not_saved(client, tea):
    assert client.post("/items/1/sales?number=3").status_code == 400
    assert stock() == 2


def test_delete_item(client, tea):
    assert client.delete("/items/1").status_code == 204
    assert client.get("/items/1").status_code == 404


def test_restock(client, tea, monkeypatch):
    monkeypatch.setattr("app.SessionLocal", TestingSessionLocal)
    restock(3)
    assert client.get("/items/1").json()["stock"] == 5
