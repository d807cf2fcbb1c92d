"""The ``goodput`` speculation policy: draft only where that yields more tokens per second.

``policy`` runs one step as a pipeline: it estimates acceptance (``vllm_instant_plugins.acceptance``) and step times
(``costs``, ``experts``), finds the best plan (``planner``), decides whether to try something else in order to learn
(``exploration``), prices drafts for drafters with confidences (``draft_cost``), and records the decision
(``decision_log``). ``request_table`` holds what is known of live requests; ``latency_slo`` turns latency goals into
weights.
"""
