"""uvicorn with limits on connections, so that clients that are silent, slow or many do not shut the page for others.

Every step has a deadline: headers and the reading of responses here, bodies in web_app.py. Beyond CONNECTIONS_AT_ONCE,
the oldest connection that waits for its client gives way to the newest.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS_AT_ONCE = 32
# Connections accepted in one go: so few that the request of a connection is read, if it is there, before newer ones
# could take its place.
ACCEPTED_AT_ONCE = 8


class LimitedServer(uvicorn.Server):
    """uvicorn's server with a longer queue of connections that wait to be accepted."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        # asyncio gives the queue the length ACCEPTED_AT_ONCE, too. A client that finds it full waits for a second.
        for one in sockets or ():
            one.listen()


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with limits on the number of connections, on late requests and on responses nobody reads.

    Without these limits, a few idle connections could block the page forever. `timeout_keep_alive`, which uvicorn only
    applies between requests, is used here as the limit on the time from the connection to the end of its headers, and
    on the time for reading the response. Neither limit is extended by bytes that drip.

    `cycle` is uvicorn's object for the current request and its response; it is None until the headers are complete.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for the connection if there are too many, and give it a time limit for its request."""
        super().connection_made(transport)
        self.opened_at = self.loop.time()
        self._make_room()
        self.loop.call_later(self.config.timeout_keep_alive, self._close_without_request)

    def handle_events(self) -> None:
        """Process what has arrived. Whatever the parser raises because of it, the client is told that it is invalid."""
        try:
            super().handle_events()
        except Exception:  # for example ValueError, if a version of h11 converts a number of thousands of digits
            self.send_400_response("Invalid HTTP request received.")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. If it is part of the body of a request, that request ends here for the page, too."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response has begun, and is the only one
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Handle a client that has closed its sending side but may still read.

        Returning True keeps the connection open for the response. If the body is incomplete, the application sees it
        end early and refuses it as too short.
        """
        if self.cycle is None:
            return False
        self.cycle.more_body = False
        self.cycle.message_event.set()
        return not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Give the client a time limit for reading the response, which is now in the send buffer."""
        super().on_response_complete()
        self.loop.call_later(self.config.timeout_keep_alive, self.transport.abort)

    def _make_room(self) -> None:
        """Close the oldest connection that waits for its client, if there are more than CONNECTIONS_AT_ONCE.

        Such a connection has not sent the headers of its request, or has not read its response. All others are uploads
        that are being received or classified, and the page accepts only a few of these.
        """
        connections = cast("set[LimitedProtocol]", self.connections)
        there = [one for one in connections if not one.transport.is_closing()]
        if len(there) > CONNECTIONS_AT_ONCE:
            waiting = [one for one in there if one.cycle is None or one.cycle.response_started]
            min(waiting, key=lambda one: one.opened_at).transport.abort()

    def _close_without_request(self) -> None:
        if self.cycle is None:  # the headers of the request have not arrived in full
            self.transport.abort()
