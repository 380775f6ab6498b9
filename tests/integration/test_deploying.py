"""What docs/deploying.md says of a vLLM in which the plugin is not active."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from farspan.engine_ext.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "deploying.md"
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


def test_the_kubernetes_example_starts_a_server_that_fits() -> None:
    """Its options are farspan's and vLLM's, its port is one, and pinned memory is within the container's limit."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    claim, deployment, service = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    template = deployment["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
    assert arguments.attention_backend == "CUSTOM"
    config = parse_config(arguments.additional_config["farspan"])
    assert config.offload is not None
    assert isinstance(config.offload.host_memory, int | float)
    limits = container["resources"]["limits"]
    assert config.offload.host_memory + 32 <= int(limits["memory"].removesuffix("Gi"))
    assert limits["nvidia.com/gpu"] == 1
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == arguments.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
