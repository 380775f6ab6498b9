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
        embeds = ("embed", "head")
        return sum(
            each.numel()
            for name, each in worker.model_runner.get_model().named_parameters()
            if each.dim() > 1 and not any(part in name for part in embeds)
        )

    # The CPU platform packs weights away.
    return int(llm.collective_rpc(count)[0]) or weights_by_config(llm.llm_engine.model_config)


def weights_by_config(model_config: Any) -> int:
    """The same from a dense model's configuration."""
    config = model_config.hf_text_config
    hidden = config.hidden_size
    heads = config.num_attention_heads + model_config.get_total_num_kv_heads()
    attention = 2 * hidden * heads * model_config.get_head_size()
    return int(config.num_hidden_layers * (attention + 3 * hidden * getattr(config, "intermediate_size", 4 * hidden)))
