"""All of docs/performance.md: `python -m benchmarks [--quick] [--jax PYTHON]`, half an hour or so on two cores.

The last table has a published peer where `make bench` has made its environment.
"""

import sys
import time

from benchmarks import comparison, local_round, private_step

PARTS = (
    ("1 of 3: the private step", lambda: private_step.main(sys.argv[1:])),
    ("2 of 3: the whole round", lambda: local_round.main([])),
    ("3 of 3: other models", lambda: comparison.main([])),
)

begun = time.monotonic()
for title, run in PARTS:
    print(f"\n## {title} (after {(time.monotonic() - begun) / 60:.0f} min)\n", flush=True)
    run()
