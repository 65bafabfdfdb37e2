from .apps import FlaskHarness
from .contract import Contract, on


@on(FlaskHarness)
class TestContract(Contract):
    """The promises."""
