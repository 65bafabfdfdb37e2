"""`AsyncDatabase`."""

from __future__ import annotations

from ..scope.typevars import AsyncS
from .async_interface import AsyncInterface
from .configuration import Configuration
from .core import AsyncCore


class AsyncDatabase(AsyncInterface[AsyncS]):
    """An async database: its engines, its session factory, and its units of work.

    ``expire_on_commit`` is False unless given, since an async session cannot load lazily what
    its commit has expired.
    """

    def _set_up(self, configuration: Configuration) -> None:
        self._core = AsyncCore(configuration)

    @property
    def database(self) -> AsyncDatabase[AsyncS]:
        """This object."""
        return self
