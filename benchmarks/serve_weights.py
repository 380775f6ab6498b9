"""Seeded random weights for `vllm serve`: `--worker-extension-cls benchmarks.serve_weights.RandomWeights`.

vLLM imports the class in its worker before the model is loaded, and with it the load format `seeded_random`.
"""

from benchmarks.engine_worker import register_random_weights

register_random_weights()


class RandomWeights:
    """Mixed into vLLM's worker; it adds nothing."""
