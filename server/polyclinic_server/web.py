"""The coordinator's page: what goes on, for a browser of this machine and for Prometheus. It changes nothing.

It listens on loopback only and answers to no other name than this machine's own, since a page elsewhere could have its
name point here. It loads nothing from elsewhere, and what sites and studies say is text to it, never markup.
"""

import argparse
import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.filesize import decimal
from starlette.middleware.trustedhost import TrustedHostMiddleware

from polyclinic_server.home import Home
from polyclinic_server.overview import Site, duration, overview
from polyclinic_server.progress import Points, Run

LOOK_S = 1.0
"""Between looks for something new to show."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
SITE_METRICS: list[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[[Site], float | None]]] = [
    (GaugeMetricFamily, "site_online", "whether its node is, for Flower", lambda site: site.online),
    (GaugeMetricFamily, "site_approved", "whether the study may run there", lambda site: site.approved),
    (GaugeMetricFamily, "site_clock_ahead_seconds", "of this machine's clock", lambda site: site.clock_ahead_s),
    (GaugeMetricFamily, "site_epsilon", "spent in the run", lambda site: site.epsilon),
    (CounterMetricFamily, "site_rounds", "in which its update was accepted", lambda site: len(site.accepted)),
    (CounterMetricFamily, "bytes_sent", "by the site, as tensors", lambda site: site.bytes_sent),
    (CounterMetricFamily, "bytes_received", "by the site, as tensors", lambda site: site.bytes_received),
]
TEMPLATES = Environment(loader=PackageLoader("polyclinic_server"), autoescape=True, trim_blocks=True)
TEMPLATES.filters |= {"duration": duration, "size": decimal}
WIDTH, HEIGHT = 100.0, 40.0
"""Units of a curve's picture, which is stretched to its place."""


def make_server(home: Home) -> uvicorn.Server:
    """The page's server, not yet running; open pages do not hold up its end."""
    app = FastAPI(openapi_url=None)
    options: dict[str, Any] = {"ws": "none", "log_level": "warning", "server_header": False}
    config = uvicorn.Config(app, "127.0.0.1", home.settings.web_port, headers=list(HEADERS.items()), **options)
    server = uvicorn.Server(config)
    registry = CollectorRegistry()
    registry.register(_Metrics(home))
    asking = threading.Lock()  # one asks Flower, and the others take what it was told

    def show(template: str) -> str:
        with asking:
            facts = overview(home)
        return TEMPLATES.get_template(template).render(facts=facts, curves=_curves(facts.run) if facts.run else [])

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return show("page.html.j2")

    @app.get("/events", response_class=EventSourceResponse)
    async def events() -> AsyncIterator[ServerSentEvent]:
        """What stands in the page's <main>, whenever that is something else."""
        shown = ""
        while not server.should_exit:
            if (now := await run_in_threadpool(show, "main.html.j2")) != shown:
                yield ServerSentEvent(raw_data=(shown := now))
            await asyncio.sleep(LOOK_S)

    @app.get("/metrics")
    def metrics() -> Response:
        with asking:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.mount("/static", StaticFiles(packages=[("polyclinic_server", "static")]))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"], www_redirect=False)
    return server


def _curves(run: Run) -> list[dict[str, Any]]:
    """Losses by round, stage by stage, and the probe: each over all the rounds that it will have."""
    found, before = [], 0
    for number, (method, rounds) in enumerate(run.stages, start=1):
        title = f"Loss, stage {number}: {method}" if len(run.stages) > 1 else f"Loss, {method}"
        found.append((title, run.losses[number - 1], before + 1, before + rounds))
        before += rounds
    found.append(("Probe AUC", run.probe, 0, run.rounds))
    names = ("title", "points", "first", "last", "path")
    return [dict(zip(names, (*curve, _path(*curve[1:])), strict=True)) for curve in found if curve[1]]


def _path(points: Points, first: int, last: int) -> list[str]:
    """Places of points in a picture of WIDTH x HEIGHT, as SVG writes them."""
    values = [value for _, value in points]
    x, y = WIDTH / max(last - first, 1), HEIGHT / ((max(values) - min(values)) or 1.0)
    return [f"{x * (round - first):.2f} {y * (max(values) - value):.2f}" for round, value in points]


class _Metrics(Collector):
    """The facts as Prometheus reads them; what is not known is left out."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def collect(self) -> Iterator[Metric]:
        facts = overview(self._home)
        yield GaugeMetricFamily("polyclinic_certificate_days", "until it ends", facts.certificate_days)
        yield GaugeMetricFamily("polyclinic_superlink_up", "whether SuperLink serves", facts.superlink)
        if run := facts.run:
            state = GaugeMetricFamily("polyclinic_run", "the run that was launched last", labels=["run", "state"])
            state.add_metric([run.name, run.state], 1)
            yield state
            yield GaugeMetricFamily("polyclinic_round", "in flight, or the last", run.at_work or run.round)
            yield CounterMetricFamily("polyclinic_rounds", "that have closed", run.round)
            yield GaugeMetricFamily("polyclinic_rounds_planned", "that the study asks for", run.rounds)
            yield GaugeMetricFamily("polyclinic_round_seconds", "that a round takes", run.round_s or math.nan)
        for kind, name, text, value in SITE_METRICS:
            family = kind(f"polyclinic_{name}", text, labels=["site"])
            for site, found in facts.sites.items():
                if (known := value(found)) is not None:
                    family.add_metric([site], known)
            yield family


def main() -> None:
    """`python -m polyclinic_server.web --home DIR`, which `polyclinic coordinator start` runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    make_server(Home(parser.parse_args().home)).run()


if __name__ == "__main__":
    main()
