"""All of it: `python -m benchmarks [--quick]`."""

import sys

from benchmarks import local_round, private_step

private_step.main(sys.argv[1:])
local_round.main([])
