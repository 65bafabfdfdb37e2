"""`Proxy`: a connection to a database server through a TCP proxy on loopback, which loses what it is asked to lose."""

from __future__ import annotations

import socket
import threading
from typing import Any

from sqlalchemy import make_url


class Proxy:
    """Passes everything on, until a client sends what `lose_answer_to` names.

    Attributes:
        lost: set once an answer was lost.
    """

    def __init__(self, url: str) -> None:
        self._real = make_url(url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._to_lose: bytes | None = None
        self.lost = threading.Event()
        self.url = self._real.set(port=self._listening.getsockname()[1]).render_as_string(hide_password=False)
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_answer_to(self, command: bytes) -> None:
        """Pass the next ``command`` on, wait for its answer, and close the client's connection in its place."""
        self.lost.clear()
        self._to_lose = command

    def close(self) -> None:
        self._listening.close()
        for each in self._sockets:
            _close(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection((self._real.host or "", self._real.port or 0))
            self._sockets += [client, server]
            answers = threading.Event()
            answers.set()
            threading.Thread(target=self._pass_requests, args=(client, server, answers), daemon=True).start()
            threading.Thread(target=self._pass_answers, args=(server, client, answers), daemon=True).start()

    def _pass_requests(self, client: socket.socket, server: socket.socket, answers: threading.Event) -> None:
        while data := _receive(client):
            if self._to_lose is not None and self._to_lose in data:
                self._to_lose = None
                answers.clear()
            _send(server, data)
        _close(server)

    def _pass_answers(self, server: socket.socket, client: socket.socket, answers: threading.Event) -> None:
        while data := _receive(server):
            if not answers.is_set():
                self.lost.set()
                break
            _send(client, data)
        _close(client)
        _close(server)


def _receive(side: socket.socket) -> bytes:
    try:
        return side.recv(65536)
    except OSError:
        return b""


def _send(side: socket.socket, data: bytes) -> Any:
    try:
        side.sendall(data)
    except OSError:
        _close(side)


def _close(side: socket.socket) -> None:
    try:
        side.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    side.close()
