"""The ``hybrid`` drafter: lookup and draft model, for each request and step whichever is expected to gain more."""
