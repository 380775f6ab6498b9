"""What runs inside vLLM's engine: the option tree, the attention backend, its metadata and its forward pass."""
