"""Both passes of the scan along walks: what a call multiplies, allocates and launches, by its kind.

B batch, K walks, E channels, L tokens, S steps of a walk, N state, R rank of the step, T taps.
Channels lie side by side in every tensor over tokens; the first product's input and the steps are
(K, B S, E), one matrix of rows per walk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..selective_scan import passes as scan
from ..selective_scan.launch import Launch, Place, Program
from ..walk_conv import conv

__all__ = ['Backward', 'Forward', 'Sizes', 'sizes_of', 'split', 'states_of']

# Tokens and channels of a tile of the gate's kernels.
_ROWS, _COLS = 16, 64


class Sizes(NamedTuple):
    """Of one kind of call."""

    batch: int
    walks: int
    channels: int
    tokens: int
    steps: int
    state: int
    rank: int
    taps: int

    @property
    def columns(self) -> tuple[int, int, int]:
        """Of what the first projection makes of a token: step, B and C."""
        return self.rank, self.state, self.state


def sizes_of(uz: Tensor, conv_weight: Tensor, w_dt: Tensor, A: Tensor, slots: Tensor) -> Sizes:
    """The sizes of a call."""
    walks, channels, taps = conv_weight.shape
    return Sizes(uz.shape[0], walks, channels, uz.shape[1], slots.shape[1], A.shape[1],
                 w_dt.shape[2], taps)


def split(rows: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, columns, S) views of rows (K, B S, R + 2 N): step, B and C."""
    return _by_image(rows, sizes).split_with_sizes(sizes.columns, 2)


def states_of(x: Tensor, A: Tensor, b: Tensor, slots: Tensor, gradients: bool) -> tuple[int, ...]:
    """Size of the states that a forward pass keeps; x and b are (B, K, E, S) and (B, K, N, S)."""
    return scan.state_shape(x, A, b, slots, gradients, 0)


def _by_image(rows: Tensor, sizes: Sizes) -> Tensor:
    """(B, K, columns, S) as the scan takes it, a view of (K, B S, columns)."""
    return rows.view(sizes.walks, sizes.batch, sizes.steps, -1).permute(1, 0, 3, 2)


class _Pass:
    """What both passes have in common.

    Pieces are made when they are first needed: they look at what the pass makes on its way.
    """

    def __init__(self, tensors, factor: float | None):
        uz, conv_weight, _, _, w_dt, _, A, _, slots = tensors[:9]
        self.sizes = sizes = sizes_of(uz, conv_weight, w_dt, A, slots)
        self.factor = factor
        self.columns = sizes.columns
        self.rows = sizes.walks, sizes.batch * sizes.steps, sizes.channels
        self.offset = sizes.channels * uz.itemsize  # of the gate, in bytes
        self.missing = sizes.steps - sizes.tokens
        self.convolution = self.scan = self.gate = None

    def halves(self, uz: Tensor) -> tuple[Tensor, Tensor]:
        """What is scanned and the gate, (B, E, L) each."""
        u, z = uz.mT.chunk(2, 1)
        return u, z

    def gate_of_walks(self, uz: Tensor) -> Tensor:
        """(B, S, E): places that are no token have a gate, too, of zero."""
        z = uz[..., self.sizes.channels :]
        return F.pad(z, (0, 0, 0, self.missing)) if self.missing else z

    def spread(self, z: Tensor) -> Tensor:
        """(B, S, E) as (B, K, E, S)."""
        return z.mT.unsqueeze(1).expand(-1, self.sizes.walks, -1, -1)

    def gate_program(self, name: str, places: dict[str, Place]) -> Program:
        from . import triton_kernels as kernels

        sizes = self.sizes
        tokens, blocks = sizes.batch * sizes.tokens, -(-sizes.channels // _COLS)
        constants = dict(
            tokens=tokens, channels=sizes.channels, blocks=blocks, z_sl=2 * sizes.channels,
            FACTOR=self.factor, WALKS=sizes.walks, ROWS=_ROWS, COLS=_COLS, num_warps=4,
        )
        return Program(kernels, [Launch(name, (-(-tokens // _ROWS) * blocks,), places, constants)])


class Forward(_Pass):
    """One kind of forward pass.

    Its tensors are uz, conv_weight, conv_bias, w_x, w_dt, dt_bias, A, D, slots and steps.
    """

    def __init__(self, tensors, factor: float | None, gradients: bool):
        super().__init__(tensors, factor)
        read = (0, 5, 6, 7)
        assert all(tensors[i].is_contiguous() for i in read), 'kernels read uz, dt_bias, A and D'
        self.gradients = gradients

    def run(self, tensors, pointers) -> tuple[Tensor | None, ...]:
        """The output; x and delta (K, B S, E), rows (K, B S, R + 2 N) and the scan's states, flat;
        and the scan's result where it is not the output, (B, S, K, E)."""
        uz, conv_weight, conv_bias, w_x, w_dt, dt_bias, A, D, slots, _ = tensors
        p_uz, p_weight, p_bias, _, _, p_step, p_A, p_D, p_slots, _ = pointers
        if self.convolution is None:
            u, _ = self.halves(uz)
            self.convolution = conv.Forward((u, conv_weight, conv_bias, slots))
        x = uz.new_empty(self.rows)
        self.convolution.run_into(
            x, (uz, conv_weight, conv_bias, slots), (p_uz, p_weight, p_bias, p_slots)
        )
        rows = torch.bmm(x, w_x.mT)
        step, b, c = rows.split_with_sizes(self.columns, 2)
        delta = torch.bmm(step, w_dt.mT)
        z = None if self.factor else self.gate_of_walks(uz)
        inputs = x, delta, A, b, c, D, z, dt_bias, slots
        addresses = (x.data_ptr(), delta.data_ptr(), p_A, b.data_ptr(), c.data_ptr(), p_D,
                     None if z is None else z.data_ptr(), p_step, p_slots)
        if self.scan is None:
            _, b, c = split(rows, self.sizes)
            self.scan = scan.Forward(
                (_by_image(x, self.sizes), _by_image(delta, self.sizes), A, b, c, D,
                 None if z is None else self.spread(z), dt_bias, slots),
                None, True, False, self.gradients, 0, last=False,
            )
        # Kernels see addresses; that these are not the views they stand for makes no difference.
        y, _, states = self.scan.run(inputs, addresses)
        if z is not None:
            return y, x, delta, rows, states, None
        out = uz.new_empty(uz.shape[0], uz.shape[1], self.sizes.channels)
        if self.gate is None:
            self.gate = self.gate_program(
                'gate_kernel', dict(p_y=Place(0), p_z=Place(1), p_out=Place(2))
            )
        self.gate.run(
            (y, uz[..., self.sizes.channels :], out),
            (y.data_ptr(), p_uz + self.offset, out.data_ptr()),
        )
        return out, x, delta, rows, states, y


class Backward(_Pass):
    """One kind of backward pass.

    Its tensors are those of the forward pass, what that kept, and the gradient of the output.
    """

    def __init__(self, tensors, factor: float | None):
        super().__init__(tensors, factor)

    def run(self, tensors, pointers) -> tuple[Tensor, ...]:
        """Gradients of uz, conv_weight, conv_bias, w_x, w_dt, dt_bias, A and D; views of fewer
        tensors."""
        uz, conv_weight, conv_bias, w_x, w_dt, dt_bias, A, D, slots, steps = tensors[:10]
        x, delta, rows, states, y, dout = tensors[10:]
        p_uz, p_weight, p_bias, _, _, p_step, p_A, p_D, p_slots, p_steps = pointers[:10]
        p_x, p_delta, _, p_states, p_y, p_dout = pointers[10:]
        sizes = self.sizes
        duz = torch.empty_like(uz)
        if self.factor:
            z = p_z = None
            dy = uz.new_empty(sizes.batch, sizes.tokens, sizes.channels)
            if self.gate is None:
                self.gate = self.gate_program('gate_backward_kernel', dict(
                    p_y=Place(0), p_z=Place(1), p_dout=Place(2), p_dy=Place(3), p_dz=Place(4)
                ))
            self.gate.run(
                (y, uz[..., sizes.channels :], dout, dy, duz[..., sizes.channels :]),
                (p_y, p_uz + self.offset, p_dout, dy.data_ptr(), duz.data_ptr() + self.offset),
            )
            p_dy = dy.data_ptr()
        else:
            z = self.gate_of_walks(uz)
            p_z, dy, p_dy = z.data_ptr(), dout, p_dout
        step, b, c = rows.split_with_sizes(self.columns, 2)
        dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
        if self.scan is None:
            self.scan = self._scan(tensors, z, dy, dx, ddelta)
        p_dx, p_ddelta = dx.data_ptr(), ddelta.data_ptr()
        _, _, dA, db, dc, dD, dz, dbias = self.scan.run(
            (x, delta, A, b, c, D, z, dt_bias, slots, dy, None, states),
            (p_x, p_delta, p_A, b.data_ptr(), c.data_ptr(), p_D, p_z, p_step, p_slots, p_dy, None,
             p_states),
            (dx, ddelta, *(None,) * 6),
            (p_dx, p_ddelta, *(None,) * 6),
        )
        dw_dt = torch.bmm(ddelta.mT, step)
        dstep = torch.bmm(ddelta, w_dt).view(sizes.walks, sizes.batch, sizes.steps, sizes.rank)
        drows = torch.cat([dstep, db.permute(1, 0, 3, 2), dc.permute(1, 0, 3, 2)], 3)
        drows = drows.view(rows.shape)
        dw_x = torch.bmm(drows.mT, x)
        dx.baddbmm_(drows, w_x)
        if dz is not None:
            torch.sum(dz[..., : sizes.tokens], 1, out=self.halves(duz)[1])
        if self.convolution is None:
            u, _ = self.halves(uz)
            self.convolution = conv.Backward(
                (_by_image(dx, sizes), u, conv_weight, conv_bias, slots, steps),
                row=2 * sizes.channels,
            )
        sums = self.convolution.run_into(
            duz, (dx, uz, conv_weight, conv_bias, slots, steps),
            (p_dx, p_uz, p_weight, p_bias, p_slots, p_steps),
        )
        taps = sizes.taps
        return duz, sums[:, :taps].mT, sums[:, taps], dw_x, dw_dt, dbias, dA, dD

    def _scan(self, tensors, z, dy, dx, ddelta) -> scan.Backward:
        uz, _, _, _, _, dt_bias, A, D, slots, _, x, delta, rows, states, _, _ = tensors
        sizes = self.sizes
        _, b, c = split(rows, sizes)
        by_image = [_by_image(t, sizes) for t in (x, delta, dx, ddelta)]
        return scan.Backward(
            (*by_image[:2], A, b, c, D, None if z is None else self.spread(z), dt_bias, slots,
             self.spread(dy) if z is None else dy, None, states),
            (*by_image[2:], *(None,) * 6), True, False, True, 0,
        )


def number_of_states(shape: tuple[int, ...]) -> int:
    """Values in the states of this size."""
    return math.prod(shape)
