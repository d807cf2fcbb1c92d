"""The ``similarity`` batching policy: it learns how long answers will be, and lets nobody wait much longer for it."""
