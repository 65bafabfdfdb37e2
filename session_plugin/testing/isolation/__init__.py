"""``db.isolated()``: one connection for each engine, whose transaction is never committed."""
