"""Tests of the plugins, with the contracts that vllm-instant checks."""

from bigram_plugin import BigramDrafter, ShyOptions, ShyPolicy

from vllm_instant.testing import check_drafter, check_policy


def test_the_drafter_keeps_its_contract():
    check_drafter(BigramDrafter)


def test_the_policy_keeps_its_contract():
    check_policy(lambda: ShyPolicy(ShyOptions()))
