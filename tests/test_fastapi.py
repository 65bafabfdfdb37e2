from .apps import AsyncFastAPIHarness, SyncFastAPIHarness
from .contract import Contract, on


@on(AsyncFastAPIHarness)
class TestAsyncContract(Contract):
    """The promises."""


@on(SyncFastAPIHarness)
class TestSyncContract(Contract):
    """The promises."""
