"""What a session costs: each contender serves the same endpoints on the same machine in one run.

``make bench`` runs it; README.md beside this file says how to read its tables.
"""
