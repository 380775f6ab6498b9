"""What is to be known of a running `LLM` whose core is in this process. Drop what vLLM tells by itself."""

import inspect
from typing import Any


def num_computed_tokens(llm: Any, request_id: str) -> int:
    """Tokens of a request whose KV is computed or being computed; 0 for one that is not there.

    request_id: as `LLMEngine.add_request` returns it.
    """
    request = llm.llm_engine.engine_core.engine_core.scheduler.requests.get(request_id)
    return 0 if request is None else int(request.num_computed_tokens)


def num_cached_tokens(llm: Any, request_id: str) -> int:
    """Tokens that a request, which waits for its first step, will find in the prefix cache."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.kv_cache_manager.get_computed_blocks(scheduler.requests[request_id])[1])


def ignore_cached_pages(llm: Any, request_id: str) -> None:
    """Let a request that waits for its first step compute all of its prompt."""
    llm.llm_engine.engine_core.engine_core.scheduler.requests[request_id].skip_reading_prefix_cache = True


def adopt_pages(llm: Any, request_id: str, num_tokens: int) -> None:
    """Let a request that waits for its first step find whole pages of its prompt in the prefix cache: those that are
    not there get a place, whose KV the caller brings before any step reads it. Raises ValueError without room.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    request, pool = scheduler.requests[request_id], scheduler.kv_cache_manager.block_pool
    page_size = scheduler.kv_cache_manager.block_pool.hash_block_size
    found = scheduler.kv_cache_manager.get_computed_blocks(request)[0].blocks[0]
    pages, num_pages = list(found), num_tokens // page_size
    if len(pages) >= num_pages:
        return
    pool.touch(pages)
    num_cached = len(pages)
    pages += pool.get_new_blocks(num_pages - num_cached)
    pool.cache_full_blocks(request, pages, num_cached, num_pages, page_size, 0)
    # Free, but cached: the request takes them at its first step, and the last would go first.
    pool.free_blocks(reversed(pages))


def host_bytes_of(llm: Any) -> int | None:
    """Host memory for KV of each rank; None without cold heads."""
    sizes = getattr(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config, "farspan_offload", None)
    return None if sizes is None else int(sizes.num_blocks * sizes.page_bytes)


def draw_by_place_in_answer(llm: Any) -> None:
    """Let sampled tokens depend on their place in the answer instead of in the prompt, whose length hosts differ in.

    Runner V2 draws by seed and position; runner V1 has a generator for each request, which needs nothing. Doing so
    again changes nothing.
    """
    llm.collective_rpc(wrap_sampler)


def wrap_sampler(worker: Any) -> None:
    """See `draw_by_place_in_answer`."""
    runner = worker.model_runner
    sampler: Any = runner.sampler
    states = getattr(runner, "req_states", None)
    if states is None or "_sample_random" in vars(sampler):
        return
    stock = sampler._sample_random
    signature = inspect.signature(stock)

    def sample_random(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        rows = bound.arguments["expanded_idx_mapping"]
        # On the device; 0 for the first token.
        bound.arguments["pos"] = bound.arguments["pos"] + 1 - states.prompt_len.gpu[rows]
        return stock(*bound.args, **bound.kwargs)

    sampler._sample_random = sample_random


def num_linear_weights(llm: Any) -> int:
    """Weights that every token is multiplied with on a rank, embeddings left out."""

    def count(worker: Any) -> int:
        embeds = ("embed", "head")
        return sum(
            each.numel()
            for name, each in worker.model_runner.get_model().named_parameters()
            if each.dim() > 1 and not any(part in name for part in embeds)
        )

    # The CPU platform packs weights away.
    num_ranks = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    return int(llm.collective_rpc(count)[0]) or weights_by_config(llm.llm_engine.model_config) // num_ranks


def weights_by_config(model_config: Any) -> int:
    """The same from a dense model's configuration."""
    config = model_config.hf_text_config
    hidden = config.hidden_size
    heads = config.num_attention_heads + model_config.get_total_num_kv_heads()
    attention = 2 * hidden * heads * model_config.get_head_size()
    return int(config.num_hidden_layers * (attention + 3 * hidden * getattr(config, "intermediate_size", 4 * hidden)))
