"""Flask's extensions that look for Flask-SQLAlchemy in ``app.extensions``."""

import pytest
from flask import Flask
from flask_debugtoolbar import DebugToolbarExtension
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import select

from session_plugin import ConfigurationError
from session_plugin.flask import SessionPlugin

from .conftest import Store, make_store
from .harness import Base, Parent


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Store:
    return make_store(request, "sqlite+pysqlite")


def test_registered_on_request() -> None:
    """The plugin is ``app.extensions["sqlalchemy"]`` if asked to, with what such extensions read from there."""
    db = SessionPlugin("sqlite://", metadata=Base.metadata)
    app = Flask(__name__)
    db.init_app(app, register_as_sqlalchemy=True)
    found = app.extensions["sqlalchemy"]
    assert found is db
    with app.app_context():
        assert found.metadata is Base.metadata
        assert dict(found.engines) == {"default": found.engine}
        assert found.session.bind is found.engine


def test_not_registered_unless_asked_to() -> None:
    """Flask-SQLAlchemy can be initialised beside the plugin."""
    app = Flask(__name__)
    SessionPlugin("sqlite://").init_app(app)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigurationError, match="is set already, by an object of type SQLAlchemy"):
        SessionPlugin("sqlite://").init_app(app, register_as_sqlalchemy=True)
    assert "sqlalchemy" not in Flask(__name__).extensions


def test_the_debug_toolbar(store: Store) -> None:
    """It works beside a registered plugin; its SQLAlchemy panel shows no queries."""
    app = Flask(__name__)
    app.config.update(SECRET_KEY="secret", DEBUG_TB_INTERCEPT_REDIRECTS=False)
    app.debug = True
    db = SessionPlugin(store.url)
    db.init_app(app, register_as_sqlalchemy=True)
    DebugToolbarExtension(app)

    @app.get("/<name>")
    def add(name: str) -> str:
        db.session.add(Parent(name=name))
        db.session.flush()
        return f"<html><body>{db.session.scalar(select(Parent.name))}</body></html>"

    page = app.test_client().get("/tea").text
    assert page.startswith("<html><body>tea")
    assert "<small>0 queries</small>" in page
    assert store.names() == ["tea"]
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()
