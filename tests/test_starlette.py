from .apps import StarletteHarness
from .contract import Contract, on


@on(StarletteHarness)
class TestContract(Contract):
    """The promises."""
