"""The ``remote`` drafter: drafts that a draft server or the client's own device sends while the engine runs."""
