"""Rejection samplers: ``token``, ``block``, ``relaxed`` and ``cascade``."""
