"""How old a patient is: what can be seen of age in the anatomy, what is commoner in the old, and chance.

    age = 56 + 9 z(radius of the aortic arch) - 9 z(density of the bones) + 8 (with an effusion) + 7 z(chance)

in years, z standardised over patients, cut to 18 and 89: the aorta widens and bones lose mineral as people age, and
heart failure, the usual cause of fluid in both pleurae, is a disease of the old. The signs explain nearly three
quarters of the variance, so sites of other ages look otherwise, and a classifier may learn age in place of an effusion.
"""

import numpy as np

from polyclinic_simulations.phantom.anatomy import Anatomy

MEAN, SIGN, CHANCE = 56.0, 9.0, 7.0
"""Years: the mean without an effusion, and standard deviations of what each sign and chance add."""
WITH_EFFUSION = 8.0
YOUNGEST, OLDEST = 18, 89


def draw_age(anatomy: Anatomy, label: str, rng: np.random.Generator) -> int:
    """Completed years."""
    aorta, mineral = (anatomy.aorta - 16) / (10 / np.sqrt(12)), (anatomy.mineral - 1) / (0.6 / np.sqrt(12))  # uniform
    age = MEAN + SIGN * (aorta - mineral) + WITH_EFFUSION * (label == "effusion") + CHANCE * rng.standard_normal()
    return int(np.clip(age, YOUNGEST, OLDEST))
