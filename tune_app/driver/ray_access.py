"""Which Ray a command works with, and the token it shows there: decided here for every command.

Ray uses a token automatically only where it starts a cluster or finds one on its own machine, not at an address that
is named. Ray is imported inside the functions.
"""

import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


class AddressError(ValueError):
    """An address that is no Ray cluster's, or a cluster that cannot be joined. The message names the remedy."""


def cluster_address(given: str | None) -> str | None:
    """Return the address of the cluster to work on; None stands for a Ray of this process's own.

    `given`: the option --address. Without it, or with `auto`, RAY_ADDRESS decides where it is set, as it is in a job on
    a cluster; `local` is a separate Ray whatever RAY_ADDRESS is. `auto` alone is the cluster of this machine.
    Raises AddressError for anything but these and HOST:PORT.
    """
    address, source = given, f"--address {given}"
    if given in (None, "", "auto") and os.environ.get("RAY_ADDRESS"):
        address = os.environ["RAY_ADDRESS"]
        source = f"RAY_ADDRESS={address}"
    if address in (None, "", "local"):
        return None
    if address == "auto":
        return address
    if address.startswith(("http://", "https://")):
        raise AddressError(
            f"{source}: that is a job server; `medtune submit --address {address} -- ...` sends a study to it"
        )
    if address.startswith("ray://"):
        raise AddressError(
            f"{source}: a Ray client cannot run a study; use `medtune submit --address http://HOST:8265 -- ...`, "
            "or name the cluster as HOST:PORT on one of its nodes"
        )
    found = HOST_PORT.fullmatch(address)
    if not found or not 0 < int(found[2]) < 65536:
        raise AddressError(
            f"{source}: write HOST:PORT of the cluster (the port is 6379 unless `ray start --port` set another), "
            "auto, or local"
        )
    return address


def use_token_if_there() -> str | None:
    """Have Ray send the token that is set or saved; returns where it comes from, None where there is none to send.

    Raises AddressError when RAY_AUTH_TOKEN_PATH, which goes before the saved one, leads nowhere.
    """
    place = _place_of_token()
    if place and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
    if (raylet := sys.modules.get("ray._raylet")) is not None:  # which has read the environment
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    return place if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else None


def _place_of_token() -> str | None:
    """Where the token is; its file is made readable by its owner alone, as every client that has it can run code."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        file = Path(given).expanduser()
        if not file.is_file():
            raise AddressError(
                f"RAY_AUTH_TOKEN_PATH={file}: no such file; point it to the token's, or unset it"
            )
        _close_to_others(file)
        return "RAY_AUTH_TOKEN_PATH"
    saved = Path.home() / ".ray" / "auth_token"
    if saved.is_file():
        _close_to_others(saved)
        return "~/.ray/auth_token"
    return None


def _close_to_others(file: Path) -> None:
    status = file.stat()
    if status.st_mode & 0o077 and status.st_uid == os.getuid():
        file.chmod(0o600)


ANSWER_S = 10.0
"""Seconds for which a cluster's head is asked whether it is there. Ray itself asks for minutes, and logs each try."""


def _refuse_dead(address: str) -> None:
    """Raise AddressError where nothing at the address answers as the head of a Ray cluster does."""
    import grpc

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise AddressError(
            f"{address}: no Ray cluster answers there ({error.strerror or error}): start its head, correct the address "
            "(--address, RAY_ADDRESS), or use --address local for a Ray of this machine alone"
        ) from None
    if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        return
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise AddressError(
                f"{address}: something listens there that is not the head of a Ray cluster: name the head's own port (6379 "
                "unless `ray start --port` set another), not that of its dashboard"
            ) from None


def join(address: str, **options: Any) -> None:
    """Connect this process to the cluster at `address` (`cluster_address`), with the token that is there.

    `options` of `ray.init`. Raises AddressError when there is none, or it refuses the token.
    """
    import ray
    from ray.exceptions import AuthenticationError, RayError, RpcError

    from trainables.machine.ray_workers import OwnSearchPath

    token = use_token_if_there()
    if address != "auto":
        _refuse_dead(address)
    try:
        ray.init(address=address, job_config=OwnSearchPath(), **options)
    except AuthenticationError:
        raise AddressError(
            f"{address} asks for a token: save it in ~/.ray/auth_token (mode 600), or point RAY_AUTH_TOKEN_PATH to its "
            "file; RAY_AUTH_MODE must not be disabled"
            if token is None
            else f"{address} refuses the token of {token}: it is another cluster's"
        ) from None
    except (ConnectionError, TimeoutError, RayError, RpcError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AddressError(
            f"{address}: no Ray cluster that can be joined from here ({reason}): is its head running, is this machine "
            f"one of its nodes, and is the token its own ({token or 'none is set'})?"
        ) from None
