"""Token buckets: how many requests one caller may make. A caller that stays below its rate never waits."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

# Buckets of callers not seen for longest are dropped above this number: memory stays bounded.
MOST_CALLERS = 10_000


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Requests per minute on the long run, and how many may come at once."""

    per_minute: int = 600
    burst: int = 120


class TokenBuckets:
    """One bucket per caller, full at first. Safe between threads."""

    def __init__(self, limit: RateLimit, tick: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._tick = limit, tick
        self._rate = limit.per_minute / 60.0
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> int:
        """Take one token. Return 0, or after how many whole seconds there will be one."""
        now = self._tick()
        with self._lock:
            tokens, since = self._buckets.pop(caller, (float(self.limit.burst), now))
            tokens = min(float(self.limit.burst), tokens + (now - since) * self._rate)
            wait = 0 if tokens >= 1 else max(1, math.ceil((1 - tokens) / self._rate))
            self._buckets[caller] = (tokens - 1 if wait == 0 else tokens, now)
            if len(self._buckets) > MOST_CALLERS:
                self._buckets.popitem(last=False)
        return wait
