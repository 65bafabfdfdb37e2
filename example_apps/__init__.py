"""The same small ledger in three apps, and a demonstration of what their responses promise."""
