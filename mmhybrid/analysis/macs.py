"""Counts multiply-accumulates by watching a forward pass over shapes; nothing is computed.

The model and its input live on the meta device, so a segmentor of 780 M parameters at 512 x 2048
takes a second and no memory. Every operator that multiplies is seen where PyTorch dispatches it,
also behind ``torch.nn.functional`` and inside modules of other packages.

Rules, in multiply-accumulates (MACs; papers call these FLOPs):

=========  =========================================================================================
conv       outputs x inputs per group x kernel; transposed: of the input positions
linear     matrix products of which one side is a parameter, or made of parameters only
attention  all other matrix products: two per attention, 2 B heads N^2 d
scan       9 B D L N + B D L for the skip D u + B D L for a gate, L the places of the scanned
           sequence with its padding (the convention of "Mamba" (2023) repositories)
norm       LayerNorm and GroupNorm 5 per element (4 without affine parameters), RMSNorm 4,
           BatchNorm in eval mode 2 (1), as fvcore and mmengine count
resize     bilinear 4 per output, bicubic 16, nearest 1, average pooling 1 per input
=========  =========================================================================================

Activations, softmax, sums, gathers and RoIAlign count as nothing, biases neither.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['KINDS', 'Record', 'Scan', 'count_macs', 'scan_macs']

KINDS = ('conv', 'linear', 'attention', 'scan', 'norm', 'resize')


@dataclass(frozen=True)
class Scan:
    """Sizes of one scan.

    Attributes:
        elements: B D L, summed over directions.
        states: N.
        skip: whether D u is added.
        gate: whether the scan itself multiplies with a gate.
    """

    elements: int
    states: int
    skip: bool
    gate: bool


@dataclass(frozen=True)
class Record:
    """What one operator costs.

    Attributes:
        module: name of the module that owns the weight, else of the innermost running one.
        kind: one of ``KINDS``.
        macs: multiply-accumulates.
        scan: sizes, for a scan.
    """

    module: str
    kind: str
    macs: int
    scan: Scan | None = None


def scan_macs(scan: Scan, per_state: int = 9, per_element: int | None = None) -> int:
    """Cost of a scan: ``per_state`` B D L N, and B D L for each of the skip and the gate."""
    if per_element is None:
        per_element = scan.skip + scan.gate
    return scan.elements * (per_state * scan.states + per_element)


def count_macs(model: nn.Module, forward: Callable[[], object]) -> list[Record]:
    """Count what ``forward`` costs.

    Args:
        model: gives names to modules; in eval mode, on the meta device, or on the CPU, where it
            really computes. On a GPU fused mixers run as one operator, which has no rule.
        forward: calls the model, or parts of it.

    Returns:
        Records in the order of the calls.

    Raises:
        NotImplementedError: for an operator of this package that has no rule here.
    """
    counter = _Counter(model)
    with torch.no_grad(), running_modules(model, counter.running), counter, _Whole(counter):
        forward()
    return counter.records


class running_modules:
    """Keeps the names of the running modules, innermost last."""

    def __init__(self, model: nn.Module, running: list[str]):
        self.modules, self.running = dict(model.named_modules()), running

    def __enter__(self):
        for name, module in self.modules.items():
            # hooks would miss what calls ``part.forward(x)``, as mmseg does
            # wraps: the arguments stay visible to those who ask for the signature
            module.forward = functools.wraps(module.forward)(
                functools.partial(self.run, name, module.forward))

    def __exit__(self, *_):
        for module in self.modules.values():
            del module.forward

    def run(self, name: str, forward: Callable, *args, **kwargs):
        self.running.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            self.running.pop()


class _Counter(TorchDispatchMode):
    """Sees every operator below autograd."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.records: list[Record] = []
        self.running: list[str] = ['']
        self.paused = False
        # storage -> names of the modules whose parameters it is made of
        self.owners: dict[int, frozenset[str]] = {}
        self.kept: list[Tensor] = []  # a freed storage would lend its number to another
        for module_name, module in model.named_modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in tensors:
                self.owners.setdefault(_storage(tensor), frozenset([module_name]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        owners = [self.owners.get(_storage(x)) for x in inputs]
        # an index takes part in neither
        sources = [o for x, o in zip(inputs, owners, strict=True) if x.is_floating_point()]
        if sources and None not in sources:
            self.keep(out, frozenset().union(*sources))
        elif not self.paused:
            rule = _rule(func)
            if rule is not None:
                self.add(rule(out, *args, **(kwargs or {})), inputs, owners)
        return out

    def keep(self, out, owners: frozenset[str]) -> None:
        """What is made of parameters alone is a weight too."""
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.kept.append(x)
                self.owners.setdefault(_storage(x), owners)

    def add(self, record: Record, inputs: list[Tensor], owners: list) -> None:
        """Say where the cost arises."""
        weights = [o for x, o in zip(inputs, owners, strict=True) if o and x.dim() > 1]
        kind = record.kind
        if kind == 'attention' and weights:
            kind = 'linear'
        names = weights[0] if weights and kind in ('conv', 'linear') else ()
        module = next(iter(names)) if len(names) == 1 else self.running[-1]
        self.records.append(replace(record, kind=kind, module=module))


class _Whole(TorchFunctionMode):
    """Takes functions as a whole that fall into other operators on some devices."""

    def __init__(self, counter: _Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _WHOLE:
            return func(*args, **kwargs)
        rule, shape = _WHOLE[func]
        if args and args[0].is_meta:  # many small operators would only find out the shape
            out = args[0].new_empty(shape(*args, **kwargs))
        else:
            self.counter.paused = True
            try:
                out = func(*args, **kwargs)
            finally:
                self.counter.paused = False
        self.counter.add(rule(out, *args, **kwargs), [], [])
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


# --- rules: (output, *arguments of the operator) to a record ------------------------------------


def _convolution(out, x, weight, bias, stride, padding, dilation, transposed, *_, **__) -> Record:
    positions = math.prod((x if transposed else out).shape[2:])
    return Record('', 'conv', x.shape[0] * weight.numel() * positions)


def _mm(out, a, b, *_, **__) -> Record:
    return Record('', 'attention', out.numel() * a.shape[-1])


def _addmm(out, bias, a, b, *_, **__) -> Record:
    return Record('', 'attention', out.numel() * a.shape[-1])


def _norm(per_element: int):
    def rule(out, x, weight=None, *_, **__) -> Record:
        # without weights one multiplication less
        return Record('', 'norm', x.numel() * (per_element - (weight is None)))
    return rule


def _group_norm(out, x, weight=None, *_, **__) -> Record:
    return Record('', 'norm', x.numel() * (5 if weight is not None else 4))


def _resize(per_output: int = 0, per_input: int = 0):
    def rule(out, x, *_, **__) -> Record:
        return Record('', 'resize', per_output * out.numel() + per_input * x.numel())
    return rule


def _scan(out, u, delta, A, B, C, D=None, z=None, *_, **__) -> Record:
    # grouped layouts are (B, G, H, L): the product of all axes is B D L all the same
    scan = Scan(delta.numel(), A.shape[-1], D is not None, z is not None)
    return Record('', 'scan', scan_macs(scan), scan)


def _scan_in_order(out, u, delta, weight, A, B, C, D=None, *_, **__) -> Record:
    tokens = u.shape[0] * u.shape[-1]
    scan = Scan(tokens * A.shape[0], A.shape[-1], D is not None, False)
    # The compiled kernel makes the steps itself where it has a weight for that.
    steps = 0 if weight is None else tokens * weight.numel()
    return Record('', 'scan', scan_macs(scan) + steps, scan)


def _attention(out, query, key, value, *_, **__) -> Record:
    macs = query.numel() * key.shape[-2] + out.numel() * key.shape[-2]
    return Record('', 'attention', macs)


def _layer_norm(out, x, shape, weight=None, *_, **__) -> Record:
    return _norm(5)(out, x, weight)


def _rms_norm(out, x, *_, **__) -> Record:
    return Record('', 'norm', 4 * x.numel())


def _same_shape(x, *_, **__):
    return x.shape


def _attended_shape(query, key, value, *_, **__):
    return (*query.shape[:-1], value.shape[-1])


# function -> rule, and shape of the result
_WHOLE = {
    nn.functional.scaled_dot_product_attention: (_attention, _attended_shape),
    nn.functional.layer_norm: (_layer_norm, _same_shape),
    nn.functional.rms_norm: (_rms_norm, _same_shape),
}

_RULES = {
    'aten::convolution': _convolution,
    'aten::mm': _mm,
    'aten::bmm': _mm,
    'aten::addmm': _addmm,
    'aten::baddbmm': _addmm,
    'aten::native_layer_norm': _layer_norm,
    'aten::native_group_norm': _group_norm,
    'aten::native_batch_norm': _norm(2),
    'aten::cudnn_batch_norm': _norm(2),
    'aten::_native_batch_norm_legit_no_training': _norm(2),
    'aten::upsample_nearest2d': _resize(per_output=1),
    'aten::upsample_bilinear2d': _resize(per_output=4),
    'aten::upsample_bicubic2d': _resize(per_output=16),
    'aten::_adaptive_avg_pool2d': _resize(per_input=1),
    'aten::grid_sampler_2d': _resize(per_output=4),
    'mmhybrid::selective_scan_torch': _scan,
    'mmhybrid::selective_scan_cpp': _scan,
    'mmhybrid::selective_scan_cpp_ordered': _scan_in_order,
    'mmhybrid::selective_scan_triton': _scan,
    'mmhybrid::selective_scan_mamba_ssm': _scan,
}


# Operators of ours that multiply nothing.
_FREE = {'mmhybrid::reorder', 'mmhybrid::scan_tables'}


def _rule(func) -> Callable[..., Record] | None:
    name = func._schema.name
    rule = _RULES.get(name)
    if rule is None and name.startswith('mmhybrid::') and name not in _FREE:
        raise NotImplementedError(
            f'the operator {name} has no rule in mmhybrid/analysis/macs.py, so its '
            'multiply-accumulates would be missing; add one to _RULES, or the name to _FREE')
    return rule
