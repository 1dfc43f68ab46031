"""One low-rank pair beside a frozen linear layer: values, gradients, and how few calls it takes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphlora.ops.backend import has_triton, interprets_triton
from graphlora.ops.dropout.reference import hashed_mask
from graphlora.ops.lora_linear import AdaptedMatrix, add_low_rank, lora_linears, plain_matrix

SCALING = 1.7


class Kernels(TorchDispatchMode):
    """Operations that compute or copy; views are free."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(
            tag in str(func) for tag in ("view", "aten.t.", "split", "detach", "empty", "permute", "alias")
        ):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def case(dtype=torch.float32, bias=True, shape=(2, 5)):
    torch.manual_seed(0)
    layer = nn.Linear(12, 7, bias=bias).to(dtype).requires_grad_(False)
    A, B = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(7, 3))
    x = torch.randn(*shape, 12).to(dtype).requires_grad_()
    return layer, x, A, B


def written_out(layer, x, A, B):
    result = layer(x)
    return result + (SCALING * (x @ A.to(result.dtype).T)) @ B.to(result.dtype).T


def fused(layer, x, A, B, dropout=0.0):
    return lora_linears(x, [AdaptedMatrix(*plain_matrix(layer, x), A, B)], SCALING, dropout)[0]


def beside(layer, x, A, B, dropout=0.0):
    return add_low_rank(layer(x), x, A, B, SCALING, dropout)


def results(function, layer, x, A, B):
    out = function(layer, x, A, B)
    gradients = torch.autograd.grad(out, (x, A, B), torch.ones_like(out).cumsum(-1))
    return (out, *gradients)


@pytest.mark.parametrize("function", [fused, beside])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (4,), (), (0,)])
def test_equals_the_formula(function, bias, shape):
    arguments = case(bias=bias, shape=shape)
    for found, expected in zip(results(function, *arguments), results(written_out, *arguments), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("function", [fused, beside])
def test_half_precision_beside_float32_weights(function):
    arguments = case(torch.bfloat16)
    exact = case(torch.float32)
    found = results(function, *arguments)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, results(written_out, *exact), strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.02


@pytest.mark.skipif(
    not has_triton() or not (torch.cuda.is_available() or interprets_triton()), reason="Triton cannot run"
)
@pytest.mark.parametrize("function", [fused, beside])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_the_same_in_forward_and_backward(monkeypatch, function, dtype):
    """The mask is a hash of a seed; the frozen product sees all of x."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, x, A, B = case(dtype, shape=(9, 5))
    layer, (x, A, B) = layer.to(device), (t.detach().to(device).requires_grad_() for t in (x, A, B))
    monkeypatch.setattr(
        torch, "randint", lambda *_, **__: torch.tensor([77], dtype=torch.int32, device=device)
    )
    mask = hashed_mask(77, 45, 12, 0.4).view(9, 5, 12).to(device)
    assert 0.3 < float((mask == 0).float().mean()) < 0.5

    def found(layer, x, A, B):
        return function(layer, x, A, B, dropout=0.4)

    def expected(layer, x, A, B):
        return layer(x) + SCALING * ((x * mask) @ A.T) @ B.T

    exact = (layer.float(), x.detach().float().requires_grad_(), A, B)
    truth = results(expected, *exact)
    for one, other in zip(results(found, layer.to(dtype), x, A, B), truth, strict=True):
        bound = 1e-6 if dtype == torch.float32 else 0.02
        assert float((one.detach().float() - other.detach()).norm() / other.detach().norm()) < bound


@pytest.mark.skipif(
    not has_triton() or not (torch.cuda.is_available() or interprets_triton()), reason="Triton cannot run"
)
def test_several_matrices_drop_the_same_entries(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, matrices = several(shape=(9, 5))
    x = x.detach().to(device).requires_grad_()
    matrices = [
        AdaptedMatrix(*(t if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in m))
        for m in matrices
    ]
    monkeypatch.setattr(
        torch, "randint", lambda *_, **__: torch.tensor([77], dtype=torch.int32, device=device)
    )
    mask = hashed_mask(77, 45, 12, 0.4).view(9, 5, 12).to(device)

    def expected(x, matrices):
        return [
            nn.functional.linear(x, m.weight, m.bias) + SCALING * ((x * mask) @ m.lora_A.T) @ m.lora_B.T
            for m in matrices
        ]

    found = results_of_several(lambda x, m: lora_linears(x, m, SCALING, dropout=0.4), x, matrices)
    for one, other in zip(found, results_of_several(expected, x, matrices), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_a_float32_result_float32():
    layer, x, A, B = case()
    expected = beside(layer, x, A, B)
    result = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain_matrix(layer, x) is None
        found = add_low_rank(result, x, A, B, SCALING)
    assert torch.equal(found, expected)


def test_first_layer_needs_no_gradient_of_its_input():
    layer, x, A, B = case()
    for function in (fused, beside):
        function(layer, x.detach(), A, B).sum().backward()
    torch.testing.assert_close(A.grad, 2 * torch.autograd.grad(written_out(layer, x, A, B).sum(), A)[0])


def several(dtype=torch.float32, shape=(2, 5)):
    """x, and matrices that read it: of different sizes and ranks, one without a bias."""
    generator = torch.Generator().manual_seed(1)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator)

    x = random(*shape, 12).to(dtype).requires_grad_()
    matrices = []
    for out, rank, has_bias in ((8, 3, True), (4, 1, False), (5, 2, True)):
        bias = random(out).to(dtype) if has_bias else None
        pair = random(rank, 12).requires_grad_(), random(out, rank).requires_grad_()
        matrices.append(AdaptedMatrix(random(out, 12).to(dtype), bias, *pair))
    return x, matrices


def results_of_several(function, x, matrices):
    outs = function(x, matrices)
    total = sum((out * torch.ones_like(out).cumsum(-1)).sum() for out in outs)
    pairs = [tensor for matrix in matrices for tensor in matrix[2:]]
    return (*outs, *torch.autograd.grad(total, [x, *pairs]))


def one_by_one(x, matrices):
    return [
        nn.functional.linear(x, m.weight, m.bias)
        + (SCALING * (x @ m.lora_A.to(x.dtype).T)) @ m.lora_B.to(x.dtype).T
        for m in matrices
    ]


@pytest.mark.parametrize("shape", [(2, 5), (4,), (), (0,)])
def test_several_matrices_of_one_x_equal_the_formula(shape):
    arguments = several(shape=shape)
    found = results_of_several(lambda x, matrices: lora_linears(x, matrices, SCALING), *arguments)
    for one, expected in zip(found, results_of_several(one_by_one, *arguments), strict=True):
        assert one.shape == expected.shape
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_several_matrices_in_half_precision_beside_float32_pairs():
    found = results_of_several(lambda x, m: lora_linears(x, m, SCALING), *several(torch.bfloat16))
    exact = results_of_several(one_by_one, *several())
    assert [t.dtype for t in found] == [torch.bfloat16] * 4 + [torch.float32] * 6
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.02


def test_several_matrices_in_float64_by_finite_differences():
    x, matrices = several(torch.float64, shape=(3,))
    pairs = [tensor.detach().double().requires_grad_() for matrix in matrices for tensor in matrix[2:]]

    def function(x, *pairs):
        changed = [AdaptedMatrix(*m[:2], *pairs[2 * i : 2 * i + 2]) for i, m in enumerate(matrices)]
        return lora_linears(x, changed, SCALING)

    assert torch.autograd.gradcheck(function, (x, *pairs))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CAST = ["_foreach_copy_"]
# On a GPU the products themselves give float32.
TO_FLOAT32 = {"cpu": ["_to_copy", "_to_copy"], "cuda": []}


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        # The last products of both add in place where no mode looks, as the one that counts here does.
        (fused, ["addmm", "addmm", "addmm"], ["addmm", "addmm", "mm", "mm", "mm"]),
        (beside, ["addmm", "addmm", "addmm"], ["addmm", "mm", "mm", "mm", "mm", "add"]),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_calls(function, forward, backward, device):
    """One cast of A and B, and one call per product: the frozen layer's own are one `addmm` and one `mm`."""
    layer, *tensors = case(torch.bfloat16)
    layer, (x, A, B) = layer.to(device), (t.detach().to(device).requires_grad_() for t in tensors)
    grad = torch.randn(2, 5, 7, device=device).bfloat16()
    with Kernels() as calls:
        out = function(layer, x, A, B)
    assert sorted(calls.names) == sorted(CAST + forward)
    with Kernels() as calls:
        out.backward(grad)
    assert sorted(calls.names) == sorted(TO_FLOAT32[device] + backward)


@pytest.mark.parametrize("device", DEVICES)
def test_calls_of_several_matrices(device):
    """Beside the frozen products (3 and 3): one cast, one A and one gradient of A; x gets its gradient from 4 sums."""
    x, matrices = several(torch.bfloat16)
    x = x.detach().to(device).requires_grad_()
    matrices = [AdaptedMatrix(*(t if t is None else t.detach().to(device) for t in m)) for m in matrices]
    matrices = [AdaptedMatrix(*m[:2], *(t.requires_grad_() for t in m[2:])) for m in matrices]
    with Kernels() as calls:
        outs = lora_linears(x, matrices, SCALING)
    frozen = ["addmm", "mm", "addmm"]
    assert sorted(calls.names) == sorted(["cat", *CAST, "addmm", *frozen, "addmm", "addmm", "addmm"])
    grads = [torch.ones_like(out) for out in outs]
    with Kernels() as calls:
        torch.autograd.backward(outs, grads)
    narrowed = [name for name in TO_FLOAT32[device] for _ in range(2)]
    low, x_grads, pair_grads = ["addmm"] * 3 + ["cat"], ["mm"] + ["addmm"] * 3, ["mm"] * 4
    assert sorted(calls.names) == sorted([*narrowed, *low, *x_grads, *pair_grads])


def test_what_is_not_a_plain_matrix():
    layer, x, *_ = case()
    assert plain_matrix(layer, x) is not None
    assert plain_matrix(layer, x.bfloat16()) is None
    assert plain_matrix(nn.Sequential(layer), x) is None
    hook = layer.register_forward_hook(lambda *_: None)
    assert plain_matrix(layer, x) is None
    hook.remove()
    layer.forward = layer.forward
    assert plain_matrix(layer, x) is None
    del layer.forward
    assert plain_matrix(layer.requires_grad_(), x) is None
