"""vLLM's V2 model runner and asynchronous scheduling on a CPU; each module is run as a program of its own."""
