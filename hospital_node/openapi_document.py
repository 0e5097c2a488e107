"""`python -m hospital_node.openapi_document FILE` writes the endpoint's OpenAPI 3.1 document."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from hospital_node.endpoint import create_app
from hospital_node.folder import NodeFolder
from hospital_node.settings import NodeSettings

_NODE = NodeSettings(name="any", federation="any", declared_training_patients=1, declared_heldout_patients=1, seed=0)


def document_bytes() -> bytes:
    """Indented JSON of the document; it says nothing about any one node."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "node"
        NodeFolder.create(home, _NODE)
        document = create_app(home, home / "model").openapi()
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(document_bytes())
