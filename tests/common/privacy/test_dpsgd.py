"""DP-SGD against a loop over patients; what is drawn, from where, and that nothing of it stays."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from timm.layers import DropPath
from torch import Tensor, nn

from polyclinic import training
from polyclinic.cohort import Cohort
from polyclinic.encoders.resnet import Basic, ResidualNetwork
from polyclinic.encoders.vit import VisionTransformer
from polyclinic.errors import CohortError, PolyclinicError, StudyError
from polyclinic.methods import make_method
from polyclinic.methods.base import Batch, Method, ViewBatch
from polyclinic.methods.supervised import Classifier
from polyclinic.privacy import dpsgd, gradients
from polyclinic.privacy.dpsgd import PatientRecipe, sampling_rate, secret_generator, steps_of_round
from polyclinic.privacy.gradients import Factors, Part, Products
from polyclinic.seeding import forked
from polyclinic.stages import AnyStage, Stage, with_defaults
from polyclinic.study import Compute, PatientPrivacy

from ...tiny import TinyEncoder

SIDE = 16
FP32 = Compute(threads=1, precision="fp32")
MODES = ["products", "factors"]
UNCHANGED = {"crop": (1.0, 1.0), "flip": False, "rotation": 0.0, "jitter": 0.0}
"""Views that are the images."""
SILENT = 1e-12
"""Noise too small to see."""


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the processor."""
    monkeypatch.setattr(training, "pick_device", lambda: torch.device("cpu"))


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep products, or factors, whatever is smaller."""
    monkeypatch.setattr(gradients, "SMALLER", {"products": 0.0, "factors": math.inf}[request.param])


def privacy(noise: float = 1.0, clip: float = 1.0, physical_batch: int = 16) -> PatientPrivacy:
    return PatientPrivacy(mode="patient", noise=noise, clip=clip, physical_batch=physical_batch)


def stage_of(name: str, **settings: object) -> Stage:
    kind = "finetune" if name == "supervised" else "pretrain"
    values = {"kind": kind, "method": name, "rounds": 4, "batch_size": 4, **settings}
    if name in ("mae", "sssd"):
        values = {"decoder_width": 32, "decoder_depth": 1, "mask": 0.5, **values}
    if name == "supervised":
        values = {"class_weights": "none", "probe_rounds": 0, **values}
    made: Stage = TypeAdapter(AnyStage).validate_python(with_defaults(values, 1))
    return made


def vit() -> VisionTransformer:
    return VisionTransformer(SIDE, 1, patch=4, dim=16, heads=2, depth=2)


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "resnet": lambda: ResidualNetwork(Basic, [1, 1, 1, 1], 1, context=False),
    "tiny": lambda: TinyEncoder(1),
}


def build(name: str, encoder: str = "vit", **settings: object) -> tuple[Method, nn.Module]:
    method = make_method(stage_of(name, **settings), classes=2)
    with forked(0):
        return method, method.build(ENCODERS[encoder]()).train()


def batch(n: int = 7, seed: int = 0) -> Batch:
    images = torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.arange(n), torch.eye(2)[torch.arange(n) % 2])


def cohort(images: list[int]) -> Cohort:
    """`images[p]` images of patient p, in the form that `open_cohort` gives."""
    pixels = np.random.default_rng(0).integers(0, 255, (sum(images), 1, SIDE, SIDE), dtype=np.uint8)
    unknown: NDArray[np.str_] = np.full(len(pixels), "")
    numbers = np.arange(len(images), dtype=np.int32).repeat(images)
    return Cohort(Path(), pixels, np.arange(len(pixels)), numbers, unknown, unknown, unknown, unknown)


def rows_of(views: ViewBatch, rows: Tensor) -> ViewBatch:
    extra = {name: value[rows] for name, value in views.extra.items()}
    return ViewBatch(tuple(view[rows] for view in views.views), views.patients[rows], extra)


def hold(method: Method, views: ViewBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn for a patient of these views, it is these."""
    draw = type(method).views

    def held(batch: Batch, generator: torch.Generator) -> ViewBatch:
        rows = torch.isin(views.patients, batch.patients)
        return rows_of(views, rows) if rows.any() else draw(method, batch, generator)

    monkeypatch.setattr(method, "views", held)


def loop(method: Method, module: nn.Module, views: ViewBatch, clip: float) -> list[Tensor]:
    """The definition, one patient at a time."""
    module = copy.deepcopy(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    for row in range(len(views.patients)):
        extra = {k: v[row : row + 1] for k, v in views.extra.items()}
        one = ViewBatch((views.views[0][row : row + 1],), views.patients[row : row + 1], extra)
        module.zero_grad()
        method.loss(module, one).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        scale = min(1.0, clip / norm(gradients))
        for total, gradient in zip(sums, gradients, strict=True):
            total += scale * gradient
    return sums


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def clipped(recipe: PatientRecipe, module: nn.Module, method: Method, drawn: Batch) -> list[Tensor]:
    with forked(0), recipe.attached(module):
        return recipe.clipped_sums(module, method, drawn)[0]


CASES = [("mae", "vit"), ("sssd", "vit"), ("supervised", "vit"), ("supervised", "resnet"), ("supervised", "tiny")]


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("physical", [1, 4, 16])
@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_the_sum_is_that_of_a_loop_over_patients(
    name: str, encoder: str, physical: int, mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module = build(name, encoder)
    drawn = batch()
    hold(method, method.views(drawn, torch.Generator().manual_seed(1)), monkeypatch)
    for clip in (0.05, 1e6):  # all are clipped, none is
        sums = clipped(PatientRecipe(privacy(clip=clip, physical_batch=physical)), module, method, drawn)
        expected = loop(method, module, method.views(drawn, torch.Generator()), clip)
        distance = norm([a - b for a, b in zip(sums, expected, strict=True)])
        assert distance < 2e-3 * norm(expected)
        assert norm(sums) > 0.01 * min(clip, 1)


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("encoder", ["vit", "resnet"])
def test_a_patient_adds_no_more_than_the_clip_and_nearly_that(
    encoder: str, mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module = build("supervised", encoder)
    for seed in range(8):
        for clip in (1e-3, 0.1):
            recipe = PatientRecipe(privacy(clip=clip, physical_batch=2))
            added = norm(clipped(recipe, module, method, batch(1, seed)))
            assert 0.99 * clip < added <= clip * (1 + 1e-6)


@pytest.mark.parametrize("places", [1, 5, 200])
def test_norms_without_the_product_are_those_of_the_product(places: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g, a = torch.randn(4, places, 30, generator=generator), torch.randn(4, places, 40, generator=generator)
    g[3] = 0
    exact = (g.double().mT @ a.double()).flatten(1).norm(dim=1)
    found = Factors(g, a).norms().double()
    assert (found >= exact * (1 - 1e-6)).all() and (found <= exact * 1.01).all()


def test_norms_are_not_too_small_where_terms_cancel() -> None:
    """Two places whose products all but cancel: of the difference, single precision knows nothing."""
    g = torch.randn(64, 1, 300, generator=torch.Generator().manual_seed(0)) * 1e3
    a = torch.randn(64, 1, 300, generator=torch.Generator().manual_seed(1)) * 1e3
    a = torch.cat([a, -a * (1 + 1e-5)], dim=1)
    g = g.expand(-1, 2, -1)
    exact = (g.double().mT @ a.double()).flatten(1).norm(dim=1)
    assert (Factors(g, a).norms().double() >= exact).all()


@pytest.mark.parametrize(("small", "large"), [(2.6e-23, 1e19), (1e-38, 1e38), (1e-44, 1.0), (1e30, 1e37)])
@pytest.mark.parametrize("kept", [Factors, lambda g, a: Products(g.double().mT.float() @ a)])
def test_no_size_of_gradients_is_lost(kept: Callable[[Tensor, Tensor], Part], small: float, large: float) -> None:
    """Squares of these are 0 or infinite in single precision, and so are coefficients and products of some."""
    g, a = torch.full((1, 64, 96), small), torch.full((1, 64, 32), large / 10)
    part = kept(g, a)
    if isinstance(part, Products) and not part.samples.isfinite().all():
        assert not part.norms().isfinite().any()
        return
    exact = 64 * math.sqrt(96 * 32) * float(g[0, 0, 0]) * float(a[0, 0, 0])
    norms = part.norms()
    assert float(norms) == pytest.approx(exact, rel=1e-4)
    for clip in (1e-6, 1.0, 1e6):
        assert float(part.sum(clip / norms).norm()) == pytest.approx(clip, rel=1e-7)


@pytest.mark.parametrize(("field", "value"), [("clip", 5e-46), ("clip", 9e-7), ("physical_batch", 3)])
def test_settings_that_single_precision_undoes_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        PatientPrivacy.model_validate({"mode": "patient", field: value})


def silent(module: nn.Module) -> torch.optim.Optimizer:
    """Leaves the weights as they are, so that gradients can be looked at."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)


def gradient_of_steps(
    recipe: PatientRecipe, module: nn.Module, method: Method, drawn: Batch, steps: int = 1, expected: int = 4
) -> list[Tensor]:
    """What the optimizer is given in each of some steps of a round, flat."""
    found = []
    with training.repeatable(0), recipe.attached(module):
        recipe.indices(cohort([1] * expected), Stage(rounds=1, batch_size=expected), 0, False)
        for _ in range(steps):
            recipe.step(module, method, drawn, silent(module), FP32, torch.Generator().manual_seed(0))
            found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    return found


def test_the_gradient_is_the_sum_over_the_expected_number() -> None:
    method, module = build("supervised", "tiny")
    recipe = PatientRecipe(privacy(noise=SILENT, clip=0.1))
    method.views = lambda drawn, generator: ViewBatch((drawn.images,), drawn.patients, {"targets": drawn.targets})  # type: ignore[method-assign]
    [found] = gradient_of_steps(recipe, module, method, batch(7), expected=10)
    sums = clipped(recipe, module, method, batch(7))
    torch.testing.assert_close(found.double(), torch.cat([s.flatten() for s in sums]) / 10, atol=1e-7, rtol=1e-5)


def test_noise_has_its_deviation_in_every_parameter_also_without_patients() -> None:
    """Chi-square bounds, wrong once in 10 million runs; parameters share no draw and no step repeats another's."""
    method, module = build("mae")
    noise, clip, expected = 0.7, 2.0, 5
    recipe = PatientRecipe(privacy(noise, clip))
    steps = gradient_of_steps(recipe, module, method, batch(0), steps=12, expected=expected)
    drawn = torch.stack(steps).double() * expected / (noise * clip)
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], drawn.numel())
    assert low < float(drawn.square().sum()) < high
    for one in drawn.split([p.numel() for p in module.parameters()], dim=1):
        low, high = stats.chi2.ppf([1e-9, 1 - 1e-9], one.numel())
        assert low < float(one.square().sum()) < high
    assert len(drawn.unique()) > 0.99 * drawn.numel() * (1 - drawn.numel() / 2**25)
    for one, other in pairwise(drawn):
        assert abs(float(one @ other)) < 6 * math.sqrt(len(one))


def test_noise_is_rounded_only_once_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision a normal draw is never beyond 5.8 deviations, having 24 random bits."""
    method, module = build("supervised", "tiny")
    recipe = PatientRecipe(privacy(noise=0.5, clip=0.1))
    drawn: list[Tensor] = []
    draw = torch.randn
    monkeypatch.setattr(dpsgd.torch, "randn", lambda *size, **how: drawn.append(draw(*size, **how)) or drawn[-1])
    monkeypatch.setattr(recipe, "clipped_sums", lambda *_: (fixed, torch.zeros(0)))
    fixed = [torch.full_like(p, math.pi, dtype=torch.float64) for p in module.parameters()]
    [found] = gradient_of_steps(recipe, module, method, batch())
    noise = torch.cat([part.flatten() for part in drawn])
    assert noise.dtype == torch.float64
    assert float((noise.float().double() != noise).double().mean()) > 0.99
    assert torch.equal(found, ((math.pi + noise * 0.05) / 4).float())


def test_two_runs_of_a_study_share_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither noise nor views nor dropout nor patients come from the study's seed."""
    drawn: list[list[Tensor]] = [[], []]
    for run in drawn:
        method, module = build("mae")
        views = method.views
        with monkeypatch.context() as patch:
            patch.setattr(method, "views", lambda b, g, views=views, run=run: run.append(views(b, g)) or run[-1])
            run.append(gradient_of_steps(PatientRecipe(privacy()), module, method, batch(0))[0])
            gradient_of_steps(PatientRecipe(privacy(noise=SILENT)), module, method, batch())
        with training.repeatable(3), PatientRecipe(privacy()).attached(module):
            run.append(torch.rand(8))
    (noise, views, *_, dropout), (noise2, views2, *_, dropout2) = drawn
    assert float((noise == noise2).float().mean()) < 1e-3
    assert not torch.equal(views.extra["order"], views2.extra["order"])  # type: ignore[attr-defined]
    assert not torch.equal(views.views[0], views2.views[0])  # type: ignore[attr-defined]
    assert not torch.isclose(dropout, dropout2).any()


def test_a_patient_more_does_not_shift_known_draws_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the study's generators alone, others' views and dropped paths would repeat, or shift by the one more."""
    method, module = build("mae")
    for block in module.get_submodule("encoder").blocks:  # type: ignore[union-attr]
        block.drop_path1 = DropPath(0.5)
    state = torch.Generator().manual_seed(0).get_state()
    seen: list[Tensor] = []
    views = method.views
    monkeypatch.setattr(method, "views", lambda b, g: seen.append(g.get_state()) or views(b, g))
    given = torch.Generator().manual_seed(0)
    recipe = PatientRecipe(privacy(noise=SILENT, clip=1e6))
    outcomes = []
    for _ in range(2):
        with training.repeatable(0), recipe.attached(module):
            recipe.indices(cohort([1] * 4), Stage(rounds=1, batch_size=4), 0, False)
            outcomes.append(recipe.step(module, method, batch(), silent(module), FP32, given))
    assert torch.equal(given.get_state(), state)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(*outcomes)


def test_every_word_of_the_processors_generator_is_secret() -> None:
    """torch's own seeding heeds 32 bits; the state is filled as the Mersenne twister reads it."""
    device = torch.device("cpu")
    known, wider = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.rand(9, generator=known), torch.rand(9, generator=wider))
    generator = secret_generator(device)
    words = generator.get_state()[dpsgd.MERSENNE].view(torch.int64)
    assert int(words.min()) >= 0 and int(words.max()) < 2**32
    assert len(words.unique()) > 620
    theirs = np.random.MT19937()
    theirs.state = {"bit_generator": "MT19937", "state": {"key": words.numpy().astype(np.uint32), "pos": 624}}
    ours = torch.empty(1500, dtype=torch.int64).random_(0, 2**20, generator=generator)
    assert ours.tolist() == [int(word) % 2**20 for word in theirs.random_raw(1500)]


def test_dropout_is_not_drawn_from_a_seed_of_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd.secrets, "randbits", lambda bits: 5)
    _, module = build("supervised", "tiny")
    drawn = []
    for _ in range(2):
        with forked(0), PatientRecipe(privacy()).attached(module):
            drawn.append(torch.rand(9))
    assert not torch.isclose(*drawn).any()


def test_patients_are_drawn_independently_and_one_image_of_each() -> None:
    images = [1, 2, 3, 1, 5, 1, 1, 2, 1, 4]
    held, stage = cohort(images), Stage(rounds=1, batch_size=3, local_epochs=1000)
    drawn = list(PatientRecipe(privacy()).indices(held, stage, seed=0, pairs=False))
    assert len(drawn) == steps_of_round(10, stage) == PatientRecipe(privacy()).steps(held, stage, False) == 4000
    assert sampling_rate(10, 3) == 0.3
    assert any(len(index) == 0 for index in drawn)
    for index in drawn:
        assert len(set(held.patients[index])) == len(index)
    sizes = np.bincount([len(index) for index in drawn], minlength=11)
    expected = stats.binom.pmf(np.arange(11), 10, 0.3) * 4000
    low, high = sizes[:7], expected[:7]
    assert stats.chisquare([*low, sizes[7:].sum()], [*high, expected[7:].sum()]).pvalue > 1e-7
    counts = np.bincount(np.concatenate(drawn), minlength=sum(images))
    for patient, several in enumerate(images):
        mine = counts[held.patients == patient]
        assert stats.binomtest(int(mine.sum()), 4000, 0.3).pvalue > 1e-8
        assert several == 1 or stats.chisquare(mine).pvalue > 1e-8
    together = sum(1 for index in drawn if {0, 9} <= set(held.patients[index]))
    assert stats.binomtest(together, 4000, 0.09).pvalue > 1e-8
    assert [list(i) for i in drawn] != [list(i) for i in PatientRecipe(privacy()).indices(held, stage, 0, False)]


def test_all_patients_are_drawn_where_as_many_are_expected() -> None:
    drawn = PatientRecipe(privacy()).indices(cohort([2] * 6), Stage(rounds=1, batch_size=6, local_epochs=50), 0, False)
    assert all((index // 2 == np.arange(6)).all() for index in drawn)


@pytest.mark.parametrize("patients", [0, 1, 7])
def test_a_site_too_small_for_the_batch_is_told_so(patients: int) -> None:
    """How many it has is told to who reads the site's own log: the problem alone leaves the site."""
    with pytest.raises(CohortError, match="fewer patients than a step") as told:
        PatientRecipe(privacy()).indices(cohort([1] * patients), Stage(rounds=1, batch_size=8), 0, False)
    assert f"it has {patients}" in told.value.fix
    assert "8" in told.value.problem and (not patients or str(patients) not in told.value.problem)


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_frozen_parameters_have_no_part_in_norm_and_sum(mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    method, module = build("supervised")
    module.get_submodule("encoder").requires_grad_(False)
    drawn = batch()
    hold(method, method.views(drawn, torch.Generator()), monkeypatch)
    sums = clipped(PatientRecipe(privacy(clip=0.05)), module, method, drawn)
    assert [s.shape for s in sums] == [(2, 16), (2,)]
    expected = loop(method, module, method.views(drawn, torch.Generator()), 0.05)
    torch.testing.assert_close(sums, [total.double() for total in expected], atol=1e-6, rtol=1e-3)
    assert not any(p.requires_grad for p in module.get_submodule("encoder").parameters())


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("physical", [1, 16])
def test_a_patient_without_a_finite_gradient_adds_nothing(
    value: float, physical: int, mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module = build("supervised", "tiny")
    drawn = batch(5)
    views = method.views(drawn, torch.Generator())
    others = ViewBatch((views.views[0][[0, 1, 3]],), torch.arange(3), {"targets": views.extra["targets"][[0, 1, 3]]})
    views.views[0][[2, 4]] = value
    module.encoder.norm = nn.Identity()  # a normalised layer knows no large numbers
    with torch.no_grad():
        module.encoder.out.weight *= 1e15
    recipe = PatientRecipe(privacy(clip=0.05, physical_batch=physical))
    hold(method, views, monkeypatch)
    with forked(0), recipe.attached(module):
        sums, losses = recipe.clipped_sums(module, method, drawn)
    assert len(losses) == 3 and losses.isfinite().all()
    hold(method, others, monkeypatch)
    expected = clipped(recipe, module, method, batch(3))
    torch.testing.assert_close(sums, expected, atol=1e-7, rtol=1e-4)
    both = torch.tensor([2, 4])
    hold(method, views, monkeypatch)
    assert norm(clipped(recipe, module, method, Batch(drawn.images[both], both, drawn.targets[both]))) == 0


def test_an_overflow_changes_nothing_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch overflows where it is kept, in half of the patients: they are left out, and nothing is drawn anew."""
    method, module = build("supervised", drop_path=0.5, views=UNCHANGED)
    with torch.no_grad():
        module.get_submodule("encoder.blocks.0.mlp.fc2").bias.fill_(3e38)  # type: ignore[operator, union-attr]
    recipe, left_out = PatientRecipe(privacy(clip=0.1)), []
    for seed in range(8):
        outcomes = []
        for patients in (6, 7):
            bits, data = secrets_from(seed)
            monkeypatch.setattr(dpsgd.secrets, "randbits", bits)
            monkeypatch.setattr(dpsgd.secrets, "token_bytes", data)
            with forked(0), recipe.attached(module):
                outcomes.append(recipe.clipped_sums(module, method, batch(patients)))
        (without, fewer), (sums, losses) = outcomes
        left_out.append(len(losses) == len(fewer))
        moved = norm([one - other for one, other in zip(sums, without, strict=True)])
        assert moved < 1e-12 if left_out[-1] else 0.05 < moved <= 0.1
    assert 0 < sum(left_out) < len(left_out)


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_images_without_a_label_add_nothing(mode: None) -> None:
    method, module = build("supervised", views=UNCHANGED)
    drawn = batch()
    labelled = [0, 3, 6]
    few = Batch(drawn.images[labelled], torch.arange(3), drawn.targets[labelled])
    drawn.targets[[1, 2, 4, 5]] = math.nan
    recipe = PatientRecipe(privacy(clip=0.05, physical_batch=2))
    torch.testing.assert_close(clipped(recipe, module, method, drawn), clipped(recipe, module, method, few))
    drawn.targets[:] = math.nan
    assert norm(clipped(recipe, module, method, drawn)) == 0


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_nothing_stays_on_the_module(mode: None) -> None:
    """Neither after a round nor after an error in the middle of a pass."""
    method, module = build("sssd")
    module.get_submodule("decoder").requires_grad_(False)
    fresh = copy.deepcopy(module)

    def traces(part: nn.Module) -> list[object]:
        hooks = [(len(m._forward_hooks), len(m._backward_hooks), set(m.__dict__)) for m in part.modules()]
        names = [(name, p.requires_grad, set(p.__dict__)) for name, p in part.named_parameters()]
        return [*hooks, *names, list(part.state_dict())]

    for error in (None, KeyError):
        with pytest.raises(KeyError) if error else nullcontext(), PatientRecipe(privacy()).attached(module) as _:
            module(torch.rand(3, 1, SIDE, SIDE), torch.arange(16).expand(3, -1))  # a forward pass left open
            if error:
                raise error
        assert traces(module) == traces(fresh)
    recipe = PatientRecipe(privacy())
    clipped(recipe, module, method, batch())
    assert traces(module) == traces(fresh)


class Functional(nn.Module):
    """A classifier that uses a layer's weight behind Opacus's back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TinyEncoder(1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(self.encoder(images), self.head.weight)


class Tied(Functional):
    """A layer with two places."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        answer: Tensor = self.head(features) + self.head(features.square())
        return answer


class Bare(Functional):
    """A parameter of its own beside a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.head(self.encoder(images)) * self.scale
        return answer


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize(
    ("model", "what"), [(Functional, r"known of head\.weight"), (Bare, "buffers"), (Tied, "used twice")]
)
def test_what_opacus_cannot_attribute_is_refused(model: type[nn.Module], what: str, mode: None) -> None:
    method, _ = build("supervised")
    module = model().train()
    before = [set(p.__dict__) for p in module.parameters()], [len(m._forward_hooks) for m in module.modules()]
    with pytest.raises(PolyclinicError, match=what):
        clipped(PatientRecipe(privacy()), module, method, batch())
    assert before == ([set(p.__dict__) for p in module.parameters()], [len(m._forward_hooks) for m in module.modules()])


def test_sssd_without_its_own_term_leaves_its_predictor_to_the_noise() -> None:
    method, module = build("sssd", weight=0.0)
    sums = clipped(PatientRecipe(privacy()), module, method, batch())
    names = [name for name, _ in module.named_parameters()]
    still = {name for name, total in zip(names, sums, strict=True) if norm([total]) == 0}
    assert still == {"predictor.weight", "predictor.bias"}


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.BatchNorm1d(8, affine=False), nn.SyncBatchNorm(4)])
def test_layers_that_mix_patients_are_refused(layer: nn.Module) -> None:
    module = Classifier(nn.Sequential(TinyEncoder(1), layer), 8, 2)
    with (
        pytest.raises(StudyError, match=r"encoder\.1 normalises over the batch"),
        PatientRecipe(privacy()).attached(module),
    ):
        pass


def test_a_loss_over_pairs_is_refused() -> None:
    method = make_method(stage_of("simclr"))
    module = method.build(TinyEncoder(1))
    with pytest.raises(StudyError, match="not separable"):
        clipped(PatientRecipe(privacy()), module, method, batch())


def test_two_images_of_a_patient_are_refused() -> None:
    method, module = build("supervised", "tiny")
    drawn = Batch(batch(2).images, torch.tensor([3, 3]), batch(2).targets)
    with pytest.raises(ValueError, match="one patient"):
        clipped(PatientRecipe(privacy()), module, method, drawn)


def test_a_model_that_is_all_frozen_is_refused() -> None:
    with (
        pytest.raises(StudyError, match="frozen"),
        PatientRecipe(privacy()).attached(TinyEncoder(1).requires_grad_(False)),
    ):
        pass


def test_the_loss_of_no_terms_is_no_error() -> None:
    recipe = PatientRecipe(privacy())
    assert (recipe.loss(0.0, 0), recipe.loss(3.0, 2)) == (0.0, 1.5)


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("name", ["mae", "sssd", "supervised"])
def test_a_round_trains(name: str, mode: None) -> None:
    stage = stage_of(name, local_epochs=2)
    method, module = build(name)
    before = copy.deepcopy(module.state_dict())
    held = cohort([1, 2, 1, 3, 1, 1, 2, 1, 1])
    targets = torch.eye(2)[torch.arange(len(held)) % 2]
    random = torch.get_rng_state()
    done, moments = training.train(
        module, method, held, stage, FP32, stage_round=1, seed=0, targets=targets, recipe=PatientRecipe(privacy())
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert done.steps == 2 * 3 and math.isfinite(done.loss)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(after[k].isfinite().all() and not torch.equal(after[k], before[k]) for k in before)
    assert {key.rsplit(".", 1)[0] for key in moments} == set(before)


def test_probe_rounds_train_the_head_only() -> None:
    stage = stage_of("supervised", probe_rounds=1)
    method, module = build("supervised")
    before, held = copy.deepcopy(module.state_dict()), cohort([1] * 5)
    targets = torch.eye(2)[torch.arange(5) % 2]
    training.train(
        module, method, held, stage, FP32, stage_round=0, seed=0, targets=targets, recipe=PatientRecipe(privacy())
    )
    assert {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])} == {"head.weight", "head.bias"}


def test_channels_last_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused optimizers walk weights and gradients side by side in memory."""
    targets = torch.eye(2)[torch.arange(6) % 2]
    weights = []
    for layout in ("contiguous", "channels_last"):
        method, module = build("supervised", "resnet")
        stage = stage_of("supervised", batch_size=6, optimizer="sgd")
        hold(method, ViewBatch((batch(6).images,), torch.arange(6), {"targets": targets}), monkeypatch)
        training.train(
            module, method, cohort([1] * 6), stage, Compute(threads=1, precision="fp32", layout=layout),
            stage_round=1, seed=0, targets=targets, recipe=PatientRecipe(privacy(noise=SILENT, clip=1e3)),
        )  # fmt: skip
        weights.append(torch.cat([v.flatten() for v in module.state_dict().values()]))
    start = torch.cat([v.flatten() for v in build("supervised", "resnet")[1].state_dict().values()])
    moved = weights[0] - start
    assert float(moved.norm()) > 0
    assert float((weights[1] - start - moved).norm()) < 0.05 * float(moved.norm())


def secrets_from(seed: int) -> Iterator[Callable[..., object]]:
    """Stand-ins for `secrets.randbits` and `secrets.token_bytes`, which repeat."""
    random = np.random.default_rng(seed)
    yield lambda bits: int(random.integers(2**62))
    yield lambda count: random.bytes(count)


def in_order(views: ViewBatch) -> ViewBatch:
    """The same, masked alike however many patients there are."""
    fixed = torch.rand(7, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    extra = {key: fixed[views.patients] if key == "order" else value for key, value in views.extra.items()}
    return ViewBatch(views.views, views.patients, extra)


@pytest.mark.parametrize("name", ["mae", "supervised"])
def test_one_patient_more_moves_the_gradient_by_no_more_than_the_clip(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` on two cohorts, all sampled, the same noise and views: the definition of sensitivity, end to end."""
    clip, found = 0.3, []
    for patients in (6, 7):
        bits, data = secrets_from(1)
        monkeypatch.setattr(dpsgd.secrets, "randbits", bits)
        monkeypatch.setattr(dpsgd.secrets, "token_bytes", data)
        monkeypatch.setattr(dpsgd, "sampling_rate", lambda patients, batch_size: 1.0)
        stage = stage_of(name, batch_size=6, optimizer="sgd", learning_rate=1.0, weight_decay=0.0, warmup_rounds=0.0)
        stage = stage.model_copy(update={"schedule": "constant", "layer_decay": 1.0, "rounds": 1})
        method, module = build(name, views=UNCHANGED)
        views = method.views
        monkeypatch.setattr(method, "views", lambda *given, views=views: in_order(views(*given)))
        before = copy.deepcopy(module.state_dict())
        images = cohort([1] * patients)
        targets = torch.eye(2)[torch.arange(patients) % 2]
        recipe = PatientRecipe(privacy(clip=clip, noise=1e-3))
        monkeypatch.setattr(recipe, "steps", lambda cohort, stage, pairs: 1)
        indices = recipe.indices
        monkeypatch.setattr(recipe, "indices", lambda *given, indices=indices: iter([next(indices(*given))]))
        training.train(module, method, images, stage, FP32, stage_round=0, seed=0, targets=targets, recipe=recipe)
        found.append([(v - before[k]) * 6 for k, v in module.state_dict().items()])  # a step of rate 1 over 6
    moved = norm([one - other for one, other in zip(*found, strict=True)])
    assert 0.5 * clip < moved <= clip * (1 + 1e-4)
