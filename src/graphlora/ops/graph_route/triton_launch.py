"""The raw operations of the fused graph router: launches of the kernels, registered with PyTorch.

README.md counts them. All outputs are fresh tensors; an output that a call does not need is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphlora.ops.graph_route import triton_nodes as nodes
from graphlora.ops.graph_route import triton_static as static_part
from graphlora.ops.graph_route import triton_tokens as tokens_part
from graphlora.ops.graph_route.triton_tiles import Tiles, input_tiles, tiles_for
from graphlora.ops.operations import launches_kernels
from graphlora.ops.products import product_float32
from graphlora.ops.sizes import ceil_div, next_power_of_2

# Tokens, columns and registers of the kernel that ends the gradient of x: with more registers fewer programs fit.
_INPUT_TOKENS, _INPUT_COLUMNS, _INPUT_REGISTERS = 128, 128, 128
# Layer 2's inputs and gradients exist for this many bytes of tokens at a time, in backward alone.
_SCRATCH_BYTES = 256 * 2**20
_COPY_BLOCK, _STATIC_COLUMNS, _TOKEN_COLUMNS, _SUM_COLUMNS = 4096, 16, 64, 32
# Numbers of x that a program reads for its sums of squares, and how many of one token at a time.
_SQUARES, _LONGEST = 8192, 4096
_library = torch.library.Library("graphlora", "FRAGMENT")


def _copied(source: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a rounded copy of a weight; empty where the weight has that dtype already."""
    return source.new_empty(0 if source.dtype == dtype else source.shape, dtype=dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return product_float32(a, b, widen_factors=True)


@launches_kernels
def prepare(
    features: Tensor, conv: Tensor, self_weight: Tensor | None, graph: Tensor, token_proj: Tensor, x: Tensor,
    residual: float, act: str, graph_normalized: bool, square_sums: bool, project: bool,
    gate_A: Tensor | None = None, up_A: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One launch: everything that does not depend on the token, and the sums of squares of the tokens.

    Args:
        features: expert features before their activation, `[N, g]`.
        conv: W_l, `[2, g, g]`.
        self_weight: S_l, `[2, g, g]`, or None.
        graph: adjacency of the experts `[N, N]`, or Â `[N + 1, N + 1]`.
        token_proj: P_x, `[g, d]`.
        x: `[tokens, d]`.
        residual: a of the self term `"residual"`, else 0.
        act: name of the activation.
        graph_normalized: whether `graph` is Â.
        square_sums: whether to sum the squares of each token.
        project: whether P_x is needed in the dtype of x.
        gate_A: rows `[..., d]` to stack below P_x, for one product with all of them; or None.
        up_A: likewise, below these, of the same size.

    Returns:
        static, P_x (and what is below it), W and S rounded for products (empty where they need no copy), sums of
        squares `[tokens]` or empty.
    """
    outputs = _prepare_fake(
        features, conv, self_weight, graph, token_proj, x, residual, act, graph_normalized, square_sums, project,
        gate_A, up_A,
    )  # fmt: skip
    static, proj_rounded, conv_rounded, self_rounded, square_sum = outputs
    num_experts, g = features.shape
    tokens, d = x.shape
    tiles = tiles_for(tokens, num_experts, g, x.dtype)
    row_block = min(next_power_of_2(d), _LONGEST)
    rows = _SQUARES // row_block
    blocks = [
        ceil_div(g, _STATIC_COLUMNS),
        ceil_div(token_proj.numel() if proj_rounded.numel() else 0, _COPY_BLOCK),
        *(ceil_div(t.numel(), _COPY_BLOCK) for t in (conv_rounded, self_rounded)),
        ceil_div(square_sum.numel(), rows),
    ]
    beside_size = 0 if gate_A is None else gate_A.numel()
    beside_blocks = ceil_div(beside_size, _COPY_BLOCK)
    half = g + beside_size // d
    static_part.prepare_kernel[(sum(blocks) + 2 * beside_blocks,)](
        features, conv, conv if self_weight is None else self_weight, graph, static, token_proj, proj_rounded,
        conv_rounded, self_rounded, x, square_sum,
        *(static if t is None else t for t in (gate_A, proj_rounded[g:], up_A, proj_rounded[half:])),
        residual, tokens, d, num_experts, g,
        blocks[0], token_proj.numel(), blocks[1], conv.numel(), blocks[2], blocks[3], beside_size, beside_blocks,
        BJ=_STATIC_COLUMNS, BR=rows, BD=row_block, BLOCK=_COPY_BLOCK, ACT=act, SELF=self_weight is not None,
        RESIDUAL=residual != 0, GIVEN=graph_normalized, **_static_tiles(num_experts, tiles.width),
    )  # fmt: skip
    return outputs


def _static_tiles(num_experts: int, width: int) -> dict[str, int]:
    """Padded number of nodes and columns at a time; with more than 31 experts only the smaller fit in shared memory."""
    padded = max(16, next_power_of_2(num_experts + 1))
    if padded > 32:
        return {"NQ": padded, "BK": min(width, 32), "num_warps": 8, "num_stages": 1}
    return {"NQ": padded, "BK": min(width, 64), "num_warps": 4, "num_stages": 3}


def _prepare_fake(
    features: Tensor, conv: Tensor, self_weight: Tensor | None, graph: Tensor, token_proj: Tensor, x: Tensor,
    residual: float, act: str, graph_normalized: bool, square_sums: bool, project: bool,
    gate_A: Tensor | None = None, up_A: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    num_experts, g = features.shape
    weights_dtype = conv.dtype if x.dtype == torch.float32 else torch.float16
    size = (2 * num_experts + 1) * (g + 1) + num_experts * num_experts
    return (
        x.new_empty(size, dtype=torch.float32),
        _room_for_proj(token_proj, x, project, 0 if gate_A is None else 2 * gate_A.numel()),
        _copied(conv, weights_dtype),
        conv.new_empty(0) if self_weight is None else _copied(self_weight, weights_dtype),
        x.new_empty(len(x) if square_sums else 0, dtype=torch.float32),
    )


def _room_for_proj(token_proj: Tensor, x: Tensor, project: bool, beside: int) -> Tensor:
    if beside:
        return x.new_empty(len(token_proj) + beside // x.shape[1], x.shape[1])
    return _copied(token_proj, x.dtype) if project else x.new_empty(0)


def project(x: Tensor, proj: Tensor) -> Tensor:
    """`x proj^T`, `[tokens, rows]`, in float32."""
    return _product(x, proj.T)


@launches_kernels
def finish(
    z: Tensor, square_sum: Tensor, static: Tensor, conv: Tensor, self_weight: Tensor | None, out: Tensor,
    logit_offset: Tensor | None, num_experts: int, d: int, act: str, residual: float, eps: float,
    top_k: int, norm_topk_prob: bool, precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Two launches: from the token projection to the routing.

    Args:
        z: `x P_x^T`, `[tokens, g]`, float32; rows may have any stride.
        square_sum: sums of squares of the tokens `[tokens]`; not read where `eps` is negative.
        static: from `prepare`.
        conv: W_l, in any dtype.
        self_weight: S_l, or None.
        out: p, `[g]`.
        logit_offset: subtracted from the logits, `[N]`, or None.
        num_experts: N.
        d: width of the tokens that the squares were summed over.
        act: name of the activation.
        residual: a of the self term `"residual"`, else 0.
        eps: added to the mean square; negative for no normalization.
        top_k: K.
        norm_topk_prob: divide the selected probabilities by their sum.
        precise: products in float32 instead of float16.

    Returns:
        router_logits and router_probs `[tokens, N]`, top_k_weights and top_k_index `[tokens, K]`, and v (and q)
        `[tokens, g or 2 g]`.
    """
    outputs = _finish_fake(
        z, square_sum, static, conv, self_weight, out, logit_offset, num_experts, d, act, residual, eps,
        top_k, norm_topk_prob, precise,
    )  # fmt: skip
    logits, probs, weights, index, vq = outputs
    tokens, g = z.shape
    if tokens == 0:
        return outputs
    has_self = self_weight is not None
    own = conv if self_weight is None else self_weight
    tiles = tiles_for(tokens, num_experts, g, torch.float32 if precise else torch.bfloat16, has_self)
    block = min(tiles.width, _TOKEN_COLUMNS)
    tokens_part.tokens_forward_kernel[(ceil_div(tokens, tiles.token_rows), ceil_div(g, block), 1 + has_self)](
        z, square_sum, conv, own, vq, tokens, d, eps, z.stride(0), g,
        BJ=block, ACT=act, SELF=has_self, NORM=eps >= 0, num_warps=4, **tiles.token_constants,
    )  # fmt: skip
    nodes.nodes_forward_kernel[(ceil_div(tokens, tiles.tokens),)](
        static, vq, conv, own, out, out if logit_offset is None else logit_offset, logits, probs, weights, index,
        tokens, num_experts, g, K=top_k, KP=next_power_of_2(top_k), ACT=act, SELF=has_self,
        RESIDUAL=residual != 0, OFFSET=logit_offset is not None, NORMALIZE=norm_topk_prob, **tiles.node_constants,
    )  # fmt: skip
    return outputs


def _finish_fake(
    z: Tensor, square_sum: Tensor, static: Tensor, conv: Tensor, self_weight: Tensor | None, out: Tensor,
    logit_offset: Tensor | None, num_experts: int, d: int, act: str, residual: float, eps: float,
    top_k: int, norm_topk_prob: bool, precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, g = z.shape
    logits = z.new_empty(tokens, num_experts)
    weights = z.new_empty(tokens, top_k)
    vq = z.new_empty(tokens, g if self_weight is None else 2 * g)
    return logits, torch.empty_like(logits), weights, torch.empty_like(weights, dtype=torch.int64), vq


@launches_kernels
def backward(
    grad_logits: Tensor | None, grad_probs: Tensor | None, grad_weights: Tensor | None,
    grad_passed: Tensor | None, grad_low: Tensor | None,
    x: Tensor, proj: Tensor, features: Tensor, conv: Tensor, self_weight: Tensor | None,
    conv_rounded: Tensor, self_rounded: Tensor | None, out: Tensor, graph: Tensor,
    z: Tensor, square_sum: Tensor, vq: Tensor, static: Tensor, probs: Tensor, index: Tensor,
    residual: float, act: str, eps: float, norm_topk_prob: bool, graph_normalized: bool, graph_grad: bool, x_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, P_x, the expert features, W, S, p and Â; empty where not asked for. Seven launches but for Â.

    `proj`, `conv_rounded` and `self_rounded` are as the products of the forward pass took them; z and the gradient of
    `proj` belong to all of its rows. `grad_passed` is what other uses of x give it; `grad_low` the gradient of x times
    the rows below P_x.
    """
    outputs = _backward_fake(
        grad_logits, grad_probs, grad_weights, grad_passed, grad_low,
        x, proj, features, conv, self_weight, conv_rounded, self_rounded, out, graph, z, square_sum, vq, static,
        probs, index, residual, act, eps, norm_topk_prob, graph_normalized, graph_grad, x_grad,
    )  # fmt: skip
    grad_x, _, grad_features, grad_conv, grad_self, grad_out, _ = outputs
    (tokens, d), (num_experts, g) = x.shape, features.shape
    has_self = self_weight is not None
    own_rounded = conv_rounded if self_rounded is None else self_rounded
    tiles = tiles_for(tokens, num_experts, g, x.dtype, has_self, True, graph_grad)
    if tokens == 0:
        return tuple(t.zero_() for t in outputs)
    common = {"ACT": act, "SELF": has_self}
    grad_vq, second_layer, partial, edges = _node_gradients(
        grad_logits, grad_probs, grad_weights, conv_rounded, own_rounded, out, vq, static, probs, index,
        tiles, residual, norm_topk_prob, graph_grad, common,
    )  # fmt: skip
    token_features = torch.empty_like(grad_vq[:, :g], memory_format=torch.contiguous_format)
    columns = len(proj)
    grad_z = x.new_empty(tokens, columns)
    if columns > g:
        grad_low = z.new_zeros(tokens, columns - g) if grad_low is None else grad_low.contiguous()
    width = min(tiles.width, _TOKEN_COLUMNS)
    pull = square_sum.new_empty(tiles.width // width, len(square_sum))
    sums = torch.empty_like(partial[0])
    token_blocks = ceil_div(tokens, tiles.token_rows)
    grid = (token_blocks + ceil_div(sums.numel(), _SUM_COLUMNS), len(pull))
    tokens_part.tokens_backward_kernel[grid](
        z, square_sum, conv_rounded, own_rounded, grad_vq, token_features, z if grad_low is None else grad_low,
        grad_z, pull, partial, sums,
        tokens, d, eps, g, z.stride(0), columns, token_blocks, len(partial), sums.numel(),
        BI=width, BR=128, BC=_SUM_COLUMNS, NORM=eps >= 0, num_warps=4, num_stages=2,
        **common, **tiles.token_constants,
    )  # fmt: skip
    first_layer = _product(grad_vq.T, token_features)
    blocks = ceil_div(g, _STATIC_COLUMNS)
    grad_mixing = z.new_empty(blocks if graph_grad else 0, num_experts + 1, num_experts)
    static_part.static_backward_kernel[(blocks,)](
        features, conv, conv if self_weight is None else self_weight, graph, sums, first_layer, second_layer,
        grad_features, grad_conv, grad_self, grad_out, grad_mixing, residual, num_experts, g, len(sums),
        BI=_STATIC_COLUMNS, RESIDUAL=residual != 0, GIVEN=graph_normalized, EDGES=graph_grad,
        **_static_tiles(num_experts, tiles.width), **common,
    )  # fmt: skip
    grad_graph = (
        _graph_gradient(edges, grad_mixing.sum(dim=0), num_experts, residual) if graph_grad else outputs[6]
    )
    if x_grad:
        _input_gradient(grad_z, proj, pull, x, grad_passed, grad_x, tiles, g, eps >= 0)
    grad_proj = _product(grad_z.T, x)
    return grad_x, grad_proj, grad_features, grad_conv, grad_self, grad_out, grad_graph


def _input_gradient(
    grad_z: Tensor, proj: Tensor, pull: Tensor, x: Tensor, grad_passed: Tensor | None, grad_x: Tensor,
    tiles: Tiles, g: int, normalized: bool,
) -> None:  # fmt: skip
    """Writes `grad_x`; a block's products beside the router, and its gradient of x, take a kernel of their own."""
    (tokens, d), columns = x.shape, len(proj)
    constants = {"PULLS": len(pull), "NORM": normalized, "PRECISE": tiles.precise, "num_warps": 8}
    if grad_passed is not None or columns > g:
        rows, wide = (64, 64) if tiles.precise else (_INPUT_TOKENS, _INPUT_COLUMNS)
        base = x if grad_passed is None else grad_passed.contiguous()
        tokens_part.block_gradient_kernel[(ceil_div(d, wide), ceil_div(tokens, rows))](
            grad_z, proj, pull, x, base, grad_x, tokens, d, columns, BT=rows, BD=wide,
            G=tiles.depth * ceil_div(columns, tiles.depth), BK=tiles.depth, BASE=grad_passed is not None,
            num_stages=2, maxnreg=_INPUT_REGISTERS, **constants,
        )  # fmt: skip
        return
    rows, block, stages, programs = input_tiles(tiles)
    parts = ceil_div(programs, ceil_div(tokens, rows))
    step = ceil_div(ceil_div(d, parts), block) * block
    tokens_part.input_gradient_kernel[(ceil_div(d, step), ceil_div(tokens, rows))](
        grad_z, proj, pull, x, grad_x, tokens, d, g, step, BT=rows, BD=block, G=tiles.width, STAGES=stages, **constants,
    )  # fmt: skip


def _node_gradients(
    grad_logits: Tensor | None, grad_probs: Tensor | None, grad_weights: Tensor | None,
    conv: Tensor, own: Tensor, out: Tensor, vq: Tensor, static: Tensor, probs: Tensor, index: Tensor,
    tiles: Tiles, residual: float, norm_topk_prob: bool, graph_grad: bool, common: dict[str, str | bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of v (and q) and of layer 2's weights; every tile's shares of the others.

    These are of c, p and the residual's rows, `[tiles, rows, g]`, and of the graph.
    """
    (tokens, num_experts), (width, g) = probs.shape, (vq.shape[1], out.shape[0])
    dtype = torch.float32 if tiles.precise else torch.bfloat16
    rows = 2 * num_experts + 2 if residual else num_experts + 2
    num_tiles = ceil_div(tokens, tiles.tokens)
    grad_vq = torch.empty_like(vq, dtype=dtype)
    partial = vq.new_empty(num_tiles, rows, g)
    blocks = tiles.width // tiles.columns_back
    edges = vq.new_empty(
        num_tiles * blocks if graph_grad else 0, num_experts * num_experts + 2 * num_experts + 1
    )
    # In float32 the product over all rows adds up in float64, and copies its inputs for that.
    per_tile = tiles.tokens * num_experts * (width + g) * (12 if tiles.precise else 2)
    step = max(_SCRATCH_BYTES // per_tile, 1) * tiles.tokens
    second_layer = None
    for first in range(0, tokens, step):
        end = min(first + step, tokens)
        features = vq.new_empty((end - first) * num_experts, width, dtype=dtype)
        grad_rows = vq.new_empty((end - first) * num_experts, g, dtype=dtype)
        nodes.nodes_backward_kernel[(ceil_div(end - first, tiles.tokens),)](
            static, vq, conv, own, out, probs, index,
            *(probs if t is None else t.contiguous() for t in (grad_logits, grad_probs, grad_weights)),
            grad_rows, features, grad_vq, partial, edges, first, end, num_experts, g, rows,
            BO=tiles.columns_back, OUT_STAGES=tiles.stages, K=index.shape[1], RESIDUAL=residual != 0,
            LOGITS=grad_logits is not None, PROBS=grad_probs is not None, WEIGHTS=grad_weights is not None,
            NORMALIZE=norm_topk_prob, EDGES=graph_grad, **common, **tiles.node_constants,
        )  # fmt: skip
        if tiles.precise:
            share = grad_rows.double().T @ features.double()
        else:
            share = _product(grad_rows.T, features)
        second_layer = share if second_layer is None else second_layer + share
    assert second_layer is not None
    return grad_vq, second_layer.float(), partial, edges


def _graph_gradient(edges: Tensor, grad_mixing: Tensor, num_experts: int, residual: float) -> Tensor:
    """Gradient of Â from its three uses: layer 1's mixing and alpha, and the later layer's mix and link."""
    square = num_experts * num_experts
    mix, link, alpha = edges.sum(dim=0).split([square, num_experts, num_experts + 1])
    total = torch.cat([grad_mixing, alpha[:, None]], dim=1)
    total[:num_experts] += torch.cat([mix.view(num_experts, num_experts), link[:, None]], dim=1)
    return total * (1 - residual)


def _backward_fake(
    grad_logits: Tensor | None, grad_probs: Tensor | None, grad_weights: Tensor | None,
    grad_passed: Tensor | None, grad_low: Tensor | None,
    x: Tensor, proj: Tensor, features: Tensor, conv: Tensor, self_weight: Tensor | None,
    conv_rounded: Tensor, self_rounded: Tensor | None, out: Tensor, graph: Tensor,
    z: Tensor, square_sum: Tensor, vq: Tensor, static: Tensor, probs: Tensor, index: Tensor,
    residual: float, act: str, eps: float, norm_topk_prob: bool, graph_normalized: bool, graph_grad: bool, x_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    nodes_and_token = features.shape[0] + 1
    return (
        x.new_empty(x.shape if x_grad else (0,)),
        x.new_empty(proj.shape, dtype=torch.float32),
        torch.empty_like(features, memory_format=torch.contiguous_format),
        torch.empty_like(conv, memory_format=torch.contiguous_format),
        conv.new_empty(0 if self_weight is None else self_weight.shape),
        torch.empty_like(out, memory_format=torch.contiguous_format),
        x.new_empty((nodes_and_token, nodes_and_token) if graph_grad else (0,), dtype=torch.float32),
    )


_library.define(
    "graph_route_prepare(Tensor features, Tensor conv, Tensor? self_weight, Tensor graph, Tensor token_proj, Tensor x, "
    "float residual, str act, bool graph_normalized, bool square_sums, bool project, Tensor? gate_A=None, "
    "Tensor? up_A=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "graph_route_finish(Tensor z, Tensor square_sum, Tensor static, Tensor conv, Tensor? self_weight, Tensor out, "
    "Tensor? logit_offset, int num_experts, int d, str act, float residual, float eps, int top_k, bool norm_topk_prob, "
    "bool precise) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "graph_route_backward(Tensor? grad_logits, Tensor? grad_probs, Tensor? grad_weights, Tensor? grad_passed, "
    "Tensor? grad_low, Tensor x, Tensor proj, Tensor features, Tensor conv, Tensor? self_weight, "
    "Tensor conv_rounded, Tensor? self_rounded, Tensor out, Tensor graph, Tensor z, Tensor square_sum, Tensor vq, "
    "Tensor static, Tensor probs, Tensor index, float residual, str act, float eps, bool norm_topk_prob, "
    "bool graph_normalized, bool graph_grad, bool x_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("graph_route_project(Tensor x, Tensor proj) -> Tensor")
for _name, _run, _fake in (
    ("graph_route_prepare", prepare, _prepare_fake),
    ("graph_route_finish", finish, _finish_fake),
    ("graph_route_backward", backward, _backward_fake),
    (
        "graph_route_project",
        project,
        lambda x, proj: x.new_empty(len(x), len(proj), dtype=torch.float32),
    ),
):
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"graphlora::{_name}", _fake)
