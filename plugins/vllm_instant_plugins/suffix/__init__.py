"""The ``suffix`` drafter: lookup of the newest tokens in the request and in earlier outputs."""
