"""Point at the installed node's ClientApp."""

import hospital_node.client_app

app = hospital_node.client_app.app
