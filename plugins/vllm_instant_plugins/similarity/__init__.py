"""The ``similarity`` scheduling policy: shortest predicted job first, with a bounded extra wait relative to FCFS."""
