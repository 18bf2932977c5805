"""The patient seen from behind (PA): a ray runs along z. Maps in mm of water, shape (rows, columns)."""

import numpy as np

from polyclinic_simulations.phantom.anatomy import AIR, BONE, Anatomy, Lung, Pose
from polyclinic_simulations.phantom.shapes import Map, bone, chord, edge, ellipse, segment


def body(a: Anatomy, x: Map, y: Map) -> Map:
    """Trunk, shoulders and neck, without what is in them."""
    reach = a.width + a.fat
    shoulder = a.apex + 12
    half = reach * (1 + 0.5 * edge(shoulder + 40 - y, 26))
    top = np.maximum(y - (shoulder - 38 + 0.34 * np.maximum(np.abs(x) - 45, 0)), 0)
    trunk = 2 * (a.depth + 0.6 * a.fat) * chord(x / half) * (1 - np.exp(-top / 30))
    neck = 105 * chord(x / 62) * edge(shoulder - y, 30)
    solid: Map = np.maximum(trunk, neck) * (1 + 0.012 * a.grain(x / 7, y / 7) + 0.03 * a.grain(x / 31 + 9, y / 31))
    return solid


def lungs(a: Anatomy, pose: Pose, x: Map, y: Map) -> list[Lung]:
    """Right and left lung with nothing in them."""
    level = a.level(y)
    cage = a.width * a.outline(level, 2.5)
    inner = a.mediastinum * 0.55 + 32 * np.exp(-np.maximum(level, 0) / 0.10)
    room = np.clip((cage - inner) / 25, 0, 1)
    found = []
    for side, dome in zip((-1, 1), a.domes, strict=True):
        out = side * (x - 8 * pose.turn)
        across = (out - (inner + cage) / 2) / np.maximum((cage - inner) / 2, 4)
        floor = a.apex + a.height + dome + pose.breath + a.arch * np.clip(across + 0.15, -0.6, 1.3) ** 2
        air = chord(across) * edge(floor - y, 2.5) * edge(level * a.height, 5)
        path = 1.7 * a.depth * np.minimum(0.35 + level, 1) * room * air * a.clear(side, x, y)
        deepest = a.apex + a.height + dome + pose.breath + a.arch
        found.append(Lung(side, path, across, floor, (a.apex, deepest), (side * inner, side * cage)))
    return found


def heart_and_vessels(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    """Heart, arch and descending aorta, hila and lung markings: mm that take the place of air."""
    middle = x - pose.turn * 25
    bottom = a.apex + a.height + 0.6 * pose.breath
    centre = (a.heart_x, bottom - 0.75 * a.heart[0])
    heart = 95 * ellipse(middle, y, centre, a.heart, a.heart_tilt)
    atrium = 70 * ellipse(middle, y, (-a.mediastinum * 0.55, bottom - 1.05 * a.heart[0]), (26, 44))
    arch = (a.mediastinum * 0.75, a.apex + 0.32 * a.height)
    aorta = 90 * ellipse(middle, y, arch, (a.aorta, a.aorta * 1.2))
    descending = 40 * chord((middle - arch[0] + 6) / (a.aorta * 0.8)) * edge(y - arch[1], 12)
    central: Map = np.maximum.reduce([heart, atrium, aorta, descending])
    return central + _markings(a, x, y)


def _markings(a: Anatomy, x: Map, y: Map) -> Map:
    """Vessels that leave the hila, branch and thin out."""
    side = np.sign(x)
    dx, dy = np.abs(x) - a.mediastinum - 8, y - a.apex - 0.5 * a.height - 6 * side
    radius = np.hypot(dx, dy)
    reach = np.log(radius + 6)
    angle = np.arctan2(dy, dx) + 0.12 * a.grain(x / 22, y / 22)
    streaks = a.markings(angle * 6 + 11 * side, reach * 1.6) + a.markings(angle * 13 + 7 * side, reach * 2.2 + 20)
    spread = np.exp(-radius / 60) * (1 - np.exp(-((radius / 22) ** 2)))
    hila = 42 * np.exp(-((dx / a.hila) ** 2) - (dy / (1.5 * a.hila)) ** 2)
    vessels: Map = np.maximum(streaks - 0.5, 0) * a.vessels * 15 * spread + hila
    return vessels


def bones(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    """Ribs, spine, collar bones and shoulder blades."""
    return BONE * a.mineral * (_ribs(a, pose, x, y) + _spine(a, pose, x, y) + _shoulders(a, pose, x, y))


def _ribs(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    level = a.level(y)
    cage = (a.width + 3) * a.outline(level + 0.03, 2.5)
    total: Map = np.zeros_like(y + x)
    for back in (True, False):
        t = np.abs(x + (70 if back else -70) * pose.turn) / cage
        fall = a.rib_slope * t**3 - 0.5 * np.sin(3 * t) if back else a.rib_slope + 3.4 * (1 - np.minimum(t, 1)) ** 1.15
        turn = y / a.rib_spacing - fall + a.rib_phase
        distance = (turn - np.round(turn)) * a.rib_spacing
        seen = edge(1.02 - t, 0.012) * (1 + 1.1 * np.minimum(t, 1) ** 8)
        seen = seen * (edge(t - 0.1, 0.04) if back else 0.55 * edge(t - 0.5, 0.09))
        total += bone(distance, a.rib_radius) * seen
    return total * edge(level * a.height + 6, 5) * edge(a.apex + 1.35 * a.height - y, 25)


def _spine(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    amplitude, phase = a.scoliosis
    off = x + 80 * pose.turn - amplitude * np.sin(y / 70 + phase)
    turn = y / a.vertebra
    part = (turn - np.round(turn)) * a.vertebra
    half = 16 + 0.02 * (y + 150)
    solid: Map = 12 * chord(off / half) * (1 - 0.45 * np.exp(-((part / 3.2) ** 2)))
    here = np.abs(part) - a.vertebra / 2
    pedicles: Map = 5 * np.exp(-(((np.abs(off) - 11) / 3) ** 2) - ((here + 3) / 4) ** 2)
    process: Map = 5 * np.exp(-((off / 3) ** 2) - ((here + 1) / 6) ** 2)
    return solid + pedicles + process


def _shoulders(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    total: Map = np.zeros_like(x + y)
    for side in (-1, 1):
        out = side * (x - 60 * pose.turn)
        inner = a.apex + 0.16 * a.height
        bend = 7 * np.sin((out - 20) / 22)
        line = inner - a.clavicle * np.clip(out / 140, 0, 1.2) + bend * edge(out - 20, 20)
        total += 1.3 * bone((y - line) * 0.93, 6.5) * edge(out - 14, 4) * edge(a.width * 1.12 - out, 5)
        off = side * (x + 60 * pose.turn)
        border = a.width * 0.93 + 0.16 * (y - a.apex)
        blade = edge(off - border, 2) * (0.4 + np.exp(-np.abs(off - border) / 4))
        total += 7 * blade * edge(y - a.apex - 10, 8) * edge(a.apex + 0.62 * a.height - y - 0.5 * (off - border), 8)
        total += 22 * ellipse(off, y, (a.width * 1.32, a.apex + 20), (24, 27))
    return total


def soft_parts(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    """Breasts, windpipe and its two branches, and the air in the stomach."""
    fork = a.apex + 0.42 * a.height
    middle = x - pose.turn * 10 + 3
    pipe, _ = segment(middle, y, (0, -400), (0, fork))
    right, _ = segment(middle, y, (0, fork), (-26, fork + 32))
    left, _ = segment(middle, y, (0, fork), (34, fork + 28))
    windpipe = 17 * chord(pipe / 8.5) + 9 * (chord(right / 6) + chord(left / 5.5))
    bubble = (0.45 * a.width, a.apex + a.height + a.domes[1] + pose.breath + a.stomach + 10)
    stomach = 2 * a.stomach * ellipse(x, y, bubble, (a.stomach * 1.5 + 1, a.stomach * 0.8 + 1))
    return _breasts(a, pose, x, y) - AIR * windpipe - 0.8 * stomach


def _breasts(a: Anatomy, pose: Pose, x: Map, y: Map) -> Map:
    if not a.breasts:
        return np.zeros_like(x + y)
    out = np.abs(x - 95 * pose.turn) - 0.56 * a.width
    fall = (y - a.breast_y) / a.breasts
    lower = np.where(fall > 0, fall * 1.15, fall * 0.75)
    breasts: Map = 40 * np.sqrt(np.maximum(1 - (out / a.breasts) ** 2 - lower**2, 0))
    return breasts
