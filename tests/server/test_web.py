"""The coordinator's page over HTTP, as a browser and Prometheus see it; nothing of it leaves the machine."""

import http.client
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import ClientConnection, connect

from polyclinic_server import overview, web
from polyclinic_server.home import Home
from polyclinic_server.rundir import RunDir

from .test_overview import make, play

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>"
Get = Callable[..., tuple[int, http.client.HTTPMessage, str]]


def until(true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, f"waited for {what} in vain"
        time.sleep(0.05)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make(tmp_path / "c")


@pytest.fixture
def server(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[uvicorn.Server]:
    """The page's server, in a thread."""
    monkeypatch.setattr(web, "LOOK_S", 0.05)
    made = web.make_server(home)
    thread = threading.Thread(target=made.run)
    thread.start()
    until(lambda: made.started or not thread.is_alive(), "the server")
    yield made
    made.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def get(home: Home, server: uvicorn.Server) -> Get:
    """Asks for a path: (status, headers, body)."""

    def asked(path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", home.settings.web_port, timeout=10)) as connection:
            connection.request(method, path, headers=headers)
            with connection.getresponse() as answer:
                return answer.status, answer.headers, answer.read().decode()

    return asked


@contextmanager
def events(home: Home) -> Iterator[http.client.HTTPResponse]:
    """The open stream of events."""
    with closing(http.client.HTTPConnection("127.0.0.1", home.settings.web_port, timeout=10)) as connection:
        connection.request("GET", "/events")
        with connection.getresponse() as stream:
            yield stream


def one(stream: http.client.HTTPResponse) -> str:
    """The next event's data."""
    lines = []
    while (line := stream.readline().decode().rstrip("\n")) or not lines:
        lines += [line.removeprefix("data:").strip()] if line.startswith("data:") else []
    return "\n".join(lines)


def test_a_page_before_any_site_and_study(get: Get) -> None:
    status, _, body = get("/")
    assert status == 200
    assert "No study has been launched" in body
    assert "SuperLink down" in body
    assert "None is enrolled" in body


def test_the_page_of_a_run(home: Home, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "superlink_is_up", lambda _: True)
    monkeypatch.setattr(overview, "flower", lambda *_: {"nodes": []})
    play(home, 3)
    body = get("/")[2]
    assert "SuperLink up" in body
    assert re.search(r"<b>4 <small>of 5</small></b>round in flight", body)
    assert "Loss, stage 1: simclr" in body
    assert "Loss, stage 2" not in body  # nothing yet
    line = re.search(r'class="line" d="M0.00 0.00L50.00 30.00L100.00 40.00"', body)
    assert line, "losses 4, 2, 4/3 of rounds 1 to 3"
    assert '<span class="chip ">unknown</span>' in body


def test_the_page_of_a_run_that_has_failed(home: Home, get: Get) -> None:
    play(home, 1).event("run_failed", problem="the encoder has collapsed", fix="lower the learning rate")
    body = get("/")[2]
    assert '<span class="chip bad">failed</span>' in body
    assert "<strong>the encoder has collapsed</strong><br>lower the learning rate" in body


@pytest.mark.parametrize("path", ["/", "/events"])
def test_what_a_site_says_is_text(path: str, home: Home, get: Get) -> None:
    play(home, 1, reason=HOSTILE).event("run_interrupted", problem=HOSTILE, fix=HOSTILE)
    with events(home) as stream:
        body = get("/")[2] if path == "/" else one(stream)
    assert body.count("&lt;script&gt;alert(1)") == 3
    assert "<script>" not in body
    assert "<img" not in body


def test_nothing_is_loaded_from_elsewhere(home: Home, get: Get) -> None:
    play(home, 3)
    body = "".join(get(path)[2] for path in ("/", "/static/page.css", "/static/page.js"))
    assert not re.search(r"https?:|url\(|@import|style=|<style|\son\w+=", body)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', body)) == {"/static/page.css", "/static/page.js", "/metrics"}


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 200), ("/metrics", "GET", 200), ("/static/page.js", "GET", 200),
        ("/nothing", "GET", 404), ("/docs", "GET", 404), ("/openapi.json", "GET", 404), ("/static/", "GET", 404),
        ("/static/../web.py", "GET", 404), ("/static/%2e%2e/web.py", "GET", 404),
        ("/", "POST", 405), ("/metrics", "PUT", 405), ("/events", "DELETE", 405), ("/static/page.js", "POST", 405),
    ],
)  # fmt: skip
def test_every_answer_tells_the_browser_to_load_nothing_else(path: str, method: str, status: int, get: Get) -> None:
    found, headers, _ = get(path, method)
    assert found == status
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8080", 200), ("127.0.0.1", 200), ("evil.example", 400), ("localhost.evil.example", 400), ("", 400)],
)
def test_another_name_for_this_machine_is_refused(host: str, status: int, get: Get) -> None:
    for path in ("/", "/metrics", "/static/page.js"):
        assert get(path, Host=host)[0] == status


def test_the_page_listens_on_loopback_only(home: Home) -> None:
    assert web.make_server(home).config.host == "127.0.0.1"


@pytest.mark.usefixtures("server")
def test_an_event_comes_when_something_has_happened(home: Home) -> None:
    run = play(home, 1)
    with events(home) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        assert "1 <small>of 5</small>" in one(stream)
        RunDir(run.path).event("round_closed", round=2, seconds=1.0, accepted=1, loss=1.0)
        assert "2 <small>of 5</small>" in one(stream)


def test_the_server_ends_while_a_page_is_open(home: Home, server: uvicorn.Server) -> None:
    with events(home) as stream:
        one(stream)
        server.should_exit = True
        while stream.readline():
            pass  # it would wait until the connection's timeout otherwise


def test_metrics(home: Home, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "superlink_is_up", lambda _: True)
    nodes = [
        {"node-id": str(node), "status": status, "offline-at": "N/A"}
        for node, status in ((11, "online"), (12, "offline"))
    ]
    monkeypatch.setattr(overview, "flower", lambda *_: {"nodes": nodes})
    overview._nodes.cache_clear()
    play(home, 3)
    status, headers, body = get("/metrics")
    overview._nodes.cache_clear()
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    found = {
        (sample.name.removeprefix("polyclinic_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    expected = {
        ("certificate_days",): 396.0, ("superlink_up",): 1.0, ("run", "tiny-1", "running"): 1.0, ("round",): 4.0,
        ("rounds_total",): 3.0, ("rounds_planned",): 5.0, ("round_seconds",): 20.0, ("site_online", "north"): 1.0,
        ("site_online", "south"): 0.0, ("site_approved", "south"): 0.0, ("site_rounds_total", "north"): 3.0,
        ("site_clock_ahead_seconds", "south"): -45.04, ("bytes_sent_total", "north"): 3e6,
        ("bytes_received_total", "north"): 6e6,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert ("site_online", "east") not in found  # not known


class Browser:
    """A page of headless Chromium, driven over its DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._number = connection, 0

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (answer := json.loads(self._connection.recv(timeout=20))).get("id") != self._number:
            pass
        return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        return self.command("Runtime.evaluate", expression=expression)["result"].get("value")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if (program := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("Chromium is not installed")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={tmp_path}/b",
    ]
    process = subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.DEVNULL)
    try:
        port = tmp_path / "b" / "DevToolsActivePort"
        until(lambda: port.exists() and "\n" in port.read_text(), "Chromium")
        with closing(http.client.HTTPConnection("127.0.0.1", int(port.read_text().split()[0]))) as asking:
            asking.request("GET", "/json/list")
            page = next(found for found in json.load(asking.getresponse()) if found["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Browser(connection)
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.usefixtures("server")
def test_in_a_browser_it_fits_and_follows_the_run(width: int, home: Home, browser: Browser) -> None:
    long = "the site failed: " + "x" * 150  # a word without a blank
    run = play(home, 3, reason=long)
    browser.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.command("Page.navigate", url=home.settings.page)
    until(lambda: browser.evaluate("document.getElementById('live')?.textContent") == "live", "the page")
    assert "3 of 5\nrounds closed" in browser.evaluate("document.querySelector('.figures').innerText")
    assert browser.evaluate("document.querySelectorAll('path.line').length") == 2  # a loss and the probe
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("getComputedStyle(document.querySelector('thead')).display == 'none'") == (width == 390)
    run.event("round_closed", round=4, seconds=1.0, accepted=1, loss=1.0)
    until(lambda: "4 of 5" in browser.evaluate("document.querySelector('.figures').innerText"), "the next round")
