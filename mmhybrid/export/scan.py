"""The selective scan in standard operators of ONNX.

The tokens are cut into K chunks of T tokens, which advance side by side: one ``Scan`` over T tokens
finds what each chunk leaves when it starts from zero, a second one over the K chunks turns that
into the states before them, and a third one over T tokens starts from these.  All bodies are a few
elementwise operators, every exponent is dt * A <= 0, so nothing grows, however large a step is, and
lengths may be variables.  ``tools/benchmark/onnx_scan.py`` holds this form against others.

Symbols: B batch, D channels, L tokens, N state, G groups, H = D / G.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .nodes import ZERO, call, constant, known, numbers, shape_of, subgraph

__all__ = ['scan', 'steps_for']

#: T of long sequences, and where the length is a variable.
STEPS = 32
#: Values of a state (D * N) that are worth a step of their own, where there are windows besides.
WIDE = 1024


def steps_for(length: int | None, width: int) -> int:
    """T for L tokens of D * N values."""
    if length is not None and length <= (256 if width >= WIDE else 64):
        return length  # one chunk: the first two loops fall away
    return STEPS


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reverse=False,
         steps: int | None = None):
    """Nodes of :func:`mmhybrid.ops.selective_scan.run_backend`; y (B, D, L) in float32."""
    channels, state = (int(side) for side in A.shape)
    groups, length = int(B.shape[1]), known(u.shape[2])
    width = channels // groups
    T = steps or steps_for(length, channels * state)
    many = length is None or length > T

    step = delta
    if delta_bias is not None:
        step = call('Add', step, _column(delta_bias))
    if delta_softplus:
        step = _softplus(step)

    def rows(x, flat: int, *inner: int):
        """(B, ..., L) to (T, K, B, *inner)."""
        x = call('Transpose', _padded(x, length, T), perm=[2, 0, 1])
        x = call('Reshape', x, call('Concat', constant([-1, T]), shape_of(x, 1), axis=0))
        x = call('Transpose', x, perm=[1, 0, 2, 3])
        return call('Reshape', x, constant([0, 0, 0, *inner]))

    # Padded tokens have a step of zero: they keep the state and add nothing to it.
    dts = rows(step, channels, groups, 1, width)
    gains = rows(call('Mul', step, u), channels, groups, 1, width)
    Bs = rows(_flat(B), groups * state, groups, state, 1)
    Cs = rows(_flat(C), groups * state, groups, 1, state)
    A = call('Transpose', call('Reshape', A, constant([groups, width, state])), perm=[0, 2, 1])

    # A is carried, for not every runtime lets a body see what is around it.
    def advanced(node, h, A, dt, gain, b):
        # Computed twice, for large tensors of decays would have to go through memory.
        decay = node('Exp', node('Mul', dt, A))
        return node('Add', node('Mul', decay, h), node('Mul', gain, b))

    def ends(node, h, A, *row):
        return [advanced(node, h, A, *row), node('Identity', A)]

    def outputs(node, h, A, c, *row):
        h = advanced(node, h, A, *row)
        y = node('Mul', c, h) if state == 1 else node('MatMul', c, h)
        return [h, node('Identity', A), node('Squeeze', y, node('Constant', value_ints=[3]))]

    h = call('ConstantOfShape', call('Concat', shape_of(dts, 1, 3), constant(
        [groups, state, width]), axis=0), value=ZERO)
    if many:
        end, _ = _loop(ends, [h, A], [dts, gains, Bs], 0, reverse)
        total = call('Exp', call('Mul', call('ReduceSum', dts, constant([0]), keepdims=0), A))
        first = call('ConstantOfShape', shape_of(end, 1), value=ZERO)
        _, h = _loop(_starts, [first], [total, end], 1, reverse)
    _, _, y = _loop(outputs, [h, A], [Cs, dts, gains, Bs], 1, reverse)  # (T, K, B, G, H)
    y = call('Transpose', call('Reshape', y, constant([0, 0, 0, channels])), perm=[1, 0, 2, 3])
    y = call('Reshape', y, call('Concat', constant([-1]), shape_of(y, 2), axis=0))
    y = call('Transpose', y, perm=[1, 2, 0])
    if length is None or length % T:
        y = call('Slice', y, constant([0]), shape_of(u, 2), constant([2]))
    if D is not None:
        y = call('Add', y, call('Mul', u, _column(D)))
    if z is not None:
        y = call('Mul', y, call('Mul', z, call('Sigmoid', z)))
    return y


def _column(x):
    return call('Unsqueeze', x, constant([1]))


def _softplus(x):
    """max(x, 0) + log1p(exp(-|x|)): onnxruntime's own goes number by number.

    With w = 1 + e as it is rounded, log1p(e) is log(w) e / (w - 1), near its last digit.
    """
    e = call('Exp', call('Neg', call('Abs', x)))
    one, least = (numbers(value, np.float32) for value in (1., 1e-12))
    w = call('Add', e, one)
    share = call('Div', e, call('Max', call('Sub', w, one), least))
    return call('Add', call('Relu', x), call('Mul', call('Log', w), share))


def _flat(x):
    """(B, G, N, L) to (B, G * N, L)."""
    return call('Reshape', x, constant([0, int(x.shape[1]) * int(x.shape[2]), -1]))


def _padded(x, length: int | None, steps: int):
    """(B, C, L) with zeros behind, to a multiple of T."""
    if length is None:
        missing = call('Mod', call('Neg', shape_of(x, 2)), constant([steps]))
        pads = call('Concat', constant([0] * 5), missing, axis=0)
    elif length % steps:
        pads = constant([0] * 5 + [-length % steps])
    else:
        return x
    return call('Pad', x, pads)


def _loop(body, states: Sequence, rows: Sequence, outputs: int, reverse: bool):
    count = len(rows)
    return call('Scan', *states, *rows, num_outputs=len(states) + outputs,
                body=subgraph(body, states, rows), num_scan_inputs=count,
                scan_input_directions=[int(reverse)] * count,
                **(dict(scan_output_directions=[int(reverse)] * outputs) if outputs else {}))


def _starts(node, h, total, end):
    return [node('Add', node('Mul', total, h), end), node('Identity', h)]

