"""Triton kernels of the convolution on maps: a tile is some pixels by some channels.

Names as in the kernels of the selective scan: ``p_`` pointers, ``i_`` indices, ``o_`` offsets,
``b_`` blocks, ``m_`` masks. B batch, E channels, H W map, L = H W pixels. Arithmetic is float32;
offsets that grow with a tensor's size are int64.
"""

import triton
import triton.language as tl

from ..selective_scan.kernels.common import sigmoid
from ..unrolled import for_this_triton

_SIZES = ['height', 'width', 'tiles', 'repeat', 'parts']
_TAPS = tl.constexpr(9)


@triton.jit
def _place(i_tile, height, width, ROWS: tl.constexpr):
    """Pixels of a tile: index, row and column."""
    o_l = i_tile * ROWS + tl.arange(0, ROWS)
    return o_l, o_l // width, o_l % width


@triton.jit
def _neighbour(row, col, j: tl.constexpr, height, width):
    """Index of the pixel under tap j, and whether the map has it."""
    row = row + j // 3 - 1
    col = col + j % 3 - 1
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return (row * width + col).to(tl.int64), inside


@triton.jit
def _taps(
    p_u, p_weight, p_bias, u_sl, u_sd, row, col, o_d, m_d, height, width,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """The convolution at some pixels, and the values under its taps; zeros beyond the border."""
    b_c = tl.zeros([ROWS, COLS], tl.float32)
    if p_bias is not None:
        b_c += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    x_j = ()
    for j in tl.static_range(_TAPS):
        pixel, inside = _neighbour(row, col, j, height, width)
        m_x = inside[:, None] & m_d[None, :]
        b_x = tl.load(p_u + pixel[:, None] * u_sl + o_d[None, :] * u_sd, mask=m_x, other=0.0)
        b_w = tl.load(p_weight + o_d * _TAPS + j, mask=m_d, other=0.0).to(tl.float32)
        b_c = b_c + b_x.to(tl.float32) * b_w[None, :]
        x_j = x_j + (b_x,)
    return b_c, x_j


@triton.jit(do_not_specialize=_SIZES)
def map_conv_kernel(
    p_u, p_weight, p_bias, p_out, u_sb, u_sl, u_sd, channels, height, width, tiles, blocks,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """out = silu(bias + sum_j w_j u at the pixel under tap j); p_out is (B, L, E)."""
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks
    i_tile = ((pid // blocks) % tiles).to(tl.int32)
    i_b = pid // (blocks * tiles)
    o_d = i_block * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    o_l, row, col = _place(i_tile, height, width, ROWS)
    b_c, _ = _taps(p_u + i_b * u_sb, p_weight, p_bias, u_sl, u_sd, row, col, o_d, m_d, height,
                   width, ROWS, COLS)
    p_out += (i_b * height * width + o_l)[:, None] * channels + o_d[None, :]
    m_y = (o_l < height * width)[:, None] & m_d[None, :]
    tl.store(p_out, (b_c * sigmoid(b_c)).to(p_out.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=_SIZES)
def map_conv_weights_kernel(
    p_u, p_weight, p_bias, p_dout, p_g, p_sums, u_sb, u_sl, u_sd, dout_sb, dout_sl, dout_sd,
    channels, height, width, tiles, repeat, parts, blocks, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Gradient before the SiLU, (B, L, E), and its sums over ``repeat`` tiles for taps and bias.

    p_sums is (B * parts, 10, E), float32: a second pass adds it up in a fixed order.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks
    i_part = (pid // blocks) % parts
    i_b = pid // (blocks * parts)
    o_d = i_block * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    p_u += i_b * u_sb
    p_dout += i_b * dout_sb
    p_g += i_b * height * width * channels
    sums = ()
    for _ in tl.static_range(_TAPS + 1):
        sums = sums + (tl.zeros([ROWS, COLS], tl.float32),)
    for r in range(0, repeat):
        o_l, row, col = _place((i_part * repeat + r).to(tl.int32), height, width, ROWS)
        b_c, x_j = _taps(p_u, p_weight, p_bias, u_sl, u_sd, row, col, o_d, m_d, height, width,
                         ROWS, COLS)
        m_y = (o_l < height * width)[:, None] & m_d[None, :]
        pixel = o_l.to(tl.int64)[:, None]
        p = p_dout + pixel * dout_sl + o_d[None, :] * dout_sd
        b_g = tl.load(p, mask=m_y, other=0.0).to(tl.float32)
        b_sig = sigmoid(b_c)
        b_g = b_g * b_sig * (1.0 + b_c * (1.0 - b_sig))
        p = p_g + pixel * channels + o_d[None, :]
        tl.store(p, b_g.to(p_g.dtype.element_ty), mask=m_y)
        new = ()
        for j in tl.static_range(_TAPS):
            new = new + (sums[j] + b_g * x_j[j].to(tl.float32),)
        sums = new + (sums[_TAPS] + b_g,)
    p_sums += (i_b * parts + i_part) * (_TAPS + 1) * channels + o_d
    for j in tl.static_range(_TAPS + 1):
        tl.store(p_sums + j * channels, tl.sum(sums[j], axis=0), mask=m_d)


@triton.jit
def _sum_parts(p_sums, p_dweight, p_dbias, i, rows, channels, COLS: tl.constexpr):
    """dweight (E, 9) and dbias (E,): the sum of p_sums (rows, 10, E) over its rows."""
    cuts = tl.cdiv(channels, COLS)
    j = i // cuts
    o_d = (i % cuts) * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    o_r = tl.arange(0, 32)
    b_total = tl.zeros([32, COLS], tl.float32)
    for r0 in range(0, rows, 32):
        o = (r0 + o_r).to(tl.int64)
        p = p_sums + (o[:, None] * (_TAPS + 1) + j) * channels + o_d[None, :]
        b_total += tl.load(p, mask=(o < rows)[:, None] & m_d[None, :], other=0.0)
    b_sum = tl.sum(b_total, axis=0)
    p = p_dweight + o_d * _TAPS + j
    tl.store(p, b_sum.to(p_dweight.dtype.element_ty), mask=m_d & (j < _TAPS))
    if p_dbias is not None:
        tl.store(p_dbias + o_d, b_sum.to(p_dbias.dtype.element_ty), mask=m_d & (j == _TAPS))


@triton.jit
def _gather(p_g, p_weight, p_du, pid, channels, height, width, tiles, blocks,
            ROWS: tl.constexpr, COLS: tl.constexpr):
    """du (B, L, E): what the pixels around one took from it."""
    i_block = pid % blocks
    i_b = (pid // (blocks * tiles)).to(tl.int64)
    o_d = i_block * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    o_l, row, col = _place((pid // blocks) % tiles, height, width, ROWS)
    p_g += i_b * height * width * channels
    b_du = tl.zeros([ROWS, COLS], tl.float32)
    for j in tl.static_range(_TAPS):  # the pixel that has this one under its tap 8 - j
        pixel, inside = _neighbour(row, col, j, height, width)
        m_g = inside[:, None] & m_d[None, :]
        b_g = tl.load(p_g + pixel[:, None] * channels + o_d[None, :], mask=m_g, other=0.0)
        b_w = tl.load(p_weight + o_d * _TAPS + (8 - j), mask=m_d, other=0.0).to(tl.float32)
        b_du += b_g.to(tl.float32) * b_w[None, :]
    p_du += (i_b * height * width + o_l)[:, None] * channels + o_d[None, :]
    m_l = o_l < height * width
    tl.store(p_du, b_du.to(p_du.dtype.element_ty), mask=m_l[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=[*_SIZES, 'rows', 'over_tiles'])
def map_conv_input_kernel(
    p_g, p_weight, p_sums, p_du, p_dweight, p_dbias, channels, height, width, tiles, blocks,
    rows, over_tiles, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """The gradient of u in the first ``over_tiles`` programs; weights and bias in the others."""
    pid = tl.program_id(0)
    if pid < over_tiles:
        _gather(p_g, p_weight, p_du, pid, channels, height, width, tiles, blocks, ROWS, COLS)
    else:
        _sum_parts(p_sums, p_dweight, p_dbias, pid - over_tiles, rows, channels, COLS)


globals().update(for_this_triton(globals()))
