"""From a patient, a finding and a pose to what the detector's rays meet: mm of water, (rows, columns) float32."""

import numpy as np

from polyclinic_simulations.phantom import frontal, lateral
from polyclinic_simulations.phantom.anatomy import AIR, Anatomy, Pose
from polyclinic_simulations.phantom.devices import devices
from polyclinic_simulations.phantom.findings import Finding
from polyclinic_simulations.phantom.shapes import Map, edge

FIELD = 290.0
"""Width of an image, mm."""


def render(a: Anatomy, finding: Finding | None, pose: Pose, rows: int, columns: int, rng: np.random.Generator) -> Map:
    """Mm of water along every ray; `rng` draws what only this image has."""
    h, y = pose.grid(rows, columns, FIELD)
    if pose.view == "LATERAL":
        h = h * pose.facing
    view = frontal if pose.view == "PA" else lateral
    lungs = view.lungs(a, pose, h, y)
    paths = [finding.fill(lung, pose.view, h, y) if finding else lung.path for lung in lungs]
    air = sum(paths) - view.heart_and_vessels(a, pose, h, y)
    spared = np.maximum(air, 0.12 * sum(paths))
    body = view.body(a, h, y)
    inside = view.bones(a, pose, h, y) + view.soft_parts(a, pose, h, y) - AIR * spared
    water: Map = np.maximum(body + inside * edge(body - 30, 15), 0)
    return water + devices(a, pose, h, y, rng)
