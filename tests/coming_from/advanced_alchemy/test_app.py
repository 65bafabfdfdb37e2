import os

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import NullPool, create_engine, select

os.environ["DATABASE_URL"] = "sqlite+aiosqlite:///test.db"

from app import Item, app, restock

engine = create_engine("sqlite:///test.db", poolclass=NullPool)


@pytest.fixture
def client():
    with TestClient(app) as client:
        yield client
    Item.metadata.drop_all(engine)


def saved():
    with engine.connect() as connection:
        return dict(connection.execute(select(Item.name, Item.stock)).all())


@pytest.fixture
def tea(client):
    assert client.post("/items", json={"name": "tea", "stock": 2}).status_code == 201


def test_create_item(client):
    response = client.post("/items", json={"name": "tea", "stock": 2})
    assert (response.status_code, response.json()) == (201, {"id": 1, "name": "tea", "stock": 2})
    assert saved() == {"tea": 2}


def test_a_name_is_taken_once(client, tea):
    response = client.post("/items", json={"name": "tea"})
    assert (response.status_code, response.json()) == (409, {"detail": "conflict", "items": 1})


def test_list_items(client, tea):
    for name in ("milk", "sugar"):
        assert client.post("/items", json={"name": name}).status_code == 201
    page = client.get("/items?page=2").json()
    assert ([item["name"] for item in page["items"]], page["total"]) == (["sugar"], 3)


def test_export_items(client, tea):
    assert client.get("/items.csv").text == "tea,2\n"


def test_sell_item(client, tea):
    assert client.post("/items/1/sales?number=2").json()["stock"] == 0
    assert saved() == {"tea": 0}


def test_what_is_refused_is_not_saved(client, tea):
    assert client.post("/items/1/sales?number=3").status_code == 400
    assert saved() == {"tea": 2}


def test_delete_item(client, tea):
    assert client.delete("/items/1").status_code == 204
    assert client.get("/items/1").status_code == 404
    assert saved() == {}


def test_restock(client, tea):
    client.portal.call(restock, 3)
    assert saved() == {"tea": 5}
