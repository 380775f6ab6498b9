"""What the coordinator decides without any host: the device, and which of several errors to tell."""

import sys

import pytest
from farspan.engine_ext.errors import StarError, UnsupportedEngineError
from farspan.star import StarLLM
from farspan.star.coordinator import HostFailed, HostLost, choose_device, worst


def test_a_gpu_for_every_host() -> None:
    assert choose_device(2, {"CPU": 4.0}) == "cpu"
    assert choose_device(2, {"CPU": 4.0, "GPU": 2.0}) == "cuda"
    with pytest.raises(StarError, match="hosts=3; the Ray cluster has 1 GPU, and every host needs one of its own"):
        choose_device(3, {"GPU": 1.0})


def test_a_lost_host_is_told_before_those_that_waited_for_it() -> None:
    waited, lost, bad = StarError("waited"), HostLost(2, "lost"), ValueError("bad")
    assert worst({0: waited, 1: bad, 2: lost}) is lost
    assert worst({0: bad, 1: waited}) is waited
    failed = HostFailed("failed")
    assert worst({0: waited, 1: failed}) is failed
    assert worst({1: bad}) is bad


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedEngineError, match=r"pip install farspan\[ray\]"):
        StarLLM("nowhere", 2, skip_tokenizer_init=True)
