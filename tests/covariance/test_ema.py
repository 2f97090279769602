"""The moving average as a state: bias correction, splits, shards, ranks, saving."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DEVICE
from covariance import cases
from fisherkern import reference
from fisherkern.curvature import EMACovariance


def batches(*sizes: int, d: int = 6) -> list[Tensor]:
    g = cases.generator(0)
    return [torch.randn(n, d, generator=g).to(DEVICE) for n in sizes]


def average(**arguments: Any) -> EMACovariance:
    return EMACovariance(6, **{"ema_decay": 0.8, "device": DEVICE, **arguments})


def test_definition(backend: str) -> None:
    """Σ βᵏ (sum of step t − k) / Σ βᵏ (tokens of step t − k)."""
    xs = batches(5, 9, 2)
    state = average(bias=True)
    assert (state.factor() == 0).all()
    for x in xs:
        state.update(x)
    powers = [0.8**k for k in (2, 1, 0)]
    sums = [reference.covariance(x.double(), bias=True, reduction="sum") for x in xs]
    expected = sum(p * s for p, s in zip(powers, sums, strict=True)) / sum(
        p * len(x) for p, x in zip(powers, xs, strict=True)
    )
    assert cases.error(state.factor(), expected) < 1e-6
    assert torch.equal(state.factor(), state.factor().mT)


def test_equal_steps_are_the_usual_average_bias_corrected(backend: str) -> None:
    xs = batches(7, 7, 7)
    state, usual = average(), torch.zeros(6, 6, dtype=torch.float64, device=DEVICE)
    for x in xs:
        state.update(x)
        usual = 0.8 * usual + 0.2 * reference.covariance(x.double())
    assert cases.error(state.factor(), usual / (1 - 0.8**3)) < 1e-6


def test_without_decay_it_is_the_mean_of_everything(backend: str) -> None:
    xs = batches(3, 8)
    state = average(ema_decay=None)
    for x in xs:
        state.update(x)
    assert cases.error(state.factor(), reference.covariance(torch.cat(xs).double())) < 1e-6
    assert state.count == 11


def test_micro_batches_are_one_step(backend: str) -> None:
    first, *parts = batches(5, 3, 4, 1)
    whole, split = average(), average()
    for state in (whole, split):
        state.update(first)
    whole.update(torch.cat(parts))
    for i, x in enumerate(parts):
        split.update(x, new_step=i == 0)
    assert cases.error(split.factor(), whole.factor()) < 1e-6
    torch.testing.assert_close(split.count, whole.count)


def test_shards_merge_into_the_whole(backend: str) -> None:
    whole, shards = average(heads=None), [average(), average()]
    for x in batches(8, 6, 10):
        mask = torch.rand(len(x), generator=cases.generator(len(x))).to(DEVICE) > 0.3
        whole.update(x, mask=mask)
        shards[0].update(x[:5], mask=mask[:5])
        shards[1].update(x[5:], mask=mask[5:])
    merged = EMACovariance.merge(shards)
    assert cases.error(merged.factor(), whole.factor()) < 1e-6
    torch.testing.assert_close(merged.count, whole.count)


def test_a_step_without_tokens_changes_nothing(backend: str) -> None:
    (x,) = batches(5)
    state = average()
    state.update(x)
    before = state.factor()
    state.update(
        torch.full_like(x, torch.nan), mask=torch.zeros(5, dtype=torch.bool, device=DEVICE)
    )
    assert cases.error(state.factor(), before) < 1e-6


def test_save_and_resume_give_the_same_bits(backend: str) -> None:
    one, two, three = (x.view(-1, 2, 3) for x in batches(5, 6, 7))
    through = EMACovariance(3, heads=2, device=DEVICE)
    for x in (one, two):
        through.update(x)
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    through.update(three)
    file.seek(0)
    resumed = EMACovariance(3, heads=2, device=DEVICE)
    resumed.load_state_dict(torch.load(file))
    resumed.update(three)
    assert torch.equal(resumed.factor(), through.factor())
    assert torch.equal(resumed.count, through.count)


def test_refused_updates_and_states_change_nothing(backend: str) -> None:
    (x,) = batches(5)
    state = average()
    state.update(x)
    factor, count = state.factor(), state.count
    for error, arguments in (
        (ValueError, {"x": x[:, 1:]}),
        (ValueError, {"x": x, "mask": torch.ones(4, dtype=torch.bool, device=DEVICE)}),
        (TypeError, {"x": x.double()}),
        (ValueError, {"x": x, "scale": float("inf")}),
    ):
        with pytest.raises(error):
            state.update(**arguments)
    good = state.state_dict()
    for error, change in (
        (ValueError, {"sum": torch.zeros(5, 5)}),
        (ValueError, {"ema_decay": 0.5}),
        (ValueError, {"bias": True}),
        (TypeError, {"count": 3}),
    ):
        with pytest.raises(error):
            state.load_state_dict({**good, **change})
    with pytest.raises(KeyError, match="state lacks count, sum"):
        state.load_state_dict({"ema_decay": 0.8, "bias": False})
    assert torch.equal(state.factor(), factor)
    assert torch.equal(state.count, count)


def test_bad_configurations() -> None:
    for message, arguments in (
        ("width is 0; expected an int >= 1", {"width": 0}),
        ("heads is 0; expected an int >= 1", {"width": 2, "heads": 0}),
        (r"ema_decay is 1: the average would never move", {"width": 2, "ema_decay": 1.0}),
        (r"ema_decay is -1; allowed are numbers in", {"width": 2, "ema_decay": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            EMACovariance(**arguments)
    with pytest.raises(TypeError, match=r"dtype is torch.bfloat16; allowed are float32, float64"):
        EMACovariance(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="shards is empty"):
        EMACovariance.merge([])
    with pytest.raises(ValueError, match="they must be alike"):
        EMACovariance.merge([EMACovariance(2), EMACovariance(3)])


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    state = EMACovariance(6, ema_decay=0.8)
    results = []
    for step in range(3):
        g = cases.generator(step)
        x = torch.randn(8, 6, generator=g)
        state.update(x[:3] if rank == 0 else x[3:])
        results.append(state.all_reduced().factor())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    whole = EMACovariance(6, ema_decay=0.8)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step in range(3):
        whole.update(torch.randn(8, 6, generator=cases.generator(step)))
        assert torch.equal(ranks[0][step], ranks[1][step])
        assert cases.error(ranks[0][step], whole.factor()) < 1e-6
