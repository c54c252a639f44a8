"""Stand in for ``mmcv._ext`` with torchvision's operators where mmcv came without compiled ones.

A plain install of the maintained mmcv fork, or of ``mmcv-lite``, has no ``mmcv._ext``, and then
``mmdet.models`` cannot be imported at all. :func:`install` appends a finder to ``sys.meta_path``.
It stands last, so a compiled module always wins and is never touched. The stand-in computes what
Mask R-CNN, Cascade Mask R-CNN and UperNet need in training and testing, on any device that
torchvision has kernels for: ``nms``, ``roi_align_forward`` and ``roi_align_backward``; and what
RetinaNet, DINO and Mask2Former call on a GPU, in plain PyTorch (:mod:`mmhybrid.torch_ops`): the
sigmoid focal loss and deformable attention. Every other operator is a callable that explains itself
when it is called, because ``mmcv.ops`` insists at its import that all are there.

The stand-in does not pretend: ``mmcv._ext.IS_STAND_IN`` is true (a compiled module has no such
name), it has no ``__file__``, and ``__all__`` and ``dir()`` name only what it computes.

The operator signatures are those that ``mmcv.ops`` (2.1 to 2.3) calls; values follow torchvision,
whose kernels compute the same functions (RoIAlign: Mask R-CNN, arXiv:1703.06870, section 3). On a
CPU, where torchvision's RoIAlign takes a quarter of a training step of a small detector, many RoIs
are pooled by :mod:`mmhybrid.roi_align` instead.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys

EXT_NAME = 'mmcv._ext'
_MMCV_DISTRIBUTIONS = ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full')
_AVERAGE_POOLING = 1  # mmcv.ops.roi_align passes 0 for 'max' and 1 for 'avg'
_logged = False


class CompiledOpMissing(NotImplementedError):
    """An operator was called that exists only in the compiled mmcv."""


class TorchvisionMissing(ImportError):
    """The stand-in was called, and torchvision, which computes for it, cannot be imported."""


# ---------------------------------------------------------------- what the errors say
def installed_mmcv():
    """Return ``(distribution name, version)`` of the installed mmcv, or ``None``."""
    for name in _MMCV_DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def compile_command():
    """Return the shell command that replaces the installed mmcv by one with compiled operators.

    Compiling for the CPU takes some 45 minutes of processor time over all cores, and needs a
    C++ compiler (and nvcc for the CUDA operators).
    """
    # mmcv's setup.py builds the operators exactly when it can import torch: hence no build
    # isolation. Newer setuptools lacks pkg_resources, older cannot read the fork's metadata.
    name, version = installed_mmcv() or ('onedl-mmcv', None)
    target = 'onedl-mmcv' if name.startswith('onedl') else 'mmcv'
    pin = f'=={version}' if version else ''
    commands = ["pip install 'setuptools>=80,<82' wheel ninja psutil"]
    if name not in (target, 'mmcv'):  # mmcv-lite and mmcv own the same files
        commands.append(f'pip uninstall -y {name}')
    commands.append(
        'pip install --no-build-isolation --no-deps --force-reinstall '
        f'--no-cache-dir --no-binary {target} {target}{pin}'
    )
    return ' && '.join(commands)


@functools.cache  # the same object every time, as pickle and `is` expect
def _missing_op(name):
    def op(*args, **kwargs):
        raise CompiledOpMissing(
            f"mmcv's operator '{name}' was called, which exists only in compiled mmcv, and this "
            f"mmcv is not compiled: mmhybrid's torchvision stand-in for it computes "
            f"{', '.join(sorted(_OPS))} alone; take a model that does without '{name}', or compile "
            'mmcv (some 45 minutes of processor time, needs a C++ compiler; `mmhybrid doctor` '
            f'tells what is installed): {compile_command()}'
        )

    op.__name__ = op.__qualname__ = name
    op.__module__ = EXT_NAME
    op.__doc__ = 'Raises CompiledOpMissing: this operator exists only in compiled mmcv.'
    return op


# ---------------------------------------------------------------- operators
def _torchvision_ops(op_name):
    import torch

    try:
        import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # A torchvision built for another torch fails with any of these four.
        raise TorchvisionMissing(
            f"mmcv has no compiled operators here, so '{op_name}' runs on torchvision, and "
            f"torchvision cannot be imported ({type(error).__name__}: {error}). Install the "
            f"torchvision release that belongs to torch {torch.__version__}, for example "
            "torch==2.11.0 with torchvision==0.26.0, or torch==2.4.1 with torchvision==0.19.1."
        ) from error
    return torch.ops.torchvision


def _working_dtype(tensor):
    # torchvision has no bfloat16 kernels and no float16 ones on CPU, and its CUDA backward adds
    # half-precision gradients atomically, which loses small ones. Work in float32 instead.
    import torch

    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nms(boxes, scores, iou_threshold, offset):
    """Greedy non-maximum suppression.

    Args:
        boxes (Tensor): (N, 4) corners x1, y1, x2, y2 in pixels, any floating dtype.
        scores (Tensor): (N,).
        iou_threshold (float): a box is dropped when its IoU with a kept one is greater.
        offset (int): 0 or 1, added to each width and height (1: corners are pixel indices).

    Returns:
        Tensor: (K,) int64 indices of the kept boxes, by descending score.
    """
    ops = _torchvision_ops('nms')
    boxes = boxes.to(_working_dtype(boxes))
    if offset:
        # x2 - x1 + 1 everywhere is the plain IoU of boxes whose far corner moved by one.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return ops.nms(boxes, scores.to(boxes.dtype), float(iou_threshold))


def _refuse_max_pooling(pool_mode):
    if pool_mode != _AVERAGE_POOLING:
        raise CompiledOpMissing(
            "RoIAlign was asked for with pool_mode='max', and mmhybrid's torchvision fallback has "
            "pool_mode='avg' only (what Mask R-CNN and Cascade Mask R-CNN use). Set "
            f"pool_mode='avg', or compile mmcv: {compile_command()}"
        )


def _roi_align_ops(op_name, maps, rois, size):
    """RoIAlign and its gradient, from whom they are fastest."""
    import torch

    from . import roi_align

    ops = _torchvision_ops(op_name)
    # Subclasses of tensors may have no values to look at, such as those that predict memory.
    plain = type(maps) in (torch.Tensor, torch.nn.Parameter) and maps.device.type == 'cpu'
    if plain and roi_align.pays(maps.shape, len(rois), size):
        return roi_align.roi_align, roi_align.roi_align_gradient
    return (
        lambda maps, rois, size, *rest: ops.roi_align(maps, rois, rest[0], *size, *rest[1:]),
        lambda grad, rois, shape, *rest: ops._roi_align_backward(
            grad, rois, rest[0], *grad.shape[2:], *shape, *rest[1:]
        ),
    )


def roi_align_forward(
    input, rois, output, argmax_y, argmax_x,
    aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned,
):
    """RoIAlign with average pooling, written into ``output``.

    Args:
        input (Tensor): (N, C, H, W).
        rois (Tensor): (R, 5) image index, x1, y1, x2, y2 in the pixels of the input image.
        output (Tensor): (R, C, aligned_height, aligned_width), overwritten.
        argmax_y, argmax_x (Tensor): used by max pooling only, left alone.
        aligned_height, aligned_width (int): bins per RoI.
        spatial_scale (float): feature pixels per image pixel.
        sampling_ratio (int): samples per bin and axis; 0 chooses ceil(RoI size / bins).
        pool_mode (int): 1 (average); 0 (maximum) raises :class:`CompiledOpMissing`.
        aligned (bool): shift by half a pixel, and do not force RoIs to be one pixel large.
    """
    _refuse_max_pooling(pool_mode)
    size = aligned_height, aligned_width
    align, _ = _roi_align_ops('roi_align_forward', input, rois, size)
    dtype = _working_dtype(input)
    output.copy_(
        align(
            input.to(dtype), rois.to(dtype), size, float(spatial_scale),
            max(int(sampling_ratio), 0), bool(aligned),
        )
    )


def roi_align_backward(
    grad_output, rois, argmax_y, argmax_x, grad_input,
    aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned,
):
    """Gradient of :func:`roi_align_forward` with respect to its input, written to ``grad_input``.

    Args:
        grad_output (Tensor): (R, C, aligned_height, aligned_width).
        grad_input (Tensor): (N, C, H, W), overwritten.

    The other arguments are those of the forward call.
    """
    _refuse_max_pooling(pool_mode)
    size = aligned_height, aligned_width
    _, align_gradient = _roi_align_ops('roi_align_backward', grad_input, rois, size)
    dtype = _working_dtype(grad_output)
    grad_input.copy_(
        align_gradient(
            grad_output.to(dtype), rois.to(dtype), grad_input.shape, float(spatial_scale),
            max(int(sampling_ratio), 0), bool(aligned),
        )
    )


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    """Sigmoid focal loss, written into ``output``.

    Args:
        input (Tensor): (N, C) logits.
        target (Tensor): (N,) int64 classes; C is the background.
        weight (Tensor): empty; weights of classes raise :class:`CompiledOpMissing`.
        output (Tensor): (N, C), overwritten.
        gamma, alpha (float): of the loss.
    """
    from .torch_ops import focal_loss

    _refuse_class_weights(weight)
    dtype = _working_dtype(input)
    output.copy_(focal_loss(input.to(dtype), target, gamma, alpha))


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    """Derivative of :func:`sigmoid_focal_loss_forward`, written into ``grad_input`` (N, C)."""
    from .torch_ops import focal_gradient

    _refuse_class_weights(weight)
    dtype = _working_dtype(input)
    grad_input.copy_(focal_gradient(input.to(dtype), target, gamma, alpha))


def _refuse_class_weights(weight):
    if weight.numel():
        raise CompiledOpMissing(
            "The focal loss was asked for with a weight for each class, which mmhybrid's stand-in "
            f'does not have. Leave the weights out, or compile mmcv: {compile_command()}'
        )


def ms_deform_attn_forward(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step
):
    """Deformable attention; see :func:`mmhybrid.torch_ops.deformable_attention`.

    Args:
        level_start_index, im2col_step: used by the compiled operator only.

    Returns:
        Tensor: (B, Q, H * D).
    """
    from .torch_ops import deformable_attention

    return deformable_attention(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, grad_output,
    grad_value, grad_sampling_loc, grad_attn_weight, im2col_step,
):
    """Gradients of :func:`ms_deform_attn_forward`, written into the three ``grad_`` tensors."""
    import torch

    from .torch_ops import deformable_attention

    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (
            value, sampling_locations, attention_weights)]
        output = deformable_attention(inputs[0], spatial_shapes, *inputs[1:])
    found = torch.autograd.grad(output, inputs, grad_output)
    targets = grad_value, grad_sampling_loc, grad_attn_weight
    for target, gradient in zip(targets, found, strict=True):
        target.copy_(gradient)


def get_compiler_version():
    """What mmcv's own function is asked for in reports; there was no compiler."""
    return "none (mmcv is not compiled; mmhybrid's torchvision stand-in)"


def get_compiling_cuda_version():
    """What an mmcv that was compiled without CUDA answers, too."""
    return 'not available'


_OPS = {
    'nms': nms,
    'roi_align_forward': roi_align_forward,
    'roi_align_backward': roi_align_backward,
    'sigmoid_focal_loss_forward': sigmoid_focal_loss_forward,
    'sigmoid_focal_loss_backward': sigmoid_focal_loss_backward,
    'ms_deform_attn_forward': ms_deform_attn_forward,
    'ms_deform_attn_backward': ms_deform_attn_backward,
}
# mmdet's and mmseg's environment reports call these two.
_INFO = {
    'get_compiler_version': get_compiler_version,
    'get_compiling_cuda_version': get_compiling_cuda_version,
}


# ---------------------------------------------------------------- import machinery
class _FallbackLoader(importlib.abc.Loader):
    def create_module(self, spec):
        return None  # the default module, with spec.loader and __spec__ set for us

    def exec_module(self, module):
        module.__doc__ = (
            'Not the compiled module of mmcv: operators computed by torchvision, made by '
            'mmhybrid.mmcv_ops.'
        )
        module.__dict__.update(_OPS, **_INFO, IS_STAND_IN=True)
        module.__all__ = ['IS_STAND_IN', *_OPS, *_INFO]

        def __getattr__(name):  # noqa: N807  PEP 562
            # Operators are in lower case; inspect, copy and the import system probe for others.
            if name.startswith('_') or name != name.lower():
                raise AttributeError(f"module {EXT_NAME!r}, mmhybrid's stand-in, has no {name!r}")
            return _missing_op(name)

        module.__getattr__ = __getattr__
        module.__dir__ = lambda: sorted({*module.__dict__} - {'__dir__', '__getattr__'})


class _FallbackFinder(importlib.abc.MetaPathFinder):
    is_mmcv_stand_in = True  # this class has another identity after a reload of its module

    def find_spec(self, fullname, path=None, target=None):
        if fullname != EXT_NAME:
            return None
        return importlib.machinery.ModuleSpec(EXT_NAME, _FallbackLoader(), origin=__name__)


def _mmcv_search_path():
    """Where submodules of mmcv are looked for, without importing mmcv; None when it is absent."""
    if 'mmcv' in sys.modules:
        return getattr(sys.modules['mmcv'], '__path__', None)
    spec = importlib.util.find_spec('mmcv')
    return None if spec is None else spec.submodule_search_locations


def implementation():
    """Say which operators ``mmcv.ops`` uses, or will use once :func:`install` has run.

    Returns:
        str: 'compiled', 'torchvision', or 'absent' when there is no mmcv.
    """
    path = _mmcv_search_path()
    if path is None:
        return 'absent'
    loaded = sys.modules.get(EXT_NAME)
    if loaded is not None:
        return 'torchvision' if getattr(loaded, 'IS_STAND_IN', False) else 'compiled'
    for finder in sys.meta_path:
        if _is_ours(finder) or not hasattr(finder, 'find_spec'):
            continue
        if finder.find_spec(EXT_NAME, path) is not None:
            return 'compiled'
    return 'torchvision'


def _is_ours(finder):
    return getattr(finder, 'is_mmcv_stand_in', False)


def is_installed():
    """Whether :func:`install` has run."""
    return any(map(_is_ours, sys.meta_path))


def install():
    """Make ``mmcv._ext`` importable; safe to call again. One log line says what is in use.

    Returns:
        str: as :func:`implementation`.
    """
    if not is_installed():
        sys.meta_path.append(_FallbackFinder())
    found = implementation()
    _log_once(found)
    return found


def _log_once(found):
    global _logged
    if _logged or found == 'absent' or os.environ.get('RANK', '0') != '0':
        return
    _logged = True
    message = {
        'compiled': 'mmcv operators: compiled (mmcv._ext).',
        'torchvision': "mmcv operators: torchvision stands in for the missing mmcv._ext "
        f"({', '.join(sorted(_OPS))}); any other operator needs compiled mmcv.",
    }[found]
    from mmengine.logging import print_log

    print_log(message, logger='current')
