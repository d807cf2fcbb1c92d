"""Drafts that are made elsewhere: the protocol of both ends, and the route by which clients push their own."""
