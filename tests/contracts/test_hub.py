"""An unreachable hub is found out at once; a proxy, or an answer, leaves its client as it is."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from huggingface_hub import constants

from tunesmith.contracts import hub


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "_known", hub._Known())


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "https://nowhere.invalid"])
def test_an_unreachable_hub_puts_the_client_offline(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint.format(port=closed_port()))
    begin = time.monotonic()

    assert hub.offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE is True
    assert time.monotonic() - begin < 6


def test_a_hub_that_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub.offline_if_unreachable()
    assert not hub.offline_if_unreachable(), "it is remembered"
    assert constants.HF_HUB_OFFLINE is False


def test_with_its_network_the_client_is_online_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, True]
    monkeypatch.setattr(hub, "_reachable", lambda _endpoint: answers.pop(0))
    assert hub.offline_if_unreachable()
    assert hub.offline_if_unreachable(), "a minute has not passed"
    hub._known.at -= hub._KNOWN_FOR + 1
    assert not hub.offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE is False


def test_behind_a_proxy_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("tried"))
    assert not hub.offline_if_unreachable()


def test_who_is_offline_already_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_: Any, **__: Any) -> None:
        pytest.fail("tried")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", tried)
    assert hub.offline_if_unreachable()
