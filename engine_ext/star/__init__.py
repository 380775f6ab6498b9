"""Star Attention inside one engine: its host's share of a context, and the exchange with the other hosts."""
