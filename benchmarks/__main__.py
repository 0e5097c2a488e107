"""All of it: `python -m benchmarks [--quick]`. A published peer: `python -m benchmarks.comparison --peer PYTHON`."""

import sys

from benchmarks import comparison, local_round, private_step

private_step.main(sys.argv[1:])
local_round.main([])
comparison.main([])
