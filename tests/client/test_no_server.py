"""Addresses where no server of ours answers."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from diffuserve.errors import InvalidRequest, ServerUnavailable
from diffuserve_client import AsyncClient, Client


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as bound:  # bound but not listening: refuses, and nobody else gets it
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def mute_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections and says nothing
        yield listening.getsockname()[1]


def test_closed_port(closed_port: int) -> None:
    """What is refused is not waited for."""
    with Client(f"127.0.0.1:{closed_port}", retries=0, connect_timeout_s=3600) as client:
        assert not client.is_ready()
        with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{closed_port} .Connection refused.*diffuserve serve"):
            client.generate("a cat")


def test_mute_port(mute_port: int) -> None:
    """What does not answer is waited for as long as it may take to connect."""
    with Client(f"127.0.0.1:{mute_port}", retries=0, connect_timeout_s=0.5, idle_timeout_s=None) as client:
        with pytest.raises(ServerUnavailable, match="diffuserve serve"):
            client.generate("a cat")
        assert not client.is_ready()


def test_asynchronously(closed_port: int) -> None:
    async def main() -> None:
        async with AsyncClient(f"127.0.0.1:{closed_port}", retries=0) as client:
            assert not await client.is_ready()
            with pytest.raises(ServerUnavailable, match="diffuserve serve"):
                await client.generate("a cat")

    asyncio.run(main())


@pytest.mark.parametrize("url", ["http://localhost:8000", "localhost", "localhost:http", ":8001", ""])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_address(kind: type[Client] | type[AsyncClient], url: str) -> None:
    with pytest.raises(InvalidRequest, match="must be HOST:PORT, such as localhost:8001"):
        kind(url)
