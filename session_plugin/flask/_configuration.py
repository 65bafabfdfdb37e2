"""What an app's configuration says of its database; it wins over the code, so that tests never reach production."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flask import Flask
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..configuration import DEFAULT, Configuration, is_late
from ..exceptions import ConfigurationError


def configured(app: Flask, configuration: Configuration) -> Configuration:
    """``configuration`` with what the app's own says.

    Engines that it names replace those of the code, all of them: one that it forgot must be an
    error and not production.

    Raises:
        ConfigurationError: a key holds something of another kind.
    """
    engines: dict[str, Any] = {}
    for key in ("SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINES"):
        engines.update({name or DEFAULT: given for name, given in _mapping(app, key).items()})
    if (uri := app.config.get("SQLALCHEMY_DATABASE_URI")) is not None:
        engines[DEFAULT] = uri
    source = _in_folder(app.instance_path, engines or configuration.source)
    return configuration.updated(source, _mapping(app, "SQLALCHEMY_ENGINE_OPTIONS"))


def _mapping(app: Flask, key: str) -> Mapping[Any, Any]:
    value = app.config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"app.config[{key!r}] must be a dict, and is of type {type(value).__name__}.")
    return value


def _in_folder(folder: str, source: Any) -> Any:
    """``source``, but each relative SQLite path in it lies in ``folder``."""
    if is_late(source):
        return lambda: _in_folder(folder, source())
    if isinstance(source, Mapping):
        return {name: _engine_in_folder(folder, given) for name, given in source.items()}
    return _url_in_folder(folder, source)


def _engine_in_folder(folder: str, given: Any) -> Any:
    if isinstance(given, Mapping):
        return {**given, "url": _url_in_folder(folder, given.get("url"))}
    return _url_in_folder(folder, given)


def _url_in_folder(folder: str, given: Any) -> Any:
    if not isinstance(given, str | URL):
        return given
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        return given  # the database says what is wrong with it
    path = url.database
    if url.get_backend_name() != "sqlite" or path in (None, "", ":memory:") or path.startswith("file:"):
        return given
    if Path(path).is_absolute():
        return given
    Path(folder).mkdir(parents=True, exist_ok=True)
    return url.set(database=str(Path(folder) / path))
