"""Device functions that the covariance kernels share.

Operands are tiles of rows as they lie in memory, [tokens, columns]. A token counts where its mask
is true or its weight is not zero; what the rows of the others hold, NaN included, is never read.
"""

import triton
import triton.language as tl


@triton.jit
def live_tokens(mask_ptr, weights_ptr, token, there):
    """Which of these tokens count, and their weights."""
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + token, mask=there, other=0.0)
        return weight != 0, weight
    elif mask_ptr is not None:
        live = tl.load(mask_ptr + token, mask=there, other=0) != 0
        return live, live.to(tl.float32)
    else:
        return there, there.to(tl.float32)


@triton.jit
def left_tile(rows_ptr, columns, width, live):
    """Tile [columns, tokens], zero where a token does not count: the left operand of tl.dot.

    Loaded in this orientation, as tl.trans of the other one would go through registers on sm_80
    and not by cp.async.
    """
    inside = (columns < width)[:, None] & live[None, :]
    return tl.load(rows_ptr[None, :] + columns[:, None], mask=inside, other=0.0)


@triton.jit
def right_tile(rows_ptr, columns, width, live):
    """Tile [tokens, columns], zero where a token does not count: the right operand of tl.dot."""
    inside = live[:, None] & (columns < width)[None, :]
    return tl.load(rows_ptr[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def rounded_to_tf32(x):
    """X with 10 bits of mantissa, halves away from zero; tl.dot would cut the bits off."""
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # the carry would turn the NaN of all ones into a zero
    return tl.where(x == x, near, x)


@triton.jit
def outer_products(acc, left, right, weight, WEIGHTED: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Acc + Σ_t weight_t left_t right_tᵀ, accumulated in float32; infinities may become NaN.

    ARITHMETIC as in `_covariance_config`. "bf16x6" is that of tl.dot: it splits the operands, and
    adds the small products first, to a sum that begins at zero in every step. So does "split".
    """
    if ARITHMETIC == "half":
        acc = tl.dot(left, right, acc)
    else:
        if WEIGHTED:
            left = left.to(tl.float32) * weight[None, :]
        if ARITHMETIC == "split":
            # the right side has at most 11 bits: tf32 holds it; the left is a sum of two of those
            high = rounded_to_tf32(left)
            low = left - high
            right = right.to(tl.float32)
            products = tl.dot(low, right, input_precision="tf32")
            acc += tl.dot(high, right, products, input_precision="tf32")
        else:
            if ARITHMETIC == "tf32":
                left = rounded_to_tf32(left)
                right = rounded_to_tf32(right)
            acc = tl.dot(left, right, acc, input_precision=ARITHMETIC)
    return acc


# Tensor cores cut off what they add to an accumulator: half a unit of its last place per 16 tokens
# of "half", 1e-5 of a sum of 8192 tokens (H200). Chains of so many are added up with ordinary
# additions. With 256 the error is still more than twice that of plain float32.
CHAIN_TOKENS = tl.constexpr(128)


@triton.jit
def ends_chain(offset, TOKENS: tl.constexpr):
    """Whether the step at this offset, of TOKENS, is the last one of a chain."""
    return offset % CHAIN_TOKENS == CHAIN_TOKENS - TOKENS


@triton.jit
def store_average(pointers, sums, alpha_ptr, beta, beta_low, inside):
    """Store beta · old + alpha · sums in the precision of the factor; beta = 0 reads nothing."""
    kind = pointers.dtype.element_ty
    alpha = tl.load(alpha_ptr).to(kind)
    if beta != 0:
        decay = beta.to(kind) + beta_low.to(kind)
        old = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, decay * old + alpha * sums.to(kind), mask=inside)
    else:
        tl.store(pointers, alpha * sums.to(kind), mask=inside)


@triton.jit
def left_and_right(tile):
    """The two halves of the columns of a tile."""
    halves = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def average_into(
    factor_ptr,
    factor_row,
    tile,
    row,
    column,
    height,
    width,
    alpha_ptr,
    beta,
    beta_low,
    TRIANGULAR: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Average a tile of sums at (row, column) into the factor.

    PIECE columns at a time: the old values of a whole tile would not fit in registers beside it.
    """
    if tile.shape[1] > PIECE:
        half: tl.constexpr = tile.shape[1] // 2
        left, right = left_and_right(tile)
        average_into(
            factor_ptr,
            factor_row,
            left,
            row,
            column,
            height,
            width,
            alpha_ptr,
            beta,
            beta_low,
            TRIANGULAR,
            PIECE,
        )
        average_into(
            factor_ptr,
            factor_row,
            right,
            row,
            column + half,
            height,
            width,
            alpha_ptr,
            beta,
            beta_low,
            TRIANGULAR,
            PIECE,
        )
    else:
        rows = (row + tl.arange(0, tile.shape[0]))[:, None]
        columns = (column + tl.arange(0, tile.shape[1]))[None, :]
        inside = (rows < height) & (columns < width)
        if TRIANGULAR:
            inside &= columns <= rows
        pointers = factor_ptr + rows.to(tl.int64) * factor_row + columns
        store_average(pointers, tile, alpha_ptr, beta, beta_low, inside)
