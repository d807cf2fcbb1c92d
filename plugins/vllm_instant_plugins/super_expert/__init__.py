"""Plugins of the slot ``experts``: fewer distinct experts per step under a quality budget, and plain observation."""
