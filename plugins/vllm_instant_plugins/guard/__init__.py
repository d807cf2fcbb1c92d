"""The guard plugins: rules, a classifier, a guard model, and tiers of them."""
