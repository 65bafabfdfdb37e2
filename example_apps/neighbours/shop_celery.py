"""Celery tasks of the shop.

celery -A example_apps.neighbours.shop_celery worker
"""

import os

from celery import Celery
from celery.signals import worker_init
from sqlalchemy import func, select

from . import shop_database
from .shop_database import OutOfTapeError, db

app = Celery("shop", broker=os.environ.get("SHOP_BROKER", "memory://"))
app.conf.broker_transport_options = {
    "data_folder_in": os.environ.get("SHOP_BROKER_FOLDER"),
    "data_folder_out": os.environ.get("SHOP_BROKER_FOLDER"),
    "control_folder": os.environ.get("SHOP_BROKER_FOLDER"),
    "polling_interval": 0.05,
}
app.conf.task_ignore_result = True


@app.task(autoretry_for=(OutOfTapeError,), default_retry_delay=0, max_retries=5)
def pack(order_id: int) -> None:
    shop_database.pack(order_id)


@worker_init.connect
def query_before_fork(**signal: object) -> None:
    """Use the database in the worker's parent process, before it forks."""
    with db.session_scope() as session:
        print("parent", session.scalar(select(func.pg_backend_pid())), flush=True)
