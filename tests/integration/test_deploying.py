"""What docs/deploying.md says of a vLLM in which the plugin is not active."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).resolve().parents[2] / "docs" / "deploying.md"
ASK_FOR_CUSTOM = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print("backend:", AttentionBackendEnum.CUSTOM.get_path())
"""
NOT_REGISTERED = "Backend CUSTOM must be registered before use."


@pytest.mark.parametrize("plugins", [None, "farspan", "lora_filesystem_resolver,farspan"])
def test_the_plugin_registers_itself(plugins: str | None) -> None:
    assert "backend: farspan." in ask_for_custom(plugins).stdout


@pytest.mark.parametrize("plugins", ["", "lora_filesystem_resolver"])
def test_left_out_by_vllm_plugins_the_backend_is_unknown(plugins: str) -> None:
    run = ask_for_custom(plugins)
    assert run.returncode == 1
    assert NOT_REGISTERED in run.stderr
    assert NOT_REGISTERED in DOC.read_text()


def ask_for_custom(plugins: str | None) -> subprocess.CompletedProcess[str]:
    """Ask vLLM for the backend CUSTOM in a fresh process. plugins: VLLM_PLUGINS, None where it is not set."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-c", ASK_FOR_CUSTOM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
