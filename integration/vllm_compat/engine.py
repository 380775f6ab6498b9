"""What is to be known of a running `LLM` whose core is in this process. Drop what vLLM tells by itself."""

from typing import Any


def num_computed_tokens(llm: Any, request_id: str) -> int:
    """Tokens of a request whose KV is computed or being computed; 0 for one that is not there.

    request_id: as `LLMEngine.add_request` returns it.
    """
    request = llm.llm_engine.engine_core.engine_core.scheduler.requests.get(request_id)
    return 0 if request is None else int(request.num_computed_tokens)


def num_linear_weights(llm: Any) -> int:
    """Weights that every token is multiplied with, embeddings left out."""

    def count(worker: Any) -> int:
        model = worker.model_runner.get_model()
        named = model.named_parameters()
        return sum(
            each.numel() for name, each in named if each.dim() > 1 and "embed" not in name and "head" not in name
        )

    return int(llm.collective_rpc(count)[0])
