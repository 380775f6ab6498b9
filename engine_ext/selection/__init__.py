"""Which KV blocks a prompt reads: the sparse prefill methods, their mask files, and what they chose and kept."""
