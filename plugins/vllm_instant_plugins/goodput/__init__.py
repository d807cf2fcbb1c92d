"""The ``goodput`` speculation policy: draft only where it brings more tokens a second.

``policy`` puts it together from ``acceptance`` (how likely drafts are to be kept), ``costs`` (what a step takes here),
``choice`` (the best plan), ``explorer`` and ``allowance`` (when to try something else, and at what price), ``goals``
(latency goals), ``trace`` (why) and ``store`` (what the next start should know).
"""
