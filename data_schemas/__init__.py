"""The words every room shares: units, readings, plans, updates, credit, ledger entries, forecasts.

Imports nothing of ours. Every room imports this package first, so this is where the telemetry of the libraries below
is switched off, before any of them can be imported. An operator who sets one of these variables keeps what was set.
"""

import os

for _variable, _off in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GX_ANALYTICS_ENABLED": "false",
}.items():
    os.environ.setdefault(_variable, _off)
