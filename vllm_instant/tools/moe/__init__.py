"""Which experts a mixture-of-experts model uses together: traces, super-expert clusters, placement, budgets."""
