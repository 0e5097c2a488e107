"""Flower's SuperNode, in a process that ends when its connection has ended: `python -m hospital_node.supernode ...`.

A network cut in the middle of a TLS handshake ends Flower's loop, while the thread of its Runtime API keeps the process
alive: it looks well and never connects again. Here the process ends with the loop, and the supervisor starts it anew.
"""

from __future__ import annotations

import os
import sys
import traceback


def main() -> None:
    """Run the SuperNode; exit with 1 when it returns or fails. An end by a signal stays Flower's own (SystemExit)."""
    from flwr.supernode.cli import flower_supernode

    try:
        flower_supernode()
    except Exception:  # noqa: BLE001 whatever it is, this process must not live on without its loop
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
