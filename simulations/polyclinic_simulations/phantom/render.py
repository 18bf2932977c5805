"""From a patient, a finding and a pose to what the detector's rays meet: mm of water, (rows, columns) float32."""

import numpy as np

from polyclinic_simulations.phantom import frontal, lateral
from polyclinic_simulations.phantom.anatomy import AIR, Anatomy, Pose
from polyclinic_simulations.phantom.findings import Finding
from polyclinic_simulations.phantom.shapes import Map

FIELD = 370.0
"""Width of an image, mm."""


def render(a: Anatomy, finding: Finding | None, pose: Pose, rows: int, columns: int) -> Map:
    """Mm of water along every ray."""
    h, y = pose.grid(rows, columns, FIELD)
    if pose.view == "LATERAL":
        h = h * pose.facing
    view = frontal if pose.view == "PA" else lateral
    lungs = view.lungs(a, pose, h, y)
    paths = [finding.fill(lung, pose.view, h, y) if finding else lung.path for lung in lungs]
    air = sum(paths) - view.heart_and_vessels(a, pose, h, y)
    spared = np.maximum(air, 0.12 * sum(paths))
    solid = view.body(a, h, y) + view.bones(a, pose, h, y) + view.soft_parts(a, pose, h, y)
    return np.maximum(solid - AIR * spared, 0).astype(np.float32)
