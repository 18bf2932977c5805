"""Which plots the report shows of a run, and what it says beside them."""

from typing import Any

from polyclinic.evaluation import COLLAPSED_RANK, COLLAPSED_SPREAD
from polyclinic.report import words
from polyclinic.report.plots import COLOURS, LABEL_COLOURS, Figure, bars, curves, grouped, palette, scatter
from polyclinic.report.run import Points, Run

TO_SITES, FROM_SITES, WALL = "#56B4E9", "#0072B2", "#8C8C8C"


def _stages(run: Run) -> list[tuple[int, str]]:
    """(last round before, name) of every stage."""
    starts, before = [], 0
    for stage in run.study.stages:
        starts.append((before, words.named(words.METHODS, stage.method)))
        before += stage.rounds
    return starts


def _legend(run: Run, values: dict[str, Points]) -> list[tuple[str, str]]:
    """What the curves of sites are called: each by its colour, or all together as a range."""
    colours = {site: colour for site, colour in palette(run.sites).items() if site in values}
    consortium = [("consortium", "var(--ink)")] if "" in values else []
    if len(set(colours.values())) < len(colours):
        return [*consortium, ("range over sites, middle half darker", "var(--range)")]
    return [*consortium, *colours.items()]


def _curves(run: Run, title: str, note: str, values: dict[str, Points], **options: Any) -> list[Figure]:
    if not any(values.values()):
        return []
    svg = curves(values, palette(run.sites), f"{title} by round", **options)
    return [Figure(title, note, svg, _legend(run, values))]


def training(run: Run) -> list[Figure]:
    """Loss, a plot for each stage since losses of different methods do not compare, then probes."""
    figures = []
    for number, (before, name) in enumerate(_stages(run)):
        last = before + run.study.stages[number].rounds
        losses = {
            site: [point for point in points if before < point[0] <= last]
            for site, points in run.metrics.get("loss", {}).items()
        }
        losses = {site: points for site, points in losses.items() if points}
        title = f"Loss, stage {number + 1}: {name}" if len(run.study.stages) > 1 else f"{name} loss"
        figures += _curves(run, title, "Mean over the batches of a round.", losses)
    for metric, title, note in (
        ("probe_auc", "Linear probe AUC", "On each site's own held-out patients; round 0 is the untrained encoder."),
        ("knn_auc", "kNN probe AUC", f"Votes of the {run.study.evaluation.neighbours} nearest training images."),
    ):
        figures += _curves(run, title, note, run.metrics.get(metric, {}), stages=_stages(run))
    return figures


def health(run: Run) -> list[Figure]:
    rank, spread = (run.metrics.get(metric, {}) for metric in ("effective_rank", "feature_spread"))
    stages = _stages(run)
    return [
        *_curves(run, "Effective rank", "How many directions the features use.", rank,
                 log=True, threshold=COLLAPSED_RANK, stages=stages),
        *_curves(run, "Feature spread", "1: all over the sphere; 0: the same for every image.", spread,
                 log=True, threshold=COLLAPSED_SPREAD, stages=stages),
        *_curves(run, "Alignment", "Squared distance of two views of an image: 0, the views make no difference; 2, "
                 "they are strangers.", run.metrics.get("alignment", {}), stages=stages),
        *_curves(run, "Uniformity", "How evenly features fill the sphere: 0, all the same; at most 4.",
                 run.metrics.get("uniformity", {}), stages=stages),
    ]  # fmt: skip


def traffic(run: Run) -> list[Figure]:
    """Wall time and bytes by round."""
    figures = []
    wall = run.metrics.get("seconds", {}).get("", [])
    if wall:
        whose = " of simulated time" if run.study.simulation.clock.images_per_s else ""
        took = words.duration(sum(v for _, v in wall))
        note = f"{took}{whose} in all, from sending the orders to the new global weights."
        figures.append(Figure("Seconds by round", note, bars([("seconds", wall, WALL)], "Seconds by round")))
    down, up = run.total("bytes_down"), run.total("bytes_up")
    if any(value for _, value in [*down, *up]):
        sizes = [words.size(sum(value for _, value in points)) for points in (down, up)]
        note = f"{sizes[0]} to the sites and {sizes[1]} from them, as tensors."
        parts = [
            (name, [(r, v / 1e6) for r, v in points], colour)
            for name, points, colour in (("to sites", down, TO_SITES), ("from sites", up, FROM_SITES))
        ]
        legend = [(name, colour) for name, _, colour in parts]
        figures.append(Figure("Megabytes by round", note, bars(parts, "Megabytes by round"), legend))
    return figures


def maps(run: Run) -> list[Figure]:
    """The embedding map twice: by site and by label."""
    if not run.embedding:
        return []
    places = [(float(row["x"]), float(row["y"])) for row in run.embedding]
    figures = []
    for key, note in (
        ("site", "Sites that stand apart: the encoder sees the scanner."),
        ("label", "Labels that stand apart: the encoder sees the finding."),
    ):
        names = [row.get(key) or "" for row in run.embedding]
        own = palette(run.sites) if key == "site" else palette(filter(None, names), LABEL_COLOURS)
        groups, colours = grouped(names, own, LABEL_COLOURS if key == "label" else COLOURS)
        svg = scatter(places, groups, colours, f"Embedding map by {key}")
        figures.append(Figure(f"Coloured by {key}", note, svg, sorted(colours.items(), key=_last)))
    return figures


def _last(item: tuple[str, str]) -> tuple[bool, str]:
    return item[0] in ("other", "unlabelled"), item[0]
