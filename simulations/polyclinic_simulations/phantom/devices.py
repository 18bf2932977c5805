"""What lies on a patient without being a finding: electrodes, their wires, and a pacemaker. Drawn without the label."""

import numpy as np

from polyclinic_simulations.phantom.anatomy import Anatomy, Pose
from polyclinic_simulations.phantom.difficulty import MONITORED, PACED
from polyclinic_simulations.phantom.shapes import Map, chord, edge, segment


def devices(a: Anatomy, pose: Pose, h: Map, y: Map, rng: np.random.Generator) -> Map:
    """Metal and plastic along the rays, in mm of water."""
    total: Map = np.zeros_like(h + y)
    if rng.random() < MONITORED:
        for _ in range(int(rng.integers(1, 4, endpoint=True))):
            total += _electrode(a, h, y, rng)
    if rng.random() < PACED and pose.view == "PA":
        total += _pacemaker(a, h, y)
    return total


def _electrode(a: Anatomy, h: Map, y: Map, rng: np.random.Generator) -> Map:
    """A round pad, its metal snap, and a wire that leaves the image."""
    x0, y0 = rng.uniform(-0.8, 0.8) * a.width, a.apex + rng.uniform(0.15, 1.1) * a.height
    radius = np.hypot(h - x0, y - y0)
    bend = rng.uniform(4, 14) * np.sin((y - y0) / rng.uniform(18, 40))
    wire, _ = segment(h + bend, y, (x0, y0), (x0 + rng.uniform(-150, 150), y0 + 260 * rng.choice([-1.0, 1.0])))
    pad: Map = 6 * edge(rng.uniform(9, 15) - radius, 0.8)
    return pad + 45 * edge(3.2 - radius, 0.6) + 22 * chord(wire / 1.4)


def _pacemaker(a: Anatomy, h: Map, y: Map) -> Map:
    """A metal box and a lead into the heart."""
    x0, y0 = 0.62 * a.width, a.apex + 0.2 * a.height
    box = edge(20 - np.abs(h - x0), 1.5) * edge(15 - np.abs(y - y0), 1.5)
    down, _ = segment(h, y, (x0 - 15, y0 - 8), (0.1 * a.width, y0 + 12))
    lead, _ = segment(h, y, (0.1 * a.width, y0 + 12), (0.25 * a.width, a.apex + 0.85 * a.height))
    metal: Map = 70 * box + 25 * (chord(down / 1.3) + chord(lead / 1.3))
    return metal
