"""The plugins of the slot ``experts``: fewer distinct experts a step under a quality budget; and plain observation."""
