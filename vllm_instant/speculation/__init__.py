"""How many tokens are drafted and verified: the budget, its plan, what is accepted; without vLLM."""
