"""Lookup and draft model together: for each request and step, whichever is expected to bring more."""
