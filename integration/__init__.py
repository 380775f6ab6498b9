"""farspan: long prompts made cheap, as a plugin for vLLM."""
