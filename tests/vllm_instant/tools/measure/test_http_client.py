"""HTTP clients do not use connections that their server is about to close."""

import asyncio
import time

import pytest
from closing_server import closing_server

from vllm_instant.tools.measure.http_client import async_client, sync_client
from vllm_instant.tools.measure.streaming_client import open_client

PAUSE = 1.1


@pytest.mark.parametrize("make", [async_client, open_client])
def test_a_request_after_a_pause_has_a_connection_of_its_own(make):
    async def run():
        async with closing_server() as url, make(url) as client:
            await client.get("/health")
            await asyncio.sleep(PAUSE)
            assert (await client.get("/health")).status_code == 200

    asyncio.run(run())


def test_so_has_one_of_a_client_that_blocks():
    def ask(url):
        with sync_client(url) as client:
            client.get("/health")
            time.sleep(PAUSE)
            assert client.get("/health").status_code == 200

    async def run():
        async with closing_server() as url:
            await asyncio.to_thread(ask, url)

    asyncio.run(run())
