"""Drafts by lookup: what followed the newest tokens before, in the request itself and in what the server wrote."""
