"""farspan: long prompts made cheap, as a plugin for vLLM.

vLLM loads the plugin by its entry point; what is exported here checks options and catches refusals, without torch.
"""

from importlib import metadata

from farspan.engine_ext.config import FarspanConfig, parse_config
from farspan.engine_ext.errors import (
    ConfigError,
    FarspanError,
    StarError,
    UnsupportedEngineError,
    UnsupportedModelError,
)

__version__ = metadata.version("farspan")

__all__ = [
    "ConfigError",
    "FarspanConfig",
    "FarspanError",
    "StarError",
    "UnsupportedEngineError",
    "UnsupportedModelError",
    "__version__",
    "parse_config",
]
