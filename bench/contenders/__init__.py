"""The contenders: each module has a `make_app` that returns the app and its engine, or an object with the engine.

All serve the endpoints of `bench.shop`, each as its own documentation recommends.  To add one, write
its module and add it to the list below.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from bench.shop import engine_options

FLOOR = "hand-written"


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        kind: ``"flask"``, ``"fastapi-async"`` or ``"fastapi-sync"``; ratios are taken within a kind.
        name: the name of the row; the other contenders are compared with the one named `FLOOR`.
        module: the module that contains its ``make_app``.
        commits: whether it commits by itself instead of in the endpoint.
        options: the options of ``make_app``.
        endpoints: the endpoints in which it differs from the row above; all if empty.
        served: False if it is only measured without a server.
    """

    kind: str
    name: str
    module: str
    commits: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    endpoints: tuple[str, ...] = ()
    served: bool = True

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    def make_app(self, url: str, **options: Any) -> tuple[Any, Any]:
        """Create the app for the database ``url``; return it with its engine, or an object that has an ``engine``."""
        module = import_module(f"bench.contenders.{self.module}")
        made: tuple[Any, Any] = module.make_app(url, engine_options(url, **options), **self.options)
        return made


AUTOCOMMIT = "session_plugin, read_only_autocommit"
COMMITTING = f"{FLOOR}, COMMIT after a read"
COMMIT = {"commit_reads": True}
EMPTY = "FastAPI, an empty dependency"
UNUSED = ("bare", "declared")

CONTENDERS = [
    Contender("flask", FLOOR, "flask_hand_written"),
    Contender("flask", COMMITTING, "flask_hand_written", options=COMMIT, endpoints=("read",), served=False),
    Contender("flask", "Flask-SQLAlchemy", "flask_sqlalchemy"),
    Contender("flask", "Flask-SQLAlchemy-Lite", "flask_sqlalchemy_lite"),
    Contender("flask", "advanced-alchemy", "flask_advanced_alchemy", commits=True),
    Contender("flask", "session_plugin", "flask_session_plugin", commits=True),
    Contender("flask", AUTOCOMMIT, "flask_session_plugin", True, {"autocommit": True}, ("read",)),
    Contender("fastapi-async", FLOOR, "fastapi_async_hand_written"),
    Contender(
        "fastapi-async", COMMITTING, "fastapi_async_hand_written", options=COMMIT, endpoints=("read",), served=False
    ),
    Contender("fastapi-async", EMPTY, "fastapi_empty_dependency", endpoints=UNUSED, served=False),
    Contender("fastapi-async", "hand-written, try/finally", "fastapi_async_try_finally", served=False),
    Contender("fastapi-async", "yield dependency", "fastapi_async_yield", True, {"scope": "request"}),
    Contender("fastapi-async", 'yield, scope="function"', "fastapi_async_yield", True, {"scope": "function"}),
    Contender("fastapi-async", "advanced-alchemy", "fastapi_async_advanced_alchemy", commits=True),
    Contender("fastapi-async", "fastapi-async-sqlalchemy", "fastapi_async_sqlalchemy", commits=True),
    Contender("fastapi-async", "session_plugin", "fastapi_async_session_plugin", commits=True),
    Contender("fastapi-async", AUTOCOMMIT, "fastapi_async_session_plugin", True, {"autocommit": True}, ("read",)),
    Contender("fastapi-sync", FLOOR, "fastapi_sync_hand_written"),
    Contender(
        "fastapi-sync", COMMITTING, "fastapi_sync_hand_written", options=COMMIT, endpoints=("read",), served=False
    ),
    Contender("fastapi-sync", EMPTY, "fastapi_empty_dependency", False, {"is_async": False}, UNUSED, served=False),
    Contender("fastapi-sync", "yield dependency", "fastapi_sync_yield", True, {"scope": "request"}),
    Contender("fastapi-sync", 'yield, scope="function"', "fastapi_sync_yield", True, {"scope": "function"}),
    Contender("fastapi-sync", "advanced-alchemy", "fastapi_sync_advanced_alchemy", commits=True),
    Contender("fastapi-sync", "session_plugin", "fastapi_sync_session_plugin", commits=True),
    Contender("fastapi-sync", AUTOCOMMIT, "fastapi_sync_session_plugin", True, {"autocommit": True}, ("read",)),
]

KINDS = list(dict.fromkeys(each.kind for each in CONTENDERS))
NAMES = list(dict.fromkeys(each.name for each in CONTENDERS))
OURS = "session_plugin"


def of_kind(kind: str, only: Collection[str] = ()) -> list[Contender]:
    """The contenders of ``kind``, the floor first; if ``only`` is given, the floor and those named in it."""
    return [each for each in CONTENDERS if each.kind == kind and (not only or each.name in {FLOOR, *only})]


def by_key(key: str) -> Contender:
    """The contender with this `Contender.key`."""
    return next(each for each in CONTENDERS if each.key == key)
