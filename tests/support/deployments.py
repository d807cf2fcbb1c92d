"""Deployment files that several engine tests serve; DRAFT stands for the draft model's folder."""

DRAFT_MODEL = """
[speculation]
plugin = "cycling"

[drafter]
plugin = "model"
model = "DRAFT"
num_speculative_tokens = 5
draft_sample_method = "probabilistic"
"""

GOODPUT = """
[drafter]
plugin = "model"
model = "DRAFT"
num_speculative_tokens = 5
draft_sample_method = "probabilistic"
"""

BURSTS = (
    GOODPUT
    + """
[speculation]
plugin = "bursts"
"""
)

TOKEN_BY_TOKEN = (
    DRAFT_MODEL
    + """
[rejection_sampler]
plugin = "token"
"""
)

NGRAM = """
[speculation]
plugin = "cycling"

[drafter]
plugin = "ngram"
num_speculative_tokens = 5

[batching]
plugin = "shuffled"
"""

SUFFIX = """
[speculation]
plugin = "cycling"

[drafter]
plugin = "suffix"
num_speculative_tokens = 6
"""

HYBRID = """
[speculation]
plugin = "cycling"

[drafter]
plugin = "hybrid"
model = "DRAFT"
num_speculative_tokens = 6
draft_sample_method = "probabilistic"

[batching]
plugin = "similarity"
itl_slo_ms = 60
keep_lengths = false
"""

EXAMPLE = """
[speculation]
plugin = "shy"

[drafter]
plugin = "bigram"
num_speculative_tokens = 6
"""

RAISING = """
[speculation]
plugin = "raising"

[drafter]
plugin = "raising"
num_speculative_tokens = 4
"""
