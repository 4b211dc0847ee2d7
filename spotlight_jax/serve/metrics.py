"""Metrics of the server for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from spotlight_jax.serve.requests import Usage
from spotlight_jax.serve.scheduler import Observer, Scheduler

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics(Observer):
    """Counts of a scheduler's requests."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self.registry = CollectorRegistry()

        def count(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"spotlight_{name}", text, labels, registry=self.registry)

        def time(name: str, text: str) -> Histogram:
            return Histogram(f"spotlight_{name}_seconds", text, registry=self.registry, buckets=_SECONDS)

        self._requests = count("requests", "Sequences that ended, by how.", ("how",))
        self._prompt = count("prompt_tokens", "Prompt tokens of sequences that ended.")
        self._cached = count("prompt_tokens_cached", "Prompt tokens that were copied from pages (prefix hits).")
        self._generated = count("generated_tokens", "Tokens generated: their rate is tokens per second.")
        self._steps = count("sequence_steps", "Decoding steps, summed over sequences.")
        self._read = count("tokens_read", "Cached tokens that a head of a sparse layer read, summed over steps.")
        self._there = count("tokens_there", "Cached tokens that a dense step would have read, summed over steps.")
        self._first = time("time_to_first_token", "From a request's arrival to its first token.")
        self._between = time("inter_token", "Mean time between two tokens of a sequence in one block.")

    def watch(self, scheduler: Scheduler) -> None:
        """Show the state of a scheduler, too."""
        self.registry.register(_State(scheduler))

    def first_token(self, seconds: float) -> None:
        """See Observer."""
        self._first.observe(seconds)
        self._generated.inc()

    def tokens(self, count: int, seconds: float) -> None:
        """See Observer."""
        self._generated.inc(count)
        if count:
            self._between.observe(seconds / count)

    def ended(self, how: str, usage: Usage) -> None:
        """See Observer."""
        self._requests.labels(how).inc()
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._steps.inc(usage.steps)
        self._read.inc(usage.tokens_read)
        self._there.inc(usage.tokens_cached)

    def page(self) -> bytes:
        """Return all counts in Prometheus' text format."""
        return generate_latest(self.registry)


class _State:
    """Gauges of a scheduler: requests that wait and run, pages in use."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield gauges, by Prometheus' collector protocol."""
        own = self._scheduler
        running = len(own.running) + (own.joining is not None)
        for name, text, value in (
            ("waiting", "Sequences in the queue.", len(own.waiting)),
            ("running", "Sequences being prefilled or decoded.", running),
            ("slots", "Sequences that can run at once.", own.slots.count),
            ("pages_used", "Pages of prompts' beginnings in use.", len(own.prefixes)),
            ("pages", "Pages of prompts' beginnings.", own.slots.pages),
        ):
            yield GaugeMetricFamily(f"spotlight_{name}", text, value)
