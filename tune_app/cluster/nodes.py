"""Wait until a Ray cluster has its nodes: `python -m tune_app.cluster.nodes HOST:PORT COUNT [SECONDS]`.

A study plans its trials for the nodes that are there when it begins.
"""

import logging
import socket
import sys
import time

from tune_app.driver.ray_access import AddressError, join

WAIT_S = 600.0


def await_nodes(address: str, count: int, deadline_s: float = WAIT_S) -> int:
    """Return how many nodes the cluster at `address` has, once these are `count`, or the deadline is over."""
    import ray

    deadline = time.monotonic() + deadline_s
    while not _listens(address) and time.monotonic() < deadline:
        time.sleep(1.0)  # Ray would print a warning every five seconds
    while True:
        try:
            join(address, log_to_driver=False, logging_level=logging.ERROR)
            break
        except AddressError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1.0)
    try:
        while True:
            there = sum(bool(node["Alive"]) for node in ray.nodes())
            if there >= count or time.monotonic() >= deadline:
                return there
            time.sleep(1.0)
    finally:
        ray.shutdown()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    address, count = sys.argv[1], int(sys.argv[2])
    found = await_nodes(address, count, *map(float, sys.argv[3:]))
    if found < count:
        sys.exit(f"{address}: {found} of {count} nodes have joined")
