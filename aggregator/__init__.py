"""Everything that sees many hospitals and no patient: rounds, admission, aggregation, credit, ledger, model registry."""

import data_schemas as data_schemas  # switches telemetry off before any library is imported
