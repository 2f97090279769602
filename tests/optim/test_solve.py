"""Natural gradients against (F + λ)⁻¹ ∇ of a matrix F that is written down, in float64.

F is row by row that of the matrix [d_out, D] of a layer: kron(G, A) for Kronecker factors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisherkern.optim import KFACPreconditioner
from optim import cases
from optim.cases import Images, Tokens, curvature, differentiate, error, filled

LAMBDA = 0.05
# κ of the damped factors is below 10³ here, and an inverse loses about κ roundings
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
OPTIONS: dict[str, Any] = {"damping": LAMBDA, "kl_clip": None, "fisher_type": "type-2"}

Values = dict[str, Tensor]


def natural(model: nn.Module, **options: Any) -> tuple[KFACPreconditioner, Values, Values]:
    """Gradients of a batch, before and after a step with its curvature."""
    preconditioner = KFACPreconditioner(model, **{**OPTIONS, **options})
    before = differentiate(model)
    preconditioner.step()
    return preconditioner, before, cases.gradients(model)


def matrix(module: nn.Module, values: Values, name: str) -> Tensor:
    """The matrix [d_out, D] of a layer, in float64."""
    weight, bias = values[f"{name}.weight"].double(), values.get(f"{name}.bias")
    if isinstance(module, nn.Embedding):
        return weight.mT
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return torch.cat([weight] if bias is None else [weight, bias.double()])[:, None]
    weight = weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias.double()[:, None]], 1)


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    G, A = (factor.double() for factor in layer.factors())
    return G, A.diag() if A.ndim == 1 else A


def damped(G: Tensor, A: Tensor, mode: str) -> Tensor:
    """F + λ as each mode has it."""
    if mode == "exact":
        return torch.kron(G, A) + LAMBDA * torch.eye(len(G) * len(A)).to(G)
    lam_G = lam_A = LAMBDA
    if mode == "pi":
        pi = float((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
        lam_G, lam_A = LAMBDA**0.5 / pi, LAMBDA**0.5 * pi
    return torch.kron(G + lam_G * torch.eye(len(G)).to(G), A + lam_A * torch.eye(len(A)).to(A))


def solved(F: Tensor, X: Tensor) -> Tensor:
    return torch.linalg.solve(F, X.reshape(-1)).reshape(X.shape)


def plus_damping(F: Tensor) -> Tensor:
    return F + LAMBDA * torch.eye(len(F)).to(F)


def norm_block(layer: Any) -> Tensor:
    return plus_damping(layer.matrix().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [Tokens, Images])
@pytest.mark.parametrize(
    ("mode", "inverse"),
    [
        ("pi", "cholesky"),
        ("pi", "eigh"),
        ("pi", "inverse-free"),
        ("per-factor", "cholesky"),
        ("per-factor", "eigh"),
        ("per-factor", "inverse-free"),
        ("exact", "eigh"),
    ],
)
def test_kronecker(mode: str, inverse: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = filled(kind(), dtype)
    made, before, after = natural(model, damping_mode=mode, inverse=inverse)
    assert len(made.capture.layers) == sum(1 for _ in model.children())
    for name, module in model.named_children():
        layer = curvature(made, name)
        norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        F = norm_block(layer) if norm else damped(*factors(layer), mode)
        expected = solved(F, matrix(module, before, name))
        assert error(matrix(module, after, name), expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_transposed_weight(dtype: torch.dtype) -> None:
    """Conv1D of GPT-2, whose weight is [d_in, d_out]."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = filled(
        nn.Sequential(nn.Embedding(7, 4), conv1d(6, 4), nn.Tanh(), nn.Linear(6, 5)), dtype
    )
    made, before, after = natural(model)
    F = damped(*factors(curvature(made, "1")), "pi")
    X, Y = (
        torch.cat([v["1.weight"].mT, v["1.bias"][:, None]], 1).double() for v in (before, after)
    )
    assert error(Y, solved(F, X)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inverse", ["cholesky", "inverse-free"])
def test_eigenvalues_of_ekfac_are_estimated_between_refreshes(
    inverse: str, dtype: torch.dtype
) -> None:
    """The inverse is that of the last basis and of the second moments up to this step."""
    model = filled(Images(), dtype)
    made, before, after = natural(model, structure="ekfac", inverse=inverse, damping_mode="pi")
    for name, module in model.named_children():  # the first step is that of K-FAC
        F = damped(*factors(curvature(made, name)), "exact")
        expected = solved(F, matrix(module, before, name))
        assert error(matrix(module, after, name), expected) < TOLERANCE[dtype], name
    for seed in (1, 2):  # which refresh as well
        differentiate(model, seed=seed)
        made.step()
    before = differentiate(model, seed=3)
    made.step()
    after = cases.gradients(model)
    for name, module in model.named_children():
        layer = curvature(made, name)
        Q_G, Q_A = (Q.double() for Q in layer.bases)
        Q, values = torch.kron(Q_G, Q_A), layer.moments.mean().double().flatten()
        X = matrix(module, before, name)
        expected = solved(plus_damping(Q @ values.diag() @ Q.mT), X)
        assert error(matrix(module, after, name), expected) < TOLERANCE[dtype], name
        of_the_old = solved(damped(*factors(layer), "exact"), X)
        assert error(of_the_old, expected) > 1e-3, "the moments do not matter here"


def test_embeddings_under_ekfac_are_kronecker() -> None:
    model = filled(Tokens(), torch.float64)
    for mode in ("pi", "exact", "per-factor"):
        made, before, after = natural(model, structure="ekfac", damping_mode=mode)
        F = damped(*factors(curvature(made, "embedding")), mode)
        expected = solved(F, matrix(model.embedding, before, "embedding"))
        assert error(matrix(model.embedding, after, "embedding"), expected) < 1e-8
        made.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [Tokens, Images])
@pytest.mark.parametrize("structure", ["diagonal", "block", "low-rank"])
def test_diagonal_block_and_low_rank(
    structure: str, kind: type[nn.Module], dtype: torch.dtype
) -> None:
    model = filled(kind(), dtype)
    made, before, after = natural(model, structure=structure)
    for name, module in model.named_children():
        layer, X = curvature(made, name), matrix(module, before, name)
        if structure == "diagonal":
            diagonal = {f"{name}.{role}": v for role, v in layer.diagonal().items()}
            expected = X / (matrix(module, diagonal, name) + LAMBDA)
        elif structure == "low-rank":
            expected = solved(plus_damping(layer.operator().to_dense().double()), X)
        else:
            expected = solved(norm_block(layer), X)
        assert error(matrix(module, after, name), expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["pi", "per-factor", "exact"])
def test_a_wide_head(mode: str, dtype: torch.dtype) -> None:
    """G = D̄ − U Uᵀ of all tokens; "exact" has no eigenbasis of it, and shares out as "pi" does."""
    model = filled(Tokens(), dtype)
    made, before, after = natural(model, widest=4, stride=1, damping_mode=mode, layers=["head"])
    logits = model(cases.batch_of(model)[0]).detach()
    G = mean_fisher(logits.double())
    A = curvature(made, "head").A.factor().double()
    F = damped(G, A, "pi" if mode == "exact" else mode)
    expected = solved(F, matrix(model.head, before, "head"))
    assert error(matrix(model.head, after, "head"), expected) < TOLERANCE[dtype]


def mean_fisher(logits: Tensor) -> Tensor:
    """The mean of diag p − p pᵀ over all tokens."""
    p = logits.flatten(0, -2).softmax(-1)
    return (p.diag_embed() - p[:, :, None] * p[:, None, :]).mean(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wide_layer_whose_outputs_are_no_logits(dtype: torch.dtype) -> None:
    """G = (1 / N) Σ g gᵀ of the gradients, here those of the loss."""
    model = filled(Tokens(), dtype)
    options = {"fisher_type": "empirical", "widest": 4, "stride": 1, "layers": ["lower", "head"]}
    made, before, after = natural(model, **options)
    grads: Values = {}
    for name in ("lower", "head"):

        def keep(g: Tensor, name: str = name) -> None:
            grads[name] = g.flatten(0, -2).double()

        def follow(_: nn.Module, args: Any, out: Tensor, keep: Any = keep) -> None:
            out.register_hook(keep)

        model.get_submodule(name).register_forward_hook(follow)
    differentiate(model)
    for name, module in (("lower", model.lower), ("head", model.head)):
        g = grads[name]
        F = damped(len(g) * g.mT @ g, curvature(made, name).A.factor().double(), "pi")
        expected = solved(F, matrix(module, before, name))
        assert error(matrix(module, after, name), expected) < TOLERANCE[dtype], name


def test_one_of_weight_and_bias_without_a_gradient() -> None:
    """The other is preconditioned as if it were zero, and nothing is made of it."""
    model = filled(Images(), torch.float64)
    made = KFACPreconditioner(model, **OPTIONS)
    before = differentiate(model)
    model.head.bias.grad = None
    before["head.bias"] = torch.zeros_like(model.head.bias)
    replaced = made.step()
    assert model.head.bias.grad is None
    assert id(model.head.bias) not in replaced
    X = matrix(model.head, before, "head")
    expected = solved(damped(*factors(curvature(made, "head")), "pi"), X)[:, :-1]
    assert error(model.head.weight.grad, expected) < 1e-8
