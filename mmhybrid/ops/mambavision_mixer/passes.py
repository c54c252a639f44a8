"""Both passes of the mixer: what a call multiplies, allocates and launches, by its kind.

B batch, L tokens, C channels, E = C / 2, N state, R rank of the step, K taps, M = B L. Everything
lies token-major.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..selective_scan import passes as scan
from ..selective_scan import plan as plans
from ..selective_scan.launch import Launch, Place, Program

__all__ = ['Backward', 'Forward', 'Shape', 'Weights', 'shape_of']

# Tokens of a tile. Sixteen rows by 64 channels give each of 128 threads 16 bytes of bfloat16.
_ROWS = 16
# Tokens between the states that are kept for the backward pass: 32 bytes of float32 states per
# scanned channel (N = 8) every 16 tokens are 1 byte per token and channel of the mixer.
_MIN_CHUNK = 16


class Weights(NamedTuple):
    """Parameters in the order of the operators' schema; projections in the dtype of the tokens."""

    w_in: Tensor  # (C, C)
    w_conv_x: Tensor  # (E, K) or (E, 1, K)
    w_conv_z: Tensor  # like w_conv_x
    w_x: Tensor  # (R + 2 N, E)
    w_dt: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,), float32 when it comes to the kernels
    w_out: Tensor  # (C, C)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, N and R."""
        return *self.A_log.shape, self.w_dt.shape[1]

    @property
    def taps(self) -> int:
        """K."""
        return self.w_conv_x.shape[-1]

    @property
    def read(self) -> tuple[Tensor, ...]:
        """Those that kernels read; the others are factors of matrix products."""
        return self.w_conv_x, self.w_conv_z, self.dt_bias, self.A_log, self.D


class Shape(NamedTuple):
    """B, L and the tokens between kept states (with which of the scan's states those are)."""

    batch: int
    length: int
    chunk: int
    every: int
    n_kept: int


def shape_of(x: Tensor, weights: Weights) -> Shape:
    """The shape of a mixer's training step on x (B, L, C)."""
    batch, length, _ = x.shape
    channels, state, _ = weights.sizes
    processors = scan.processors(x.device)
    plan = plans.launch_plan(batch, 1, channels, length, state, processors, gradients=True)
    if plan.n_chunks == 1:
        return Shape(batch, length, plan.chunk, 1, 0)
    every = max(1, -(-_MIN_CHUNK // plan.chunk))
    kept = -(-plan.n_chunks // every)
    return Shape(batch, length, plan.chunk * every, every, kept if kept > 1 else 0)


def cut(shape: Shape, channels: int, device: torch.device) -> dict[str, int]:
    """How the tokens and channels of a mixer are cut into programs."""
    # Wide enough for full memory transactions, with few idle lanes at the end.
    block = 64 if channels % 64 == 0 or channels % 64 > 32 else 32
    tiles = shape.batch * -(-shape.length // _ROWS) * -(-channels // block)
    # More tiles in turn load the filters once for all of them, and leave fewer partial sums of
    # their gradients; fewer keep every multiprocessor busy.
    steps = max(1, min(4, tiles // (4 * scan.processors(device))))
    return dict(
        length=shape.length,
        n_tiles=-(-shape.length // (_ROWS * steps)),
        steps=steps,
        ROWS=_ROWS,
        BLOCK=block,
    )


def _as_scan(x: Tensor, batch: int) -> Tensor:
    """A view (B, 1, D, L) of tokens (M, D), whatever their row stride."""
    length, row = x.shape[0] // batch, x.stride(0)
    # Exact strides even where an axis has one element: kernels derive addresses from them.
    return x.as_strided(
        (batch, 1, x.shape[1], length), (length * row, length * row, 1, row), x.storage_offset()
    )


class Convolutions:
    """The kernel before the scan, or that of its gradient."""

    def __init__(self, xz: Tensor, weights: Weights, shape: Shape, gate: bool, backward: bool):
        from . import triton_kernels as kernels

        channels, state, _ = weights.sizes
        tiles = cut(shape, channels, xz.device)
        self.programs = shape.batch * tiles['n_tiles']
        self.rows = shape.batch * shape.length, channels
        self.of_state, self.of_channels = (channels, state), (channels,)
        self.shares = self.programs, 2, *weights.w_conv_x.shape
        places = dict(p_xz=Place(4), p_wx=Place(0), p_wz=Place(1))
        constants = dict(
            channels=channels, N=state, K=weights.taps, LEFT=weights.taps // 2, num_warps=4, **tiles
        )
        if backward:
            name = 'prescan_backward_kernel'
            places |= dict(
                p_A=Place(5), p_du=Place(6), p_dyz=Place(7), p_dxz=Place(8), p_dw=Place(9),
                p_dlog=Place(10), p_dbias=Place(11),
            )
        else:
            name = 'prescan_kernel'
            places |= dict(
                p_log=Place(3), p_bias=Place(2), p_u=Place(5), p_yz=Place(8) if gate else None,
                p_A=Place(6), p_step=Place(7),
            )
            constants |= dict(WITH_Z=gate)
        grid = self.programs, -(-channels // tiles['BLOCK'])
        self.program = Program(kernels, [Launch(name, grid, places, constants)])

    def run(self, xz: Tensor, yz: Tensor | None, weights: Weights, pointers):
        """u (M, E), A (E, N) and twice the step's bias, with their addresses.

        Writes the gate half of yz where it is given.
        """
        u = xz.new_empty(self.rows)
        A = xz.new_empty(self.of_state, dtype=torch.float32)
        step_bias = A.new_empty(self.of_channels)
        made = u.data_ptr(), A.data_ptr(), step_bias.data_ptr()
        self.program.run(
            (*weights.read[:4], xz, u, A, step_bias, yz),
            (*pointers[:4], xz.data_ptr(), *made, None if yz is None else yz.data_ptr()),
        )
        return (u, A, step_bias), made

    def run_backward(self, xz, A, du, dyz, dA, dstep, weights, pointers):
        """dxz like xz, and the gradients of both convolutions' weights, (2, *their shape), float32.

        dA and dstep become the gradients of A_log and of the step's bias.
        """
        dxz = torch.empty_like(xz)
        parts = A.new_empty(self.shares)
        tensors = (xz, A, du, dyz, dxz, parts, dA, dstep)
        self.program.run(
            (*weights.read[:4], *tensors), (*pointers[:4], *[x.data_ptr() for x in tensors])
        )
        return dxz, parts.sum(0)


class _Pass:
    """What both passes have in common: sizes, and the pieces that are made when first needed.

    A piece needs tensors that the pass makes on its way, for their strides and their device.
    """

    def __init__(self, x: Tensor, weights: Weights, lean: bool):
        self.shape = shape_of(x, weights)
        self.lean = lean
        channels, state, rank = weights.sizes
        self.channels, self.width = channels, 2 * channels
        self.columns = rank, state, state
        self.convolutions = self.scan = None

    def views(self, u, delta, A, B, C, D, step_bias):
        """The scan's inputs in its own form, of what the projections made."""
        u, delta, B, C = (_as_scan(x, self.shape.batch) for x in (u, delta, B, C))
        return u, delta, A, B, C, D, None, step_bias, None

    def halves(self, x: Tensor) -> Tensor:
        """The left half of the channels of (..., C) in the form of the scan."""
        return _as_scan(x.view(-1, self.width)[:, : self.channels], self.shape.batch)


class Forward(_Pass):
    """One kind of forward pass."""

    def run(self, x: Tensor, weights: Weights, pointers) -> tuple[Tensor, ...]:
        """The output, and what the backward pass needs beside x: yz, xz, x_dbl and states.

        Args:
            x: (B, L, C), contiguous.
            weights: those that kernels read contiguous, D in float32.
            pointers: addresses of ``weights.read``.

        Returns:
            out, yz and xz (B, L, C), x_dbl (M, R + 2 N) and the kept states, of any shape; the last
            three are None for a lean pass.
        """
        xz = linear(x, weights.w_in)
        yz = torch.empty_like(xz)
        if self.convolutions is None:
            self.convolutions = Convolutions(xz, weights, self.shape, True, False)
        (u, A, step_bias), (p_u, p_A, p_step) = self.convolutions.run(xz, yz, weights, pointers)
        x_dbl = linear(u, weights.w_x)
        step, B, C = x_dbl.split_with_sizes(self.columns, 1)
        delta = linear(step, weights.w_dt)
        D = weights.D
        if self.scan is None:
            # Without states to keep, the chunks are those of a forward pass alone.
            self.scan = scan.Forward(
                self.views(u, delta, A, B, C, D, step_bias), self.halves(yz), True, False,
                not self.lean, 0, last=False,
            )
        # Kernels see addresses; that these are not the views they stand for makes no difference.
        states = self.scan.run(
            (u, delta, A, B, C, D, None, step_bias, None),
            (p_u, delta.data_ptr(), p_A, B.data_ptr(), C.data_ptr(), pointers[4], None, p_step,
             None),
            yz,
        )[2]
        out = linear(yz, weights.w_out)
        if self.lean:
            return out, yz, None, None, None
        return out, yz, xz, x_dbl, self._kept(states)

    def _kept(self, states: Tensor) -> Tensor:
        every, n_kept = self.shape.every, self.shape.n_kept
        if every == 1:
            return states
        shape = self.scan.shape.states
        states = states[: torch.Size(shape).numel()].view(shape)
        return states[:, ::every][:, :n_kept].contiguous()


class Backward(_Pass):
    """One kind of backward pass."""

    def __init__(self, x: Tensor, weights: Weights, kept: tuple[Tensor | None, ...], lean: bool):
        super().__init__(x, weights, lean)
        self.starts = self.convolutions_backward = None
        # What was saved comes back as it was, unless somebody's hook keeps it in a form of its own.
        self.turned = not all(t is None or t.is_contiguous() for t in (*weights.read, *kept))

    def run(self, dout, x, yz, xz, x_dbl, states, weights: Weights, pointers) -> tuple[Tensor, ...]:
        """Gradients of x and of the weights, those of both convolutions stacked.

        Args:
            dout: (B, L, C), any strides.
            x: as in the forward pass.
            yz: what the forward pass made.
            xz: the same, None for a lean pass, as are the next two.
            x_dbl: the same.
            states: the same.
            weights: as in the forward pass.
            pointers: addresses of ``weights.read``.

        Returns:
            dx, dw_in, dw_conv (2, E, K), dw_x, dw_dt, dbias, dlog, dD, dw_out; those of the
            parameters that kernels read are float32.
        """
        x_rows, yz_rows = x.reshape(-1, self.width), yz.reshape(-1, self.width)
        dout = dout.reshape(-1, self.width)
        if self.turned:
            weights = Weights(*(w.contiguous() for w in weights))
            xz, x_dbl, states = (t if t is None else t.contiguous() for t in (xz, x_dbl, states))
            pointers = [w.data_ptr() for w in weights.read]
        if self.lean:
            xz = linear(x, weights.w_in)
        if self.convolutions is None:
            self.convolutions = Convolutions(xz, weights, self.shape, False, False)
        (u, A, step_bias), (p_u, p_A, p_step) = self.convolutions.run(xz, None, weights, pointers)
        if self.lean:
            x_dbl = linear(u, weights.w_x)
        step, B, C = x_dbl.split_with_sizes(self.columns, 1)
        delta = linear(step, weights.w_dt)
        inputs = (u, delta, A, B, C, weights.D, None, step_bias, None)
        addresses = (p_u, delta.data_ptr(), p_A, B.data_ptr(), C.data_ptr(), pointers[4], None,
                     p_step, None)
        if self.lean:
            states = self._states(inputs, addresses)

        dyz = dout @ weights.w_out
        dw_out = dout.t() @ yz_rows
        dx_dbl = torch.empty_like(x_dbl)
        dstep, dB, dC = dx_dbl.split_with_sizes(self.columns, 1)
        du, ddelta = torch.empty_like(u), torch.empty_like(u)
        dA = torch.empty_like(A)
        dD, dbias = torch.empty_like(step_bias), torch.empty_like(step_bias)
        given = (du, ddelta, dA, dB, dC, dD, None, dbias)
        if self.scan is None:
            self.scan = self._scan(inputs, dyz, states, given)
        self.scan.run(
            (*inputs, dyz, None, states),
            (*addresses, dyz.data_ptr(), None, states.data_ptr()),
            given,
            [None if x is None else x.data_ptr() for x in given],
        )
        dw_dt = ddelta.t() @ step
        torch.mm(ddelta, weights.w_dt, out=dstep)
        dw_x = dx_dbl.t() @ u
        du.addmm_(dx_dbl, weights.w_x)
        if self.convolutions_backward is None:
            self.convolutions_backward = Convolutions(xz, weights, self.shape, True, True)
        dxz, dw_conv = self.convolutions_backward.run_backward(
            xz, A, du, dyz, dA, dbias, weights, pointers
        )
        dxz = dxz.view(-1, self.width)
        dw_in = dxz.t() @ x_rows
        dx = (dxz @ weights.w_in).view(x.shape)
        return dx, dw_in, dw_conv, dw_x, dw_dt, dbias, dA, dD, dw_out

    def _states(self, inputs, addresses) -> Tensor:
        """States at the starts of the chunks, without an output."""
        u, delta, A, B, C, D, _, step_bias, _ = inputs
        if self.starts is None:
            views = self.views(u, delta, A, B, C, D, step_bias)
            self.starts = scan.Forward(
                views, views[0], True, False, True, self.shape.chunk, last=False, starts=True
            )
        return self.starts.run(inputs, addresses, u)[2]

    def _scan(self, inputs, dyz, states, given) -> scan.Backward:
        u, delta, A, B, C, D, _, step_bias, _ = inputs
        du, ddelta, dA, dB, dC, dD, _, dbias = given
        du, ddelta, dB, dC = (_as_scan(x, self.shape.batch) for x in (du, ddelta, dB, dC))
        return scan.Backward(
            (*self.views(u, delta, A, B, C, D, step_bias), self.halves(dyz), None, states),
            (du, ddelta, dA, dB, dC, dD, None, dbias), True, False, True, self.shape.chunk,
        )
