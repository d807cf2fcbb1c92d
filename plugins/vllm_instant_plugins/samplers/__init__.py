"""Rejection samplers: ``token``, ``block`` and ``relaxed``."""
