"""vLLM servers: for rollouts and for teachers."""
