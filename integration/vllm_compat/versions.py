"""Which releases of vLLM farspan works with."""

VLLM_MIN = (0, 32)
VLLM_BELOW = (0, 34)


def vllm_version() -> str:
    import vllm

    return vllm.__version__


def version_refusal(version: str) -> str | None:
    """Why a vLLM version cannot be used, or None if it can. A development build counts as its release."""
    allowed = f"vllm>={VLLM_MIN[0]}.{VLLM_MIN[1]},<{VLLM_BELOW[0]}.{VLLM_BELOW[1]}"
    parts = version.split("+")[0].split(".")
    try:
        release = int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return f"vLLM {version!r} has no release number; farspan supports {allowed}. Install a released vLLM."
    if VLLM_MIN <= release < VLLM_BELOW:
        return None
    return f"vLLM {version}; farspan supports {allowed}. Install such a vLLM, or leave out --attention-backend CUSTOM."
