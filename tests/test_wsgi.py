from .apps import PlainWSGIHarness
from .contract import Contract, on


@on(PlainWSGIHarness)
class TestContract(Contract):
    """The promises."""
