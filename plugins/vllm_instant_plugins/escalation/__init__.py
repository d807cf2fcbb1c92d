"""Which end answers a request: ``rules``, ``label`` and ``learned``."""
