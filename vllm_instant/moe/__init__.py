"""What serving a mixture of experts needs: router scores, expert groups and routing traces; without vLLM."""
