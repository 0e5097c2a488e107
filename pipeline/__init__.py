"""Pure computation: no socket, no clock, no environment.

raw export -> Readings -> ValidReadings + QualityReport -> Windows -> LocalUpdate + PrivacySpend -> SignedUpdate
  == network ==> AdmittedUpdate | Rejection -> GlobalModel -> ModelVersion -> Forecast
AdmittedUpdate -> Contribution -> LedgerEntry -> Receipt -> Checkpoint
"""

import data_schemas as data_schemas  # switches telemetry off before any library is imported
