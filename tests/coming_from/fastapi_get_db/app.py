from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import create_engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

engine = create_engine("sqlite:///./shop.db", connect_args={"check_same_thread": False})
SessionLocal = sessionmaker(autoflush=False, bind=engine)


def get_db():
    db = SessionLocal()
    try:
        yield db
    finally:
        db.close()


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    stock: Mapped[int] = mapped_column(default=0)


class ItemIn(BaseModel):
    name: str
    stock: int = 0


class ItemOut(ItemIn):
    model_config = ConfigDict(from_attributes=True)
    id: int


app = FastAPI()


@app.exception_handler(IntegrityError)
def conflict(request: Request, error: IntegrityError):
    return JSONResponse({"detail": "conflict"}, status_code=409)


def find_item(item_id: int, db: Session = Depends(get_db)) -> Item:
    item = db.get(Item, item_id)
    if item is None:
        raise HTTPException(404, "No such item.")
    return item


@app.post("/items", response_model=ItemOut, status_code=201)
def create_item(given: ItemIn, db: Session = Depends(get_db)):
    item = Item(**given.model_dump())
    db.add(item)
    db.commit()
    db.refresh(item)
    return item


@app.get("/items", response_model=list[ItemOut])
def list_items(skip: int = 0, limit: int = 100, db: Session = Depends(get_db)):
    return db.scalars(select(Item).order_by(Item.id).offset(skip).limit(limit)).all()


@app.get("/items/{item_id}", response_model=ItemOut)
def show_item(item: Item = Depends(find_item)):
    return item


@app.post("/items/{item_id}/sales", response_model=ItemOut)
def sell_item(number: int = 1, item: Item = Depends(find_item), db: Session = Depends(get_db)):
    item.stock -= number
    if item.stock < 0:
        raise HTTPException(400, "Out of stock.")
    db.commit()
    return item


@app.delete("/items/{item_id}", status_code=204)
def delete_item(item: Item = Depends(find_item), db: Session = Depends(get_db)):
    db.delete(item)
    db.commit()


def restock(number: int) -> None:
    """Run by cron: raise every item's stock."""
    with SessionLocal() as db:
        for item in db.scalars(select(Item)):
            item.stock += number
        db.commit()
