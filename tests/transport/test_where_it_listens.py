"""Addresses of both kinds, and what is said of those where nobody can listen."""

import asyncio
import socket
import urllib.request

import grpc
import pytest
from rewardserve import app


def ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="no IPv6 on this machine")


@pytest.mark.parametrize("host", ["127.0.0.1", *(pytest.param(h, marks=needs_ipv6) for h in ("::1", "[::1]"))])
async def test_one_host_is_right_for_grpc_and_for_the_metrics(serve, kit, host: str) -> None:
    async with serve(host=host, metrics_port=0) as served:
        shown = f"[{host.strip('[]')}]" if ":" in host else host
        async with grpc.aio.insecure_channel(f"{shown}:{served.app.port}") as channel:
            call = channel.unary_unary("/rewardserve.v1.Scoring/Score")
            assert await call(kit.ids_request([1], [[2]]).SerializeToString(), timeout=20)
        url = f"http://{shown}:{served.app.metrics_port}/metrics"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert direct.open(url, timeout=20).status == 200


async def test_a_scrape_that_is_not_asked_for_ends(serve, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Each holds a thread and a file; nor is there a line of log that could be forged, or read as a failure."""
    monkeypatch.setattr(app._Scrape, "timeout", 0.1)
    async with serve(metrics_port=0) as served:
        for begun in (b"", b"GET /metrics HTTP/1.1\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.app.metrics_port)
            writer.write(begun)
            async with asyncio.timeout(20):
                assert await reader.read() == b""
            writer.close()
    assert capfd.readouterr().err == ""


async def refusal(serve, **options) -> str:
    with pytest.raises(OSError) as refused:
        async with serve(**options):
            pass
    return str(refused.value)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "300.1.1.1", "not a host", "x" * 64])
async def test_a_host_that_does_not_resolve_is_not_taken_for_a_taken_port(serve, host: str) -> None:
    said = await refusal(serve, host=host)
    assert f"--host '{host}' does not resolve" in said and "another server" not in said


async def test_an_address_of_another_machine_is_called_that(serve) -> None:
    said = await refusal(serve, host="192.0.2.1")  # for documentation (RFC 5737)
    assert "--host '192.0.2.1' is no address of this machine" in said


async def test_a_taken_port_is_called_that(serve) -> None:
    async with serve() as served:
        said = await refusal(serve, port=served.app.port)
    assert f"127.0.0.1:{served.app.port}" in said and "another server" in said and "--port" in said
