"""How hard the phantom is, in one place: how plain the findings are, and how much else differs between images.

Meant: a straight line on pixels, or on an untrained encoder, should do poorly, while an encoder that has looked at the
images should do better. So grey levels say little (scanners, HAZE, DOMES, poses), and shapes and textures say much. But
what differs between images whatever the label must not be enough to tell them apart, or contrastive training learns
nothing else.
"""

SHARES = {"normal": 0.4, "nodule": 0.2, "consolidation": 0.2, "effusion": 0.2}
"""Of a site's patients; patients carry one label."""

# What findings look like: the larger, the easier.
NODULES = (8, 14)
"""Number of nodules in both lungs together, both ends included: so many that most crops show some."""
NODULE_DIAMETER = (22.0, 38.0)
"""mm: 8 to 13 % of an image's width."""
NODULE_DENSITY = 2.0
"""Water in a nodule relative to soft tissue; it never takes more than the lung's air."""
BILATERAL = 0.9
"""Of consolidations and effusions: in both lungs."""
PATCH_REACH = (70.0, 110.0)
"""Radius of a consolidation, mm."""
PATCH_DENSITY = 0.5
"""Of the air that a consolidation takes where it is densest."""
PATCH_GRAIN = 12.0
"""Size of its patches, mm: a few pixels at 64."""
FLUID_HEIGHT = (0.1, 0.25)
"""Of an effusion, as a fraction of the lung's height."""
MENISCUS = 0.20
"""How far the fluid climbs at the chest wall, as a fraction of the lung's height."""

# What differs whatever the label: the larger, the harder.
HAZE = 0.12
"""Largest fraction of air that smooth clouds take from any lung."""
DOMES = 12.0
"""Standard deviation of each dome of the diaphragm, mm: a raised one is not an effusion."""
SHIFT = (12.0, 14.0)
"""Standard deviation of the position across and down, mm."""
ROLL = 0.06
"""Standard deviation of the rotation in the image, radians."""
ZOOM = (0.88, 1.18)
MONITORED = 0.1
"""Of the images: electrodes on the chest."""
PACED = 0.04
"""Of the images: a pacemaker under the left collar bone."""
LATERAL = 0.2
"""Of the images after a patient's first, which is always PA."""
