from .apps import PlainASGIHarness
from .contract import Contract, on


@on(PlainASGIHarness)
class TestContract(Contract):
    """The promises."""
