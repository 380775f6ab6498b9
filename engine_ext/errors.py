"""Every exception that farspan raises on a user's mistake or an unsupported set-up.

FarspanError
├── ConfigError               an option is unknown, malformed, out of range, or contradicts another
├── UnsupportedModelError     the model needs something the backend does not do (head size, sliding window, MLA, …)
├── UnsupportedEngineError    an engine feature or version cannot work together with farspan
└── StarError                 a host of Star Attention is gone, late, or computes something else than the others

Messages say what was wrong, what was given, what is allowed, and what to do.
"""


class FarspanError(Exception):
    """Base of all exceptions raised by farspan."""


class ConfigError(FarspanError, ValueError):
    """An option is unknown, malformed, out of range, or contradicts another."""


class UnsupportedModelError(FarspanError, ValueError):
    """The model needs something that the backend does not do."""


class UnsupportedEngineError(FarspanError, RuntimeError):
    """An engine feature, platform or version cannot work together with farspan."""


class StarError(FarspanError, RuntimeError):
    """A host of Star Attention is gone, late, or computes something else than the others; the message names it."""
