"""Measures the cost of a session: all contenders serve the same endpoints on the same machine in one run.

``make bench`` runs it; README.md in this folder explains its tables.
"""
