"""Everything behind one hospital's firewall: intake, store, budget, local rounds, endpoint."""

import data_schemas as data_schemas  # switches telemetry off before any library is imported
