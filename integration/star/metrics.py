"""Prometheus metrics of `farspan star serve`: where the time of requests went, by phase."""

from farspan.star.output import StarTimes

SECONDS = {
    "phase_1_seconds": "Reading the context on all hosts; 0 for contexts that one host reads exactly.",
    "first_token_seconds": "Until the first token, from when all hosts were up.",
    "token_seconds": "Between one token and the next, as the query's host had them.",
    "key_exchange_seconds": "Of each host, waiting in phase 1 for keys of others.",
    "restart_seconds": "Of requests that met a lost host: replacing it.",
}


class StarMetrics:
    """Sums and counts of all requests that were answered, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Summary

        self.registry = CollectorRegistry()
        self.seconds = {
            name: Summary(f"farspan_star_{name}", text, registry=self.registry) for name, text in SECONDS.items()
        }
        self.exchanged = Counter(
            "farspan_star_exchanged_bytes", "Received by hosts from each other.", registry=self.registry
        )

    def observe(self, times: StarTimes) -> None:
        """Add one answered request."""
        self.seconds["phase_1_seconds"].observe(times.phase_1_s)
        self.seconds["first_token_seconds"].observe(times.first_token_s)
        for name, values in (("token_seconds", times.token_s), ("key_exchange_seconds", times.key_exchange_s)):
            for value in values:
                self.seconds[name].observe(value)
        if times.restart_s > 0:
            self.seconds["restart_seconds"].observe(times.restart_s)
        self.exchanged.inc(times.exchanged_bytes)

    def text(self) -> bytes:
        """What a scrape gets."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
