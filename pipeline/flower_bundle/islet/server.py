"""Point at the installed aggregator's ServerApp."""

import aggregator.server_app

app = aggregator.server_app.app
