"""`Database`."""

from __future__ import annotations

from ..scope.typevars import SyncS
from .configuration import Configuration
from .core import SyncCore
from .sync_interface import SyncInterface


class Database(SyncInterface[SyncS]):
    """A sync database: its engines, its session factory, and its units of work.

    ::

        db = Database("sqlite:///shop.db")
        with db.session_scope() as session:
            session.add(Order(item="tea"))
    """

    def _set_up(self, configuration: Configuration) -> None:
        self._core = SyncCore(configuration)

    @property
    def database(self) -> Database[SyncS]:
        """This object."""
        return self
