# SPDX-License-Identifier: Apache-2.0
"""Whether a Ray cluster answers, found out in seconds: Ray itself tries for minutes."""

from __future__ import annotations

import os
import socket
from typing import Any

from vllm_layerskip.errors import UserError, needs_extra, one_line

TIME_LIMIT_S = 10.0
"""How long a cluster may take to answer."""
CLIENT_PORT = 10001
"""Where Ray's client server listens, unless the address says so."""

_OPTION = "--ray-address"


def join_ray(address: str | None, **options: Any) -> None:
    """``ray.init``, for a cluster that answers within ``TIME_LIMIT_S``.

    Args:
        address: what ``--ray-address`` says; None for ``RAY_ADDRESS``, or this machine.
        options: further arguments of ``ray.init``.

    Raises:
        UserError: no cluster answers there.
    """
    import ray

    check_answers(address)
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"{_named(address)}: {one_line(error)}") from None


def check_answers(address: str | None) -> None:
    """See that a Ray cluster answers at an address, if it says where.

    Raises:
        UserError: nothing, or no Ray, answers.
    """
    place = _host_and_port(address)
    if place is None:
        return
    host, port = place
    problem = _problem(host, port)
    if problem is not None:
        raise UserError(
            f"{_named(address)}: no Ray cluster answers at {host}:{port} ({problem}). Start one "
            f"(ray start --head), or correct {_OPTION}: HOST:6379, ray://HOST:{CLIENT_PORT}, auto "
            "for the one on this machine, or local for a new one."
        )


def _named(address: str | None) -> str:
    if address is None:
        given = os.environ.get("RAY_ADDRESS")
        return f"RAY_ADDRESS={given}" if given else "Ray's note of its last cluster here"
    return f"{_OPTION} {address}"


def _host_and_port(address: str | None) -> tuple[str, int] | None:
    """Where a cluster should answer; None if Ray is to find or to start one itself.

    Raises:
        UserError: the address is malformed.
    """
    found = _found_by_ray(address) if address in (None, "auto") else address
    if found in (None, "auto", "local"):
        return None
    scheme, _, rest = found.rpartition("://")
    if scheme not in ("", "ray"):
        return None  # Of a platform that adds its own to Ray.
    host, colon, port = rest.rpartition(":")
    if scheme and not colon:
        host, port = rest, str(CLIENT_PORT)
    if not host or not port.isdecimal():
        raise UserError(
            f"{_named(address)} must be HOST:PORT, ray://HOST:PORT, auto or local. Correct it."
        )
    return host.strip("[]"), int(port)


def _found_by_ray(address: str | None) -> str | None:
    """What Ray takes for ``auto`` and for no address: ``RAY_ADDRESS``, else what it has noted.

    Raises:
        UserError: there is no cluster, and ``auto`` asks for one.
    """
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
    except ConnectionError:
        raise UserError(
            f"{_named(address)}: no Ray cluster runs on this machine. Start one (ray start "
            f"--head), or leave {_OPTION} out."
        ) from None
    except (ImportError, TypeError):  # No public function says it.
        return None


def _problem(host: str, port: int) -> str | None:
    """Why no gRPC server, as Ray's servers are, answers there; None if one does.

    Raises:
        UserError: the extra ``ray`` is not installed.
    """
    with needs_extra("ray"):
        import grpc  # type: ignore[import-untyped]
    try:
        # gRPC would try a refused connection again until the time is over.
        socket.create_connection((host, port), timeout=TIME_LIMIT_S).close()
    except (OSError, OverflowError) as error:
        return one_line(error)
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return None
    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(TIME_LIMIT_S)
        except grpc.FutureTimeoutError:
            return f"what listens there did not answer as Ray does in {TIME_LIMIT_S:.0f} s"
    return None
