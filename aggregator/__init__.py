"""Everything that sees many hospitals and no patient: rounds, aggregation, credit, ledger, registry."""

import data_schemas as data_schemas  # switches telemetry off before any library is imported
