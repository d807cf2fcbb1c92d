"""Contracts of plugins as tests, for the test suite of a plugin's author.

Each function builds the plugin several times, puts it through requests of many kinds, and raises ``ContractError`` (an
``AssertionError``) with one sentence where the plugin breaks its interface. No engine and no vLLM is needed:

    def test_contract():
        check_drafter(lambda: MyDrafter())
"""

from vllm_instant.testing.drafters import check_drafter, checked_draft
from vllm_instant.testing.policies import check_policy
from vllm_instant.testing.reachable import ContractError
from vllm_instant.testing.samplers import check_sampler

__all__ = ["ContractError", "check_drafter", "check_policy", "check_sampler", "checked_draft"]
