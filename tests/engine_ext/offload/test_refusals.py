"""What sees the pages of hot heads alone is refused together with cold ones, with a sentence."""

from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError
from farspan.engine_ext.support import check_offload, has_cold_heads
from farspan.vllm_compat.platform import SCHEDULER, choose_scheduler


def engine(offload: dict[str, Any] | None, **changes: Any) -> Any:
    """An engine of 4 layers of 8 KV heads; changes: by `part__attribute`."""
    parts: dict[str, Any] = {
        "additional_config": {"farspan": {"offload": offload}},
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, use_ubatching=False),
        "cache_config": SimpleNamespace(block_size=128, kv_offloading_size=None),
        "scheduler_config": SimpleNamespace(scheduler_cls=None),
        "model_config": SimpleNamespace(
            enable_sleep_mode=False,
            get_total_num_hidden_layers=lambda: 4,
            get_total_num_kv_heads=lambda: 8,
        ),
    }
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        if attribute:
            setattr(parts[part], attribute, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


def check(config: Any) -> None:
    check_offload(config)
    choose_scheduler(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism together with offload"),
        ({"kv_transfer_config": object()}, "a KV connector together with offload"),
        ({"cache_config__kv_offloading_size": 1.0}, "a KV connector together with offload"),
        ({"model_config__enable_sleep_mode": True}, "sleep mode together with offload"),
        ({"parallel_config__use_ubatching": True}, "microbatches together with offload"),
        ({"cache_config__block_size": 256}, "block_size=256 together with offload"),
        ({"scheduler_config__scheduler_cls": "mine.Scheduler"}, "scheduler_cls='mine.Scheduler' together with offload"),
    ],
    ids=["pipeline", "connector", "vllm-offloading", "sleep", "microbatches", "block-size", "scheduler"],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    config = engine({}, **changes)
    with pytest.raises(UnsupportedEngineError) as caught:
        check(config)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value)[-1] == "."
    for without in (engine(None, **changes), engine({"hot_heads": 8}, **changes)):
        check(without)
        assert without.scheduler_config.scheduler_cls != SCHEDULER


def test_the_scheduler_is_chosen_once_and_again() -> None:
    config = engine({})
    for _ in range(2):
        check(config)
        assert config.scheduler_config.scheduler_cls == SCHEDULER


def test_cold_heads() -> None:
    assert has_cold_heads(engine({}))
    assert has_cold_heads(engine({"hot_heads": [8, 8, 8, 7]}))
    assert not has_cold_heads(engine({"hot_heads": [8, 8, 8, 8]}))
    assert not has_cold_heads(engine(None))
    with pytest.raises(ConfigError, match="one number for each of the model's 4 layers, not 2"):
        has_cold_heads(engine({"hot_heads": [1, 2]}))


@pytest.mark.faults
def test_host_memory_that_the_machine_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.vllm_compat import offload
    from farspan.vllm_compat.platform import remember_replicas

    config = engine({"host_memory": 100})
    monkeypatch.setattr(offload, "cold_options", lambda config: offload_options)
    from farspan.engine_ext.config import OffloadOptions

    worker = SimpleNamespace(vllm_config=config)
    monkeypatch.setattr(offload, "available_bytes", lambda: 120 * offload.GIB)
    # Of the four ranks of a tensor-parallel group, two are on this machine.
    here = offload.machine_of(worker)
    two = ["elsewhere", here, here, "elsewhere"]
    offload_options = OffloadOptions(host_memory=100)
    assert offload.host_budget(worker, two) == 50 * offload.GIB
    offload_options = OffloadOptions()
    assert offload.host_budget(worker, two) == 36 * offload.GIB
    offload_options = OffloadOptions(host_memory=121)
    with pytest.raises(ConfigError, match=r"host_memory=121.*; allowed: up to 120\.0 GiB"):
        offload.host_budget(worker, two)
    # Of two engines side by side, each asks for its half, while the other may have its own.
    config.parallel_config.data_parallel_size_local = 2
    remember_replicas(config.parallel_config)
    # As vLLM does in the process of each.
    config.parallel_config.data_parallel_size_local = 1
    offload_options = OffloadOptions(host_memory=200)
    assert offload.host_budget(worker, [here]) == 100 * offload.GIB
    # Hosts of Star Attention on one machine share it too.
    exchange = SimpleNamespace(num_on_machine=4, host_bytes=None)
    monkeypatch.setattr(offload, "current", lambda: exchange)
    assert offload.host_budget(worker, [here]) == 25 * offload.GIB
    exchange.num_on_machine = 1
    offload_options = OffloadOptions(host_memory=250)
    with pytest.raises(ConfigError, match=r"host_memory=250.*; allowed: up to 240\.0 GiB"):
        offload.host_budget(worker, [here])


@pytest.mark.faults
def test_a_host_that_replaces_another_takes_its_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is free while the other host has its share, the same part would be less."""
    from farspan.engine_ext.config import OffloadOptions
    from farspan.vllm_compat import offload

    config = engine({})
    config.parallel_config.data_parallel_size_local = 1
    worker = SimpleNamespace(vllm_config=config)
    monkeypatch.setattr(offload, "cold_options", lambda config: OffloadOptions())
    exchange = SimpleNamespace(num_on_machine=2, host_bytes=None)
    monkeypatch.setattr(offload, "current", lambda: exchange)
    monkeypatch.setattr(offload, "available_bytes", lambda: 100 * offload.GIB)
    here = [offload.machine_of(worker)]
    assert offload.host_budget(worker, here) == 30 * offload.GIB
    exchange = SimpleNamespace(num_on_machine=2, host_bytes=30 * offload.GIB)
    monkeypatch.setattr(offload, "available_bytes", lambda: 70 * offload.GIB)
    assert offload.host_budget(worker, here) == 30 * offload.GIB
    # Of two ranks on one machine each needs as much.
    monkeypatch.setattr(offload, "available_bytes", lambda: 50 * offload.GIB)
    with pytest.raises(ConfigError, match=r"as much host memory for KV, 60\.0 GiB; this machine.* has 50\.0 GiB free"):
        offload.host_budget(worker, here * 2)


def test_spans_are_neither_for_lists_of_blocks_nor_for_blocks_of_a_context() -> None:
    """Both read keys anywhere in a request, which a buffer for a span does not hold."""
    from farspan.vllm_compat.offload import has_spans

    for options, expected in (({}, True), ({"star": {}}, False), ({"prefill": {"method": "flex"}}, False)):
        assert has_spans(engine(None, additional_config={"farspan": {"offload": {}, **options}})) is expected
