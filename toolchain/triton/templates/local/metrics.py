"""What the model tells Triton's /metrics about its requests.

Every change of a metric is a message to the server and back (60 us), so changes are added up here and told once a
second, by a thread of their own. Latencies between tokens are too many even for that: their histogram is made of
counters, one per bucket, which a query reads like any other histogram.
"""

import bisect
import collections
import threading

import triton_python_backend_utils as pb_utils

PERIOD_S = 1.0
LATENCY_BUCKETS_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
COUNTERS = {
    "toolchain_requests_total": "Requests that ended, by their finish_reason or the kind of their error",
    "toolchain_prompt_tokens_total": "Tokens of the prompts of answered requests",
    "toolchain_generated_tokens_total": "Tokens that were generated",
    "toolchain_engine_restarts_total": "Ends of the engine process that were followed by a restart",
    "toolchain_inter_token_latency_seconds_bucket": "Latencies between tokens up to le, in seconds",
    "toolchain_inter_token_latency_seconds_sum": "Sum of the latencies between tokens, in seconds",
    "toolchain_inter_token_latency_seconds_count": "Number of latencies between tokens",
}
GAUGES = {
    "toolchain_requests_running": "Requests in the batch",
    "toolchain_requests_waiting": "Requests that wait for a free row",
}
HISTOGRAMS = {
    "toolchain_queue_seconds": "Time from arrival to the batch",
    "toolchain_time_to_first_token_seconds": "Time from arrival to the first token",
    "toolchain_request_seconds": "Time from arrival to the last token",
}


class Metrics:
    """Methods may be called from any thread; none of them waits for the server but ``close``."""

    def __init__(self, labels, load):
        """``load()``: (running, waiting) at this moment."""
        self._labels = labels
        self._load = load
        self._lock = threading.Lock()
        self._counts = collections.Counter()
        self._observed = []
        self._buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
        kinds = (
            (COUNTERS, pb_utils.MetricFamily.COUNTER),
            (GAUGES, pb_utils.MetricFamily.GAUGE),
            (HISTOGRAMS, pb_utils.MetricFamily.HISTOGRAM),
        )
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=kind)
            for texts, kind in kinds
            for name, text in texts.items()
        }
        self._metrics = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def count(self, name, amount=1, **labels):
        with self._lock:
            self._counts[name, tuple(labels.items())] += amount

    def observe(self, name, seconds):
        with self._lock:
            self._observed.append((name, seconds))

    def tokens(self, seconds, count):
        """``count`` tokens came within ``seconds`` after the one before them."""
        if count < 1:
            return
        with self._lock:
            self._buckets[bisect.bisect_left(LATENCY_BUCKETS_S, seconds / count)] += count
            self._counts["toolchain_inter_token_latency_seconds_sum", ()] += seconds
            self._counts["toolchain_inter_token_latency_seconds_count", ()] += count

    def close(self):
        self._closed.set()
        self._thread.join()
        # A family must outlive its metrics.
        self._metrics.clear()
        self._families.clear()

    def _run(self):
        while not self._closed.wait(PERIOD_S):
            try:
                self._tell()
            except pb_utils.TritonModelException as error:
                pb_utils.Logger.log_warn(f"metrics could not be told: {error}")

    def _tell(self):
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
            observed, self._observed = self._observed, []
            buckets, self._buckets = self._buckets, [0] * len(self._buckets)
        for (name, labels), amount in counts.items():
            self._metric(name, labels).increment(amount)
        total = 0
        for limit, count in zip([*LATENCY_BUCKETS_S, "+Inf"], buckets, strict=True):
            total += count
            bucket = self._metric("toolchain_inter_token_latency_seconds_bucket", (("le", str(limit)),))
            if total:
                bucket.increment(total)
        for name, seconds in observed:
            self._metric(name, ()).observe(seconds)
        running, waiting = self._load()
        self._metric("toolchain_requests_running", ()).set(running)
        self._metric("toolchain_requests_waiting", ()).set(waiting)

    def _metric(self, name, labels):
        key = name, labels
        if key not in self._metrics:
            buckets = {"buckets": LATENCY_BUCKETS_S} if name in HISTOGRAMS else {}
            self._metrics[key] = self._families[name].Metric(
                labels={**self._labels, **dict(labels)}, **buckets
            )
        return self._metrics[key]
