"""Connections: how engines are made, how transactions begin, who waits for a connection, and what is done on it.

Nothing here knows of a unit of work.
"""
