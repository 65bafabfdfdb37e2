"""The database in an app's configuration, which wins over the code, so that tests never reach production."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..database.configuration import Configuration, is_late
from ..engines.backends import backend_for
from ..engines.registry import DEFAULT
from ..exceptions import ConfigurationError


def configured(app: Flask, configuration: Configuration) -> Configuration:
    """Return ``configuration`` updated from the app's own.

    Engines that it names replace all those of the code: one that it forgets must be an error and not
    production.

    Raises:
        ConfigurationError: a key has a value of the wrong type.
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
        raise ConfigurationError(
            f"app.config[{key!r}] must be a dict, and is of type {type(value).__name__}. Give a dict, such as "
            '{"reports": "sqlite:///reports.db"}.'
        )
    return value


def _in_folder(folder: str, source: Any) -> Any:
    """Return ``source`` with each relative SQLite path in it put into ``folder``."""
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
        return given  # the database reports what is wrong with it
    return backend_for(url.get_backend_name()).in_folder(url, folder)
