"""Accuracy on long-context tasks and pictures of what sparse prefill does: `farspan eval` and `farspan report`."""
