"""The database in an app's configuration, which wins over the code, so that tests never reach production."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..database.configuration import Configuration
from ..database.late_source import copied
from ..engines.backends import backend_for
from ..engines.registry import DEFAULT
from ..exceptions import ConfigurationError

KEYS = ("SQLALCHEMY_DATABASE_URI", "SQLALCHEMY_ENGINES", "SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINE_OPTIONS")


class FlaskSettings:
    """What the configuration of an app says of its database; test suites change it after ``init_app()``."""

    def __init__(self, app: Flask, configuration: Configuration) -> None:
        """Note the settings of ``app``; ``configuration`` is what the code says."""
        self._config = app.config  # and not the app, which nothing else keeps
        self._folder = app.instance_path
        self._in_code = configuration
        self._noted: list[Any] = []

    def changed(self) -> Configuration | None:
        """Return the configuration with the settings of now, or None if these are the same as before."""
        get = self._config.get
        if [get(key) for key in KEYS] == self._noted:
            return None
        return self.configured()

    def configured(self) -> Configuration:
        """Return what the code says, updated from the app's configuration.

        Engines that it names replace all those of the code: one that it forgets must be an error and not
        production.

        Raises:
            ConfigurationError: a key has a value of the wrong type.
        """
        noted = [copied(self._config.get(key)) for key in KEYS]  # first: another thread may change them meanwhile
        engines: dict[str, Any] = {}
        for key in ("SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINES"):
            engines.update({name or DEFAULT: given for name, given in self._mapping(key).items()})
        if (uri := self._config.get("SQLALCHEMY_DATABASE_URI")) is not None:
            engines[DEFAULT] = uri
        source = self.completed(engines or self._in_code.source)
        configuration = self._in_code.updated(source, self._mapping("SQLALCHEMY_ENGINE_OPTIONS"))
        self._noted = noted
        return configuration

    def completed(self, source: Any) -> Any:
        """Return ``source`` with each relative SQLite path in it put into the app's instance folder."""
        if isinstance(source, Mapping):
            return {name: _engine_in_folder(self._folder, given) for name, given in source.items()}
        return _url_in_folder(self._folder, source)

    def _mapping(self, key: str) -> Mapping[Any, Any]:
        value = self._config.get(key) or {}
        if not isinstance(value, Mapping):
            raise ConfigurationError(
                f"app.config[{key!r}] must be a dict, and is of type {type(value).__name__}. Give a dict, such as "
                '{"reports": "sqlite:///reports.db"}.'
            )
        return value


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
