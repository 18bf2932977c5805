"""Gradient inversion: what a coordinator sees of a patient in one update, bare and under `privacy.mode = "patient"`.

The victim is a site with one labelled patient, which takes one supervised step from tensors that the coordinator
knows; with plain SGD its update is the patient's gradient, times a known rate. The attack looks for the image x that
would have sent it (Geiping et al., Inverting gradients, NeurIPS 2020, with the cosine of each tensor for that of all):

    minimise over x in [0, 1]:   1 - mean over tensors t of cos(grad_t loss(x, y), update_t) + TV_WEIGHT * TV(x)

TV is the total variation, and the class y is read off the update: its bias is the only one of the head that has grown.
Everything is made easy for the attacker: views that change nothing, an encoder without pooling and with smooth
activations, and under privacy a patient who is drawn for certain and whose 63 companions teach nothing, so that the
update is this one patient's clipped gradient with the noise of a step, which more steps or patients only bury.

`correlation` is that of the pixels with the original's (1: the same up to brightness and contrast), `psnr_db` the
peak signal-to-noise ratio in dB, `cosine_with_bare` how much of the bare update's direction an update still has.
Patients are the phantom's. results/inversion.html shows the pictures.
"""

import argparse
import base64
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Template
from machine import RESULTS, describe, keep
from PIL import Image
from torch import Tensor, nn

from polyclinic import training
from polyclinic.cohort import Cohort, build_cohort
from polyclinic.methods.supervised import Supervised
from polyclinic.privacy.dpsgd import PatientRecipe
from polyclinic.seeding import forked, seed_for, torch_generator
from polyclinic.stages import Finetune, Views
from polyclinic.study import Compute, Images, PatientPrivacy
from polyclinic_simulations.phantom import write_site

CLASSES = 2
BATCH = 64
"""Patients that a private step expects: the default of a stage."""
TV_WEIGHT = 0.01
RATE = 0.05
"""Of Adam, on pixels; it falls to zero along half a cosine."""
UNCHANGED = Views(crop=(1.0, 1.0), flip=False, rotation=0.0, jitter=0.0)
STAGE = Finetune(
    kind="finetune",
    method="supervised",
    rounds=1,
    batch_size=BATCH,
    optimizer="sgd",
    learning_rate=1.0,
    weight_decay=0.0,
    schedule="constant",
    warmup_rounds=0.0,
    probe_rounds=0,
    layer_decay=1.0,
    class_weights="none",
    views=UNCHANGED,
)
RECOMMENDED = PatientPrivacy(mode="patient", noise=1.0, clip=1.0)
Update = dict[str, Tensor]
Recipe = Literal["bare", "private"]
RECIPES: dict[Recipe, training.Recipe] = {"bare": training.PLAIN, "private": PatientRecipe(RECOMMENDED)}


class SmallEncoder(nn.Sequential):
    """Three convolutions and a linear layer: (n, 1, size, size) -> (n, dim)."""

    dim = 64

    def __init__(self, size: int) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(12, 12, 5, padding=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(12 * (size // 4) ** 2, self.dim),
        )


def draw_patients(patients: int, size: int) -> Tensor:
    """(patients, 1, size, size) uint8: the first image of each phantom patient of a site."""
    with TemporaryDirectory() as folder:
        write_site(Path(folder) / "north", "north", patients, 0)
        cohort = build_cohort(Path(folder) / "north", Images(size=size), Path(folder) / "state", workers=1)
        return cohort.pixels(np.searchsorted(cohort.patients, np.arange(patients)))


def site_of(image: Tensor, companions: int) -> Cohort:
    """A site whose first patient has this (1, size, size) uint8 image; the other patients' are black."""
    pixels = np.concatenate([image[None].numpy(), np.zeros((companions, *image.shape), np.uint8)])
    numbers, unknown = np.arange(len(pixels)), np.full(len(pixels), "")
    return Cohort(Path(), pixels, numbers, numbers.astype(np.int32), unknown, unknown, unknown, unknown)


def build(size: int, seed: int) -> nn.Module:
    """The tensors that the site starts from."""
    with forked(seed_for(seed, "inversion")):
        return Supervised(STAGE, CLASSES).build(SmallEncoder(size))


def send(image: Tensor, label: int, recipe: Recipe, seed: int) -> Update:
    """What the site of a (1, size, size) uint8 image sends after a round of one step."""
    companions = BATCH - 1 if recipe == "private" else 0
    targets = torch.full((1 + companions, CLASSES), torch.nan)
    targets[0] = F.one_hot(torch.tensor(label), CLASSES)
    module = build(image.shape[-1], seed)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    training.train(
        module,
        Supervised(STAGE, CLASSES),
        site_of(image, companions),
        STAGE,
        Compute(threads=1, precision="fp32"),
        stage_round=0,
        seed=seed,
        targets=targets,
        recipe=RECIPES[recipe],
    )
    return {name: tensor.cpu() - before[name] for name, tensor in module.state_dict().items()}


def invert(update: Update, size: int, steps: int, seed: int) -> Tensor:
    """(1, size, size) in [0, 1]: the image that the attack takes the update for."""
    module = build(size, seed)
    label = update["head.bias"].argmax().view(1)
    names, parameters = zip(*module.named_parameters(), strict=True)
    wanted = [-update[name] for name in names]
    generator = torch_generator(seed_for(seed, "guess"))
    guess = torch.rand(1, 1, size, size, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = F.cross_entropy(module(guess), label)
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        pairs = zip(found, wanted, strict=True)
        cosines = torch.stack([F.cosine_similarity(f.flatten(), w.flatten(), dim=0) for f, w in pairs])
        variation = guess.diff(dim=2).abs().mean() + guess.diff(dim=3).abs().mean()
        optimizer.zero_grad()
        torch.autograd.backward(1 - cosines.mean() + TV_WEIGHT * variation, inputs=[guess])
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(0, 1)
    return guess.detach()[0]


def flat(update: Update) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in update.values()])


def likeness(found: Tensor, original: Tensor) -> dict[str, float]:
    """Of two images in [0, 1]; a constant one correlates with nothing."""
    pair = torch.stack([found.flatten(), original.flatten()])
    error = float((pair[0] - pair[1]).square().mean())
    correlation = float(torch.corrcoef(pair)[0, 1].nan_to_num(0.0))
    return {"correlation": round(correlation, 3), "psnr_db": round(-10 * np.log10(max(error, 1e-10)), 1)}


PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What one update shows of a patient</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
.scroll { overflow-x: auto; }
th { text-align: left; font-weight: 600; padding-right: 1rem; white-space: nowrap; }
td { text-align: center; font-variant-numeric: tabular-nums; font-size: .85rem; color: #555; }
img { display: block; width: 7rem; height: 7rem; image-rendering: pixelated; }
.note { color: #555; }
</style>
</head>
<body>
<h1>What one update shows of a patient</h1>
<p>A site with one labelled patient trains for one step and sends what has changed. Whoever receives that looks for the
image that would have sent it, by gradient matching. Under each picture: the correlation of its pixels with the
original's.</p>
<div class="scroll"><table>
{% for name, cells in rows %}
<tr><th scope="row">{{ name }}</th>
{% for picture, figure in cells %}
<td><img alt="{{ name }}, patient {{ loop.index }}" src="data:image/png;base64,{{ picture }}">{{ figure }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">Invented patients of the phantom, {{ size }} pixels a side. Private: noise {{ noise }}, clip {{ clip }},
{{ batch }} patients expected in a step, of whom this one alone teaches anything.</p>
</body>
</html>
""",
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def png(image: Tensor) -> str:
    """A (1, size, size) image in [0, 1] as a PNG in base64."""
    data = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def page(images: Tensor, found: dict[Recipe, list[tuple[Tensor, float]]]) -> str:
    """The pictures side by side: a row of (patients, 1, size, size) originals in [0, 1], then one for each recipe."""
    cells = {"original": [(png(image), "") for image in images]}
    for recipe in RECIPES:
        cells[f"from the {recipe} update"] = [(png(image), f"{figure:.3f}") for image, figure in found[recipe]]
    rendered: str = PAGE.render(
        rows=cells.items(), size=images.shape[-1], noise=RECOMMENDED.noise, clip=RECOMMENDED.clip, batch=BATCH
    )
    return rendered


def attack(
    images: Tensor, seed: int, steps: int
) -> tuple[list[dict[str, Any]], dict[Recipe, list[tuple[Tensor, float]]]]:
    """Invert every patient's update by each recipe: (patients, 1, size, size) uint8 -> figures, and images found."""
    rows: list[dict[str, Any]] = []
    found: dict[Recipe, list[tuple[Tensor, float]]] = {recipe: [] for recipe in RECIPES}
    for patient, image in enumerate(images):
        bare = flat(send(image, patient % CLASSES, "bare", seed))
        for recipe in RECIPES:
            update = send(image, patient % CLASSES, recipe, seed)
            guess = invert(update, image.shape[-1], steps, seed)
            figures = likeness(guess, image / 255)
            left = round(float(F.cosine_similarity(flat(update), bare, dim=0)), 4)
            rows.append({"patient": patient, "seed": seed, "update": recipe, **figures, "cosine_with_bare": left})
            found[recipe].append((guess, figures["correlation"]))
    return rows, found


def summarise(rows: list[dict[str, Any]]) -> dict[Recipe, dict[str, float]]:
    """Of the correlations, by recipe."""
    summary = {}
    for recipe in RECIPES:
        values = [row["correlation"] for row in rows if row["update"] == recipe]
        summary[recipe] = {"lowest": min(values), "median": round(float(np.median(values)), 3), "highest": max(values)}
    return summary


def main() -> None:
    """Attack with every seed; the page shows the first one's pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3, help="of the first weights and of the attack")
    parser.add_argument("--size", type=int, default=48, help="side of an image, pixels; a multiple of 4")
    parser.add_argument("--steps", type=int, default=600, help="of the attack")
    parser.add_argument("--out", type=Path, default=RESULTS / "inversion.json", help="the page stands beside it")
    given = parser.parse_args()
    machine = describe()
    torch.set_num_threads(1)
    images = draw_patients(given.patients, given.size)
    rows, found = attack(images, 0, given.steps)
    for seed in range(1, given.seeds):
        rows += attack(images, seed, given.steps)[0]
    setting = {"noise": RECOMMENDED.noise, "clip": RECOMMENDED.clip, "expected_batch": BATCH}
    sizes = {"size": given.size, "steps": given.steps}
    keep(given.out, machine, {**sizes, **setting, "correlation": summarise(rows), "rows": rows})
    given.out.with_suffix(".html").write_text(page(images / 255, found), encoding="utf-8")


if __name__ == "__main__":
    main()
