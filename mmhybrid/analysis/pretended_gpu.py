"""A training step as CUDA would run it, in shapes alone: autocast, dispatch and our kernels.

Tensors are PyTorch's fake ones on a pretended ``cuda:0``, so autocast is CUDA's own, modules take
the ways that they take on a GPU, and nothing is computed. Three things need a driver and are
replaced: the launch of a Triton kernel, which is noted instead; the choice of an attention kernel;
and autograd's engine, which asks a device for streams. Nothing that is worked out in here is kept.
"""
from __future__ import annotations

import contextlib
import heapq
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ['MINIMUM_TORCH', 'Watcher', 'backward', 'pretended_gpu']

#: The lowest PyTorch with which this has run; 2.4 ends the process when no driver is there.
MINIMUM_TORCH = (2, 11)
_AT = 1 << 20  # where a tensor of no memory says that it lies


@contextlib.contextmanager
def pretended_gpu(launched: Callable[[str, list[Tensor]], None] | None = None) -> Iterator[None]:
    """Run what is inside on fake tensors, as if a GPU that compiles our kernels were there.

    Args:
        launched: called for each launch of a Triton kernel with its name and its tensors.

    Raises:
        RuntimeError: the installed Triton or PyTorch is too old for it.
    """
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < MINIMUM_TORCH:
        wanted = '.'.join(map(str, MINIMUM_TORCH))
        raise RuntimeError(
            f'a pretended GPU needs torch >= {wanted}, and {torch.__version__} is installed; '
            'upgrade PyTorch'
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as patches:
        for patch in (*_of_torch(), *_of_triton(launched), *_of_this_package()):
            patches.enter_context(patch)
        for function in _caches():
            patches.callback(function.cache_clear)
            function.cache_clear()
        with mode, _Attention(), torch.autograd.graph.saved_tensors_hooks(_Saved, _Saved.unpack):
            yield


def _of_torch() -> Iterator[contextlib.AbstractContextManager]:
    """What PyTorch would otherwise ask a driver for."""
    properties = types.SimpleNamespace(multi_processor_count=132, name='pretended GPU',
                                       major=9, minor=0, total_memory=80 << 30)
    answers = dict(
        get_device_properties=properties, get_device_capability=(9, 0), current_device=0,
        is_current_stream_capturing=False, is_bf16_supported=True, _exchange_device=-1,
        _maybe_exchange_device=-1,
    )
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    yield mock.patch('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    # Eager calls of our operators look for a mode that watches, and on a GPU there is none.
    yield mock.patch.object(torch._C, '_len_torch_dispatch_stack', lambda: 0)
    yield mock.patch.object(FakeTensor, 'data_ptr', _address)
    yield mock.patch.object(torch.autograd.function.FunctionCtx, 'set_materialize_grads',
                            _set_materialize_grads)


def _address(x: Tensor) -> int:
    return _AT + x.storage_offset() * x.itemsize if x.numel() else 0


def _set_materialize_grads(ctx, value: bool) -> None:
    ctx.materialize_grads = value  # which cannot be read
    ctx.fills_gradients = value


def _of_triton(launched) -> Iterator[contextlib.AbstractContextManager]:
    from triton.runtime.jit import JITFunction

    def run(kernel, *args, grid, warmup, **arguments):
        if launched is not None:
            tensors = [x for x in (*args, *arguments.values()) if isinstance(x, Tensor)]
            launched(kernel.fn.__name__, tensors)

    yield mock.patch.object(JITFunction, 'run', run)


def _of_this_package() -> Iterator[contextlib.AbstractContextManager]:
    """By name: this file has to count earlier states of the package, too."""
    replaced = dict(
        _unavailable_reason=lambda: None,  # of the kernels of this package
        _problem=lambda: None,  # its name up to commit 03c1dbf
        _traced=lambda device: False,  # tables of scan orders are kept, as on a GPU
        _worth_keeping=lambda table: True,
        _PLAIN=frozenset({Tensor, torch.nn.Parameter, FakeTensor}),
        DIRECT=frozenset(),  # launches go where they are noted
    )
    for module in _modules():
        for name, value in vars(module).items():
            if name in replaced:
                yield mock.patch.object(module, name, replaced[name])
            elif isinstance(value, dict) and not name.startswith('__'):
                yield mock.patch.dict(value)  # a fake table must not outlive this


def _modules() -> list[types.ModuleType]:
    return [module for name, module in [*sys.modules.items()]
            if name.startswith(('mmhybrid.ops', 'mmhybrid.layers'))]


def _caches() -> list:
    return [value for module in _modules() for value in vars(module).values()
            if hasattr(value, 'cache_clear') and value.__module__ == module.__name__
            and value.__name__ in ('processors', '_processors', '_too_old_once')]


class Watcher(TorchDispatchMode):
    """Sees every operator of PyTorch's below autograd, those that ours call among them."""

    def seen(self, func, out, args, kwargs) -> None:
        """Called after each."""
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == 'prim':
            return func(*args, **kwargs)
        if func.namespace == 'mmhybrid' and func.has_kernel_for_dispatch_key(_CUDA):
            with self:  # as on a GPU; tables, which stay, have no kernel for it
                return func._op_dk(_CUDA, *args, **kwargs)
        if _composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.seen(func, out, args, kwargs)
        return out


_CUDA = torch._C.DispatchKey.CUDA


def _composite(func) -> bool:
    """Whether an operator that one of ours calls, below autograd, is made of others everywhere."""
    return func._can_decompose() and not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)


class _Attention(TorchFunctionMode):
    """Chooses the attention kernel that CUDA would, with the casts of autocast before it.

    Flash attention in 16 bits without a mask, else the memory-efficient kernel.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
            enable_gqa=False) -> Tensor:
    if torch.is_autocast_enabled('cuda'):
        half = torch.get_autocast_dtype('cuda')
        q, k, v = (x.to(half) for x in (q, k, v))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(half)
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    with torch.autocast('cuda', enabled=False):
        if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
            if width % 8:
                q, k, v = (torch.nn.functional.pad(x, (0, -width % 8)) for x in (q, k, v))
            out = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, dropout_p, is_causal, scale=scale)[0]
            return out[..., :width] if width % 8 else out
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(
                    ~attn_mask, float('-inf'))
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


# --- backward pass ------------------------------------------------------------------------------


class _Saved:
    """What a node saved, until it has run: an engine that is not PyTorch's cannot let it go."""

    unpacked: list[_Saved] = []

    def __init__(self, x: Tensor):
        self.x = x.detach()

    def unpack(self) -> Tensor:
        self.unpacked.append(self)
        return self.x

    @classmethod
    def release(cls) -> None:
        """Let go what the node that has run asked for."""
        for saved in cls.unpacked:
            saved.x = None
        cls.unpacked.clear()


def backward(loss: Tensor, entered: Callable[[int], None] | None = None) -> None:
    """As ``loss.backward()`` without PyTorch's engine, which needs the streams of a real device.

    Nodes run in the engine's order, and what they saved goes as soon as they have run.

    Args:
        loss: a scalar.
        entered: called with the sequence number of a node before it runs.
    """
    graph = _Graph(loss.grad_fn, torch.ones_like(loss))
    # Checkpoints compute once for all that ask from one graph task.
    with mock.patch.object(torch._C, '_current_graph_task_id', lambda: id(graph)):
        while graph.ready:
            graph.run_next(entered)


class _Graph:
    """What is left of a graph: gradients that wait, and how many more each node waits for."""

    def __init__(self, root, gradient: Tensor):
        self.waiting = _dependencies(root)
        self.nodes = [root, *self.waiting]  # those of Python functions would go with their callers
        self.gradients = {root: [gradient]}
        self.ready: list[tuple] = []
        self.order = itertools.count()
        self.push(root)

    def push(self, node) -> None:
        """The node made last runs first; gradients of parameters at once."""
        first = -(1 << 62) if hasattr(node, 'variable') else -node._sequence_nr()
        heapq.heappush(self.ready, (first, next(self.order), node))

    def run_next(self, entered) -> None:
        node = heapq.heappop(self.ready)[-1]
        if entered is not None:
            entered(node._sequence_nr())
        with torch.no_grad():
            results = _run(node, self.gradients.pop(node))
            _Saved.release()
            for (following, slot), gradient in zip(node.next_functions, results, strict=False):
                if following is not None:
                    self.hand_on(following, slot, gradient)

    def hand_on(self, node, slot: int, gradient: Tensor | None) -> None:
        slots = self.gradients.setdefault(node, [None] * _width(node))
        if gradient is not None:
            gradient = _fitted(gradient, node, slot)
            slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient
        self.waiting[node] -= 1
        if not self.waiting[node]:
            del self.waiting[node]
            self.push(node)


def _dependencies(root) -> dict:
    found, left = {}, [root]
    seen = {root}
    while left:
        for following, _ in left.pop().next_functions:
            if following is None:
                continue
            found[following] = found.get(following, 0) + 1
            if following not in seen:
                seen.add(following)
                left.append(following)
    return found


def _width(node) -> int:
    return 1 if hasattr(node, 'variable') else len(node._input_metadata)


def _run(node, gradients: list) -> Sequence[Tensor | None]:
    if hasattr(node, 'variable'):
        _accumulate(node.variable, gradients[0])
        return ()
    if all(g is None for g in gradients):
        return (None,) * len(node.next_functions)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        if getattr(node, 'fills_gradients', True):
            gradients = [_zeros(about) if g is None else g
                         for g, about in zip(gradients, node._input_metadata, strict=True)]
        results = node.apply(*gradients)
    else:
        results = node(*gradients)
    results = results if isinstance(results, (tuple, list)) else (results,)
    if len(results) > len(node.next_functions):  # Nones for what is not a tensor
        results = _of_tensors(node, results)
    return results


def _of_tensors(node, results):
    """Results for arguments that were tensors: a Python function returns one for each argument."""
    wanted = len(node.next_functions)
    flags = getattr(node, 'needs_input_grad', None)
    assert flags is not None and len(flags) == len(results)
    # next_functions has an entry for each tensor argument, in order; others never need gradients
    kept, spare = [], len(results) - wanted
    for flag, result in zip(flags, results, strict=True):
        if not flag and result is None and spare:
            spare -= 1
            continue
        kept.append(result)
    return kept


def _zeros(about) -> Tensor:
    return torch.zeros(tuple(about.shape), dtype=about.dtype, device=about.device)


def _fitted(gradient: Tensor, node, slot: int) -> Tensor:
    """In the shape and dtype of what it is the gradient of."""
    about = node.variable if hasattr(node, 'variable') else node._input_metadata[slot]
    if gradient.shape != (shape := tuple(about.shape)):
        gradient = gradient.sum_to_size(shape)
    return gradient.to(about.dtype)


def _accumulate(variable: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if variable.grad is not None:
        variable.grad.add_(gradient)
    elif gradient.stride() == variable.stride():
        variable.grad = gradient
    else:
        variable.grad = gradient.clone(memory_format=torch.contiguous_format)
