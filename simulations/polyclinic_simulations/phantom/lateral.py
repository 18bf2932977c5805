"""The patient seen from the side: a ray runs along x. Maps in mm of water, shape (rows, columns)."""

import numpy as np

from polyclinic_simulations.phantom.anatomy import AIR, BONE, Anatomy, Lung, Pose
from polyclinic_simulations.phantom.shapes import Map, bone, chord, edge, ellipse, segment


def body(a: Anatomy, z: Map, y: Map) -> Map:
    """Trunk, raised arms and neck, without what is in them."""
    shoulder = a.apex + 12
    reach = (a.depth + a.fat) * (1.04 - 0.22 * edge(shoulder + 60 - y, 40))
    trunk = 2.1 * (a.width + 0.5 * a.fat) * chord(_bent(a, z, y) / reach) * edge(y - shoulder + 40, 30)
    arms = 150 * chord((z - 12) / 52) * edge(shoulder + 15 - y, 18)
    breasts = 45 * ellipse(z, y, (a.depth + 0.5 * a.fat, a.breast_y), (a.breasts * 0.7 + 1, a.breasts * 0.9 + 1))
    grain = 1 + 0.012 * a.grain(z / 7 + 5, y / 7) + 0.03 * a.grain(z / 31, y / 31 + 3)
    solid: Map = (np.maximum(trunk, arms) + (breasts if a.breasts else 0)) * grain
    return solid


def _bent(a: Anatomy, z: Map, y: Map) -> Map:
    """z measured from the curve of the upper back."""
    return z + 20 * (a.level(y) - 0.5) ** 2 * 1.6 - 4


def lungs(a: Anatomy, pose: Pose, z: Map, y: Map) -> list[Lung]:
    """Right and left lung, one before the other, with nothing in them."""
    level = a.level(y)
    reach = 0.93 * a.depth * a.outline(level, 2.2)
    found = []
    for side, dome in zip((-1, 1), a.domes, strict=True):
        across = (_bent(a, z, y) + side * 6 * pose.turn * 8) / reach
        bottom = a.apex + a.height + dome + pose.breath
        back = np.clip(0.1 - across, -1.2, 1.2)
        floor = bottom + a.arch * np.where(back > 0, 1.25 * back**2, 0.45 * back**2)
        air = chord(across) * edge(floor - y, 2.5) * edge(level * a.height, 5)
        path = 0.78 * a.width * np.minimum(0.3 + level, 1) * air * a.clear(side, z + 99, y)
        deepest = bottom + 1.25 * a.arch
        found.append(Lung(side, path, across, floor, (a.apex, deepest), (-reach, reach)))
    return found


def heart_and_vessels(a: Anatomy, pose: Pose, z: Map, y: Map) -> Map:
    """Heart, aorta, hila and lung markings: mm that take the place of air."""
    bottom = a.apex + a.height + 0.6 * pose.breath
    heart = 110 * ellipse(z, y, (0.28 * a.depth, bottom - 0.8 * a.heart[0]), (0.95 * a.heart[0], a.heart[1]), -0.5)
    arch = (-0.05 * a.depth, a.apex + 0.36 * a.height)
    ring = np.abs(np.hypot(z - arch[0], y - arch[1]) - 1.7 * a.aorta)
    aorta = 45 * chord(ring / a.aorta) * edge(arch[1] + 10 - y, 8)
    descending = 40 * chord((z + 0.38 * a.depth) / a.aorta) * edge(y - arch[1], 12)
    hila = 60 * ellipse(z, y, (-2, a.apex + 0.52 * a.height), (1.3 * a.hila, 1.6 * a.hila))
    radius = np.hypot(z, y - a.apex - 0.52 * a.height)
    reach, angle = np.log(radius + 6), np.arctan2(y - a.apex - 0.52 * a.height, z)
    angle = angle + 0.12 * a.grain(z / 22, y / 22)
    streaks = a.markings(angle * 6 + 31, reach * 1.6) + a.markings(angle * 13 + 3, reach * 2.2 + 30)
    spread = np.exp(-radius / 60) * (1 - np.exp(-((radius / 22) ** 2)))
    vessels: Map = np.maximum(streaks - 0.5, 0) * a.vessels * 15 * spread
    central: Map = np.maximum.reduce([heart, aorta, descending, hila])
    return central + vessels


def bones(a: Anatomy, pose: Pose, z: Map, y: Map) -> Map:
    """Ribs of both sides, spine, breast bone and shoulder blades."""
    total = _spine(a, pose, z, y)
    for side in (-1, 1):
        total += _ribs(a, z + side * 40 * pose.turn, y + side * 7, 0.55 if side < 0 else 0.75)
    front = 0.97 * a.depth * a.outline(a.level(y) + 0.12, 2.2)
    sternum = 16 * chord((_bent(a, z, y) - front) / 6) * edge(y - a.apex - 25, 6)
    total += sternum * edge(a.apex + 0.72 * a.height - y, 6)
    blade, _ = segment(z, y, (-0.55 * a.depth, a.apex - 10), (-0.8 * a.depth, a.apex + 0.5 * a.height))
    return BONE * a.mineral * (total + 9 * chord(blade / 7))


def _ribs(a: Anatomy, z: Map, y: Map, strength: float) -> Map:
    level = a.level(y)
    across = _bent(a, z, y) / ((a.depth + 2) * a.outline(level + 0.03, 2.2))
    fall = (1.2 + 0.5 * a.rib_slope) * (across + 1) - 0.45 * (across + 1) ** 2 * (across - 0.4)
    turn = y / a.rib_spacing - fall + a.rib_phase
    distance = (turn - np.round(turn)) * a.rib_spacing * 0.8
    seen = edge(1.0 - np.abs(across), 0.02) * edge(0.62 - across, 0.1)
    return strength * bone(distance, a.rib_radius) * seen * edge(level * a.height + 6, 5)


def _spine(a: Anatomy, pose: Pose, z: Map, y: Map) -> Map:
    off = _bent(a, z, y) + 0.86 * a.depth + 4 * np.sin(y / 60)
    turn = y / a.vertebra
    part = (turn - np.round(turn)) * a.vertebra
    rim = 1 + 0.5 * np.exp(-(((np.abs(part) - 5) / 2) ** 2))
    solid: Map = 11 * chord(off / 15) * (1 - 0.75 * np.exp(-((part / 2.8) ** 2))) * rim
    process, _ = segment(off, part, (-16, a.vertebra / 2), (-34, a.vertebra / 2 + 6))
    return solid + 8 * chord(process / 5) + 7 * chord((off + 19) / 5)


def soft_parts(a: Anatomy, pose: Pose, z: Map, y: Map) -> Map:
    """Windpipe, and the air in the stomach."""
    fork = a.apex + 0.44 * a.height
    pipe, _ = segment(z, y, (10, -400), (-6, fork))
    bubble = (0.3 * a.depth, a.apex + a.height + a.domes[1] + pose.breath + a.stomach + 14)
    stomach = 2 * a.stomach * ellipse(z, y, bubble, (a.stomach * 1.4 + 1, a.stomach * 0.8 + 1))
    return -AIR * 19 * chord(pipe / 9) - 0.8 * stomach
