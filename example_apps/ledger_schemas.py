"""The request bodies of the FastAPI apps."""

from pydantic import BaseModel


class AccountIn(BaseModel):
    name: str
    deposit: int


class TransferIn(BaseModel):
    source: str
    target: str
    amount: int
    receipt_to: str | None = None


class DepositsIn(BaseModel):
    deposits: list[tuple[str, int]]


class StatementIn(BaseModel):
    account: str
