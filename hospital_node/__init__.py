"""Everything behind one hospital's firewall: intake, validation, store, privacy budget, local rounds, forecast endpoint."""

import data_schemas as data_schemas  # switches telemetry off before any library is imported
