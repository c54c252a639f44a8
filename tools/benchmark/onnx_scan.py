"""Which form of standard operators the selective scan takes in an ONNX file: numbers and time.

    python tools/benchmark/onnx_scan.py [--shape B,L,D,N,G ...] [--runs 5]

Every form is exported with ``torch.onnx.export`` and run by onnxruntime on one thread.

written    what ``mmhybrid export`` writes (mmhybrid/export/scan.py): chunks side by side, ``Scan``
           over their tokens twice, and over the chunks in between
unrolled   the same with every token of a chunk as nodes of its own, and doubling over the chunks
cumsum     chunks of 8 tokens: h = exp(A S) * cumsum(exp(-A S) * dt * B * u) with S = cumsum(dt)
           counted from the chunk's middle, exponents cut off at 80; the chunks one after another
scan       ONNX ``Scan`` over chunks, a chunk of 16 tokens as its body
log        Hillis and Steele over all tokens

Errors are the largest against the reference in float64, over the largest value: with steps as
networks have them, and with steps up to 20 (nothing forbids them).
"""
# ruff: noqa: D101, D102, D103, B023
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mmhybrid.export.tracing import to_onnx
from mmhybrid.ops.selective_scan.export_backend import selective_scan_export
from mmhybrid.ops.selective_scan.reference import selective_scan_reference
from mmhybrid.ops.selective_scan.torch_backend import selective_scan_torch

SHAPES = ((24, 196, 160, 8, 1), (1, 3136, 192, 1, 2), (1, 1024, 384, 16, 1))


def written(u, delta, A, B, C, D, bias):
    return selective_scan_export(u, delta, A, B, C, D, None, bias, True, False)[0]


def unrolled(u, delta, A, B, C, D, bias, T=16):
    dt, A, gain = _laid_out(u, delta, A, B, bias)
    read = C.permute(3, 0, 1, 2).unsqueeze(4)
    dt, gain, read = (
        F.pad(x, ((0, 0) * 4 + (0, -len(x) % T))).unflatten(0, (-1, T)).unbind(1)
        for x in (dt, gain, read))
    decays = [torch.exp(step * A) for step in dt]
    end = gain[0]
    for decay, add in zip(decays[1:], gain[1:], strict=True):
        end = decay * end + add
    total, by, rest = torch.exp(torch.stack(dt).sum(0) * A), 1, (0, 0) * 4
    while by < len(end):
        end = end + total * F.pad(end, (*rest, by, 0))[:len(end)]
        total = total * F.pad(total, (*rest, by, 0))[:len(end)]
        by *= 2
    h, ys = F.pad(end, (*rest, 1, 0))[:len(end)], []
    for decay, add, c in zip(decays, gain, read, strict=True):
        h = decay * h + add
        ys.append((h * c).sum(3))
    y = torch.stack(ys, 1).flatten(0, 1)[:u.shape[2]]
    return y.flatten(2).permute(1, 2, 0) + u * D[:, None]


def _laid_out(u, delta, A, B, bias):
    """Steps, decays' exponents and gains, each (L, batch, G, N, H)."""
    G = B.shape[1]
    dt = F.softplus(delta + bias[:, None])
    A = A.unflatten(0, (G, -1)).mT.contiguous()
    dt, gain = (x.permute(2, 0, 1).unflatten(2, (G, 1, -1)) for x in (dt, dt * u))
    return dt, A, gain * B.permute(3, 0, 1, 2).unsqueeze(4)


def _read(h, C, u, D):
    y = (h * C.permute(3, 0, 1, 2).unsqueeze(4)).sum(3)
    return y.flatten(2).permute(1, 2, 0) + u * D[:, None]


def cumsum(u, delta, A, B, C, D, bias, T=8):
    dt, A, gain = _laid_out(u, delta, A, B, bias)
    dt, gain = (F.pad(x, ((0, 0) * 4 + (0, -len(x) % T))).unflatten(0, (-1, T))
                for x in (dt, gain))
    S = dt.cumsum(1)
    power = ((S - S[:, T // 2:T // 2 + 1]) * A).clamp(-80, 80)
    inside = torch.exp(power) * (torch.exp(-power) * gain).cumsum(1)
    decay = torch.exp(S * A)
    h, states = torch.zeros_like(gain[0, 0]), []
    for k in range(len(dt)):
        states.append(inside[k] + decay[k] * h)
        h = states[-1][-1]
    return _read(torch.cat(states)[:u.shape[2]], C, u, D)


def log(u, delta, A, B, C, D, bias):
    dt, A, h = _laid_out(u, delta, A, B, bias)
    a, by, L = torch.exp(dt * A), 1, len(dt)
    rest = (0, 0) * 4
    while by < L:
        h = h + a * F.pad(h, (*rest, by, 0))[:L]
        a = a * F.pad(a, (*rest, by, 0))[:L]
        by *= 2
    return _read(h, C, u, D)


def scan(u, delta, A, B, C, D, bias, T=16):
    from torch._higher_order_ops.scan import scan as loop

    G, L = B.shape[1], u.shape[2]
    dt = F.softplus(delta + bias[:, None])
    A = A.unflatten(0, (G, -1)).mT.contiguous()

    def rows(x):
        x = F.pad(x, (0, -L % T))
        return x.unflatten(2, (-1, T)).permute(2, 3, 0, 1).contiguous()

    def body(h, parts):
        ys = []
        for dt, gain, b, c in zip(*(p.unbind(0) for p in parts), strict=True):
            decay = torch.exp(dt.unflatten(1, (G, 1, -1)) * A)
            h = decay * h + gain.unflatten(1, (G, 1, -1)) * b.unflatten(1, (G, -1, 1))
            ys.append((h * c.unflatten(1, (G, -1, 1))).sum(2))
        return h.contiguous(), torch.stack(ys)

    parts = [rows(x) for x in (dt, dt * u, B.flatten(1, 2), C.flatten(1, 2))]
    h = u.new_zeros(u.shape[0], G, B.shape[2], u.shape[1] // G)
    _, y = loop(body, h, parts)
    return y.flatten(3).permute(2, 3, 0, 1).flatten(2)[..., :L] + u * D[:, None]


FORMS = (written, unrolled, cumsum, scan, log)


class Form(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, *tensors):
        return self.form(*tensors)


def inputs(shape, hard=False):
    B, L, D, N, G = shape
    torch.manual_seed(0)
    delta = torch.rand(B, D, L) * 20 if hard else torch.randn(B, D, L) - 3
    A = -torch.arange(1., N + 1).repeat(D, 1)
    return (torch.randn(B, D, L), delta, A, torch.randn(B, G, N, L), torch.randn(B, G, N, L),
            torch.randn(D), torch.randn(D) * 0.1)


def session(form, tensors, folder):
    import onnxruntime

    path = Path(folder, f'{form.__name__}.onnx')
    names = ['u', 'delta', 'A', 'B', 'C', 'D', 'bias']
    program = to_onnx(Form(form).eval(), tensors, names, ['y'])
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    started = time.process_time()
    made = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return len(program.model.graph), time.process_time() - started, lambda given: made.run(
        None, {name: x.numpy() for name, x in zip(names, given, strict=True)})[0]


def timed(call, runs):
    call()
    times = []
    for _ in range(runs):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1000 * min(times)


def error(y, tensors):
    u, delta, A, B, C, D, bias = (x.double() for x in tensors)
    right = selective_scan_reference(u, delta, A, B, C, D, None, bias, True, False)[0].numpy()
    return np.abs(y - right).max() / np.abs(right).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', nargs='+', default=[','.join(map(str, s)) for s in SHAPES])
    parser.add_argument('--forms', nargs='+', default=[form.__name__ for form in FORMS])
    parser.add_argument('--runs', type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print('(B, L, D, N, G) | form | nodes | load s | ms | torch backend ms | error | hard steps')
    for text in args.shape:
        shape = tuple(map(int, text.split(',')))
        easy, hard = inputs(shape), inputs(shape, hard=True)
        u, delta, A, B, C, D, bias = easy
        eager = timed(lambda: selective_scan_torch(u, delta, A, B, C, D, None, bias, True, False),
                      args.runs)
        for form in FORMS:
            if form.__name__ not in args.forms:
                continue
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                nodes, load, run = session(form, easy, folder)
                found = timed(lambda: run(easy), args.runs)
                print(f'{shape} | {form.__name__} | {nodes} | {load:.1f} | {found:.1f} | '
                      f'{eager:.1f} | {error(run(easy), easy):.1e} | '
                      f'{error(run(hard), hard):.1e}', flush=True)


if __name__ == '__main__':
    main()
