"""Which rows there are, and with what settings."""

from dataclasses import replace

from polyclinic_simulations.papers.plans import TIERS, Plan, plans, pretraining, settings_of, trainable


def test_stages_of_a_row_share_its_epochs() -> None:
    tier = TIERS["cpu"][2]
    plan = Plan(2, "ham10000-subset", "patient", "federated", "simclr+micle", "random", 1.0, 0)
    first, second = pretraining(plan, tier)
    assert [first["method"], second["method"]] == ["simclr", "micle"]
    assert sum(stage["rounds"] * stage["local_epochs"] for stage in (first, second)) == tier.epochs["simclr"]
    [central] = pretraining(replace(plan, regime="central", method="mae"), tier)
    assert central["rounds"] * central["local_epochs"] == tier.epochs["mae"]


def test_tiers_know_every_method_and_dataset_of_their_rows() -> None:
    for plan in plans():
        if plan.method != "scratch" and plan.table != 4:
            assert all(pretraining(plan, tiers[plan.table]) for tiers in TIERS.values())


def test_tables_of_another_size_have_the_rows_that_its_encoder_can_train() -> None:
    small, residual = settings_of("cpu", "vit_small"), settings_of("cpu", "resnet50")
    assert [small[table].encoder for table in (1, 3)] == [{"name": "vit_small", "patch": patch} for patch in (12, 16)]
    assert all(at.encoder == {"name": "resnet50"} for at in residual.values())
    assert replace(small[1], encoder=TIERS["cpu"][1].encoder) == TIERS["cpu"][1]  # all else is the tier's
    assert settings_of("cpu") == TIERS["cpu"]
    assert all(trainable(plan, small[plan.table]) for plan in plans())
    left_out = {plan.method for plan in plans() if not trainable(plan, residual[plan.table])}
    assert left_out == {"mae", "sssd"}


def test_the_convolutions_of_big_transfer_take_every_table_of_theirs() -> None:
    tiers = settings_of("cpu", "bit_resnet50")
    assert all(at.encoder == {"name": "bit_resnet50"} for at in tiers.values())
    assert {plan.method for plan in plans() if not trainable(plan, tiers[plan.table])} == {"mae", "sssd"}
