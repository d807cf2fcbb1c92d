"""Load tests that find latency spikes and say why; the users and scenarios need Locust, the rest does not."""
