"""Two ranks under DistributedDataParallel are one with the whole batch."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fisherkern.optim import KFAC, KFACPreconditioner
from fisherkern.optim._ranks import Ranks
from optim import cases
from optim.cases import Tokens, error, filled

OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "damping": 0.1,
    "fisher_type": "type-2",
    "inverse_update_period": 2,
    "damping_period": 1,
}
EMPIRICAL = {"fisher_type": "empirical"}
CASES: dict[str, dict[str, Any]] = {
    "kfac": {},
    "wide head": {"widest": 4, "stride": 3, "layers": ["embedding", "layer_norm", "head"]},
    "wide layers": {"widest": 4, "stride": 1},
    "ekfac": {"structure": "ekfac"},
    "diagonal": {"structure": "diagonal"},
    "block": {"structure": "block"},
    "low-rank": {"structure": "low-rank", "rank": 100},
    "inverse-free": {"inverse": "inverse-free"},
    "exact": {"damping_mode": "exact"},
    "empirical": EMPIRICAL,
    "empirical ekfac": {**EMPIRICAL, "structure": "ekfac"},
    "empirical wide layers": {**EMPIRICAL, "widest": 4, "stride": 1},
}
STEPS = 3
# float64 sums in another order, through three inverses of condition numbers below 100
TOLERANCE = 1e-10


def masks(step: int) -> Tensor:
    """The second half of the samples has fewer tokens that count."""
    mask = torch.rand(6, 8, generator=cases.generator(step)) > 0.3
    mask[3:, 5:] = False
    mask[:, 0] = True
    return mask


def owners(optimizer: KFAC) -> dict[str, int]:
    """The rank that makes the inverse of each layer."""
    inner = optimizer.preconditioner
    return inner._ranks.owners(inner.capture.layers)


def trained(
    name: str,
    rows: slice,
    ranks: int,
    inner: nn.Module | None = None,
    optimizer: KFAC | None = None,
) -> dict[str, Any]:
    """A few steps, on some samples of each batch."""
    model = inner = filled(Tokens(), torch.float64).cpu() if inner is None else inner
    if ranks > 1:
        model = DistributedDataParallel(model)
    share = [1.0]
    options = {**OPTIONS, **CASES[name]}
    if options["fisher_type"] == "empirical":
        options["loss_scale"] = lambda: share[0]
    optimizer = optimizer or KFAC(model, **options)
    ratios = []
    for step in range(STEPS):
        x, y = (t[rows].cpu() for t in cases.batch_of(inner, step))
        whole, mask = masks(step), masks(step)[rows]
        # the gradients of the ranks are averaged
        share[0] = ranks * int(mask.sum()) / int(whole.sum())

        def loss(x: Tensor = x, y: Tensor = y, mask: Tensor = mask) -> Tensor:
            logits = model(x, attention_mask=mask)
            return functional.cross_entropy(logits[mask], y[mask]) * share[0]

        optimizer.zero_grad()
        before = loss()
        before.backward()
        optimizer.step()
        with torch.no_grad():
            ratios.append(optimizer.adapt_damping(float(before), float(loss())))
    return {
        "parameters": cases.parameters(inner),
        "ratios": ratios,
        "damping": optimizer.damping,
        "owners": owners(optimizer),
        "uncovered": optimizer.fallback(),
    }


def a_factor_fails(rank: int) -> dict[str, Any]:
    """On its owner alone, first before there is any inverse, then after."""
    model = DistributedDataParallel(filled(Tokens(), torch.float64).cpu())
    optimizer = KFAC(model, **{**OPTIONS, "inverse_update_period": 1})
    lower = cases.curvature(optimizer, "lower")
    owner = owners(optimizer)["lower"]
    found: dict[str, Any] = {"owner": owner, "warnings": [], "stepped": []}
    for step in range(4):
        x, y = (t[3 * rank :][:3].cpu() for t in cases.batch_of(model.module, step))
        optimizer.zero_grad()
        cases.loss_of(model, x, y).backward()
        if step in (0, 2):
            lower.G._sum.zero_()
            lower.G._sum.diagonal().fill_(-1e4 if rank == owner else 0.0)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            optimizer.step()
        found["warnings"].append([str(w.message) for w in given])
        found["stepped"].append(sorted(optimizer.state[model.module.lower.weight]))
        if step == 0:
            lower.G._sum.zero_()
            optimizer.preconditioner._warned.clear()
    return {**found, "parameters": cases.parameters(model.module)}


def an_error_of_the_owner(rank: int) -> list[str]:
    """That is no failure of a factorisation, such as too little memory: raised on every rank."""
    model = filled(Tokens(), torch.float64).cpu()
    optimizer = KFAC(model, **OPTIONS)
    cases.loss_of(model, *cases.batch_of(model)).backward()
    if rank == owners(optimizer)["lower"]:

        def broken(*_: Any) -> None:
            raise MemoryError("too little")

        type(cases.curvature(optimizer, "lower")).factors = broken
    try:
        optimizer.step()
    except MemoryError as raised:
        return [str(raised)]
    return []


def sharded() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    try:
        KFAC(model)
    except TypeError as refused:
        return str(refused)
    return ""


def run(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    early = filled(Tokens(), torch.float64).cpu()
    made = KFAC(early, **OPTIONS)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = slice(0, 3) if rank == 0 else slice(3, 6)
    results = {name: trained(name, rows, 2) for name in CASES}
    results["early"] = trained("kfac", rows, 2, early, made)
    results["failure"] = a_factor_fails(rank)
    results["sharded"] = sharded()
    results["error"] = an_error_of_the_owner(rank)  # the last, for it breaks a class
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found; one start of the processes serves every test."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(name: str, ranks: list[dict[str, Any]]) -> None:
    one, other = (results[name] for results in ranks)
    whole = trained(name, slice(0, 6), 1)
    start = cases.parameters(filled(Tokens(), torch.float64))
    assert one["ratios"] == other["ratios"]
    assert one["damping"] == other["damping"] != OPTIONS["damping"]
    assert one["ratios"] == pytest.approx(whole["ratios"], rel=1e-7)
    assert one["damping"] == whole["damping"]
    for key, value in whole["parameters"].items():
        assert torch.equal(one["parameters"][key], other["parameters"][key]), key
        assert error(one["parameters"][key], value) < TOLERANCE, key
        assert not torch.equal(value, start[key].cpu()), key


def test_an_optimizer_that_is_made_before_the_process_group(ranks: list[dict[str, Any]]) -> None:
    """As with Trainer, whose arguments set it up: the ranks are those of each step."""
    for results in ranks:
        for key, value in results["kfac"]["parameters"].items():
            assert torch.equal(results["early"]["parameters"][key], value), key


def test_layers_are_shared_out(ranks: list[dict[str, Any]]) -> None:
    """Of the factors here, of orders up to 8, either rank has the half."""
    owners = ranks[0]["kfac"]["owners"]
    assert owners == ranks[1]["kfac"]["owners"]
    # 6³ + 5³, 4³ + 7, 8³, 6³ and 5³ + 6³
    assert owners["layer_norm"] != owners["head"] == owners["lower"]
    assert set(owners.values()) == {0, 1}


def test_a_large_embedding_does_not_take_a_rank_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its A is a diagonal, and costs next to nothing."""
    model = nn.Sequential(
        nn.Embedding(5000, 8), nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 60), nn.Linear(60, 8)
    )
    capture = KFACPreconditioner(model).capture
    monkeypatch.setattr(Ranks, "size", 2)
    assert Ranks().owners(capture.layers) == {"0": 1, "1": 1, "3": 0, "4": 1}


def test_a_factor_that_fails_on_its_owner(ranks: list[dict[str, Any]]) -> None:
    """Every rank is told, the layer is left to AdamW or its last inverse, and nothing hangs."""
    first, second = (results["failure"] for results in ranks)
    for found in (first, second):
        before, between, after, said = found["warnings"]
        assert len(before) == len(after) == 1
        assert before[0].startswith("lower: a factor with an eigenvalue of -")
        assert "its gradient stays as it is" in before[0]
        assert "its last inverse is kept" in after[0]
        assert between == said == []
        assert found["stepped"][0] == ["exp_avg", "exp_avg_sq", "step"]
        assert "momentum_buffer" in found["stepped"][1]
    assert first["warnings"] == second["warnings"]
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key]), key
        assert value.isfinite().all(), key


def test_an_error_of_the_owner_reaches_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert [results["error"] for results in ranks] == [["too little"], ["too little"]]


def test_sharded_parameters_are_refused(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["sharded"] == (
            "model has the parameter weight as a DTensor: gradients that are sharded over ranks "
            "cannot be preconditioned; use data parallelism"
        )
