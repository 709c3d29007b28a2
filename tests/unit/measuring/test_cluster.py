# SPDX-License-Identifier: Apache-2.0
"""Catch a Ray address that is waited for: one that is wrong is refused in seconds, in one line."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring import cluster

services = pytest.importorskip("ray._private.services")


@contextlib.contextmanager
def server(answer):
    """A server on a free port of this machine that answers a greeting with ``answer``."""

    def serve():
        with contextlib.suppress(OSError):  # Closed at the end of the block.
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer)
                end.wait(30)

    end = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        end.set()
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "TIME_LIMIT_S", 0.2)


@pytest.fixture
def no_ray_here(monkeypatch):
    """Ray finds no cluster on this machine, whatever runs here."""
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nothing_listens(scheme):
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"--ray-address {scheme}127.0.0.1:1: no Ray.*refused"):
        cluster.check_answers(f"{scheme}127.0.0.1:1")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0", b""])
def test_something_else_listens(answer):
    with server(answer) as address, pytest.raises(UserError, match="did not answer as Ray does"):
        cluster.check_answers(address)


def test_a_server_of_grpc_is_let_through(monkeypatch):
    grpc = pytest.importorskip("grpc")
    monkeypatch.setattr(cluster, "TIME_LIMIT_S", 60.0)
    from concurrent.futures import ThreadPoolExecutor

    real = grpc.server(ThreadPoolExecutor(1))
    port = real.add_insecure_port("127.0.0.1:0")
    real.start()
    cluster.check_answers(f"127.0.0.1:{port}")
    cluster.check_answers(f"ray://localhost:{port}")
    real.stop(None)


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port", "", "ray://"])
def test_a_malformed_address(address):
    with pytest.raises(UserError, match="must be HOST:PORT, ray://HOST:PORT, auto or local"):
        cluster.check_answers(address)


@pytest.mark.parametrize("address", [None, "local", "anyscale://name"])
def test_what_ray_starts_or_finds_itself_is_left_to_it(address, no_ray_here):
    cluster.check_answers(address)


def test_auto_needs_a_cluster(no_ray_here):
    with pytest.raises(UserError, match="--ray-address auto: no Ray cluster runs on this machine"):
        cluster.check_answers("auto")


@pytest.mark.parametrize("address", [None, "auto"])
def test_the_address_that_ray_takes_from_elsewhere_must_answer(address, no_ray_here, monkeypatch):
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster answers at \S+:1 "):
        cluster.check_answers(address)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(UserError, match=r"no Ray cluster answers at \S+:2 "):
        cluster.check_answers(address)


def test_a_client_of_ray_has_a_port_of_its_own():
    with pytest.raises(UserError, match=r"127\.0\.0\.1:10001"):
        cluster.check_answers("ray://127.0.0.1")
