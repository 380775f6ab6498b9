"""The entry point that vLLM calls in every process: front end, engine core and workers."""

_registered = False


def register() -> None:
    """Make farspan vLLM's attention backend CUSTOM; calling it again changes nothing.

    Imports lazily: vLLM logs and swallows an exception raised while it loads an entry point, and a broken import would
    then silently disable the plugin.
    """
    global _registered
    if _registered:
        return
    from farspan import vllm_compat

    vllm_compat.connect()
    _registered = True
