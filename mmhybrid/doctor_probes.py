"""What ``mmhybrid doctor`` runs in child processes: each probe tries one thing and returns facts.

The doctor starts this file by path in a fresh interpreter, because a broken package may raise
anything, hang, or take the process down. Every probe prints its result as soon as it has one, so
that a crash hides only itself. Nothing is imported before a probe needs it.
"""

import json
import sys
import tempfile
import time
import traceback

MARK = 'mmhybrid-doctor:'


# ---------------------------------------------------------------- without mm packages
def torch():
    """Version and CUDA build of torch."""
    import torch

    return {'version': torch.__version__, 'cuda': torch.version.cuda, 'hip': torch.version.hip}


def gpu():
    """Names of the accelerators that torch can use, after using one."""
    import torch

    if not torch.cuda.is_available():
        return {'names': []}
    assert float(torch.ones(8, device='cuda').sum()) == 8
    return {'names': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


def torchvision():
    """Version of torchvision; a build for another torch fails when its operators are called."""
    import torch
    import torchvision
    from torchvision.ops import nms

    assert nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]
    return {'version': torchvision.__version__}


def triton():
    """Version of triton."""
    import triton

    return {'version': triton.__version__}


def scan():
    """What each scan backend says, which one 'auto' takes, and scans forward and backward."""
    import torch

    from mmhybrid.ops.selective_scan import available_backends, choose_backend, selective_scan
    from mmhybrid.ops.selective_scan.launch import unknown_launchers, wanted

    backends = {name: list(status) for name, status in available_backends().items()}
    devices = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
    chosen = {}
    for device in devices:
        chosen[device] = choose_backend('auto', device)
        u = torch.randn(1, 4, 32, device=device, requires_grad=True)
        weights = torch.randn(1, 2, 32, device=device)
        decay = -torch.ones(4, 2, device=device)
        found = []
        for _ in range(4):  # a GPU launches the first two otherwise than all that follow
            y = selective_scan(u, torch.ones_like(u), decay, weights, weights, delta_softplus=True)
            found += torch.autograd.grad(y.square().mean(), u)
        assert torch.isfinite(found[0]).all(), f"the scan's gradient on {device} is not finite"
        same = all(torch.allclose(found[0], other) for other in found)
        assert same, f"the scan's gradient on {device} changes; try MMHYBRID_DIRECT_LAUNCH=0"
    unknown = unknown_launchers() if backends['triton'][0] else None
    return {'backends': backends, 'chosen': chosen, 'direct': wanted(), 'unknown': unknown}


# ---------------------------------------------------------------- mm packages
def numpy():
    """Version of numpy."""
    import numpy

    return {'version': numpy.__version__}


def opencv():
    """Version of OpenCV."""
    import cv2

    return {'version': cv2.__version__}


def mmengine():
    """mmengine with everything a training run imports."""
    import mmengine
    import mmengine.optim
    import mmengine.runner

    return {'version': mmengine.__version__}


def checkpoints():
    """Save and load a checkpoint with the kind of objects that training puts into it."""
    import os

    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import _load_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'epoch_1.pth')
        buffer = HistoryBuffer([1.0], [1])
        torch.save({'state_dict': {}, 'message_hub': {'log_scalars': {'loss': buffer}}}, path)
        _load_checkpoint(path, map_location='cpu')
    return {}


def mmcv():
    """mmcv itself, without operators."""
    import mmcv

    return {'version': mmcv.__version__}


def mmhybrid():
    """Our package: it registers its backbone and finds its configs."""
    import os

    from mmengine.registry import MODELS

    import mmhybrid.plugin

    assert MODELS.get('mmhybrid.MambaVision') is not None, 'MambaVision is not registered'
    from mmhybrid.config_scheme import config_dir

    return {
        'version': mmhybrid.__version__,
        'path': os.path.dirname(mmhybrid.__file__),
        'configs': str(config_dir()),
    }


def patches():
    """What our package changes in others, and whether this Python starts with our hook."""
    import mmhybrid.plugin  # noqa: F401  applies them
    from mmhybrid import hook_file
    from mmhybrid.compat import VARIABLE, switched_off
    from mmhybrid.compat.at_import import PATCHES
    from mmhybrid.datasets.loading.pipeline_guard import PATCH

    off = switched_off()
    return {
        'active': [patch.name for patch in PATCHES if patch.is_active()],
        'in_commands': [PATCH.name] if PATCH.name not in off else [],
        'off': sorted(off),
        'variable': VARIABLE,
        'hook': [str(path) for path in hook_file.installed()],
    }


def operators():
    """Which operators mmcv uses, and whether they compute."""
    import torch

    import mmhybrid.mmcv_ops as mmcv_ops

    found = mmcv_ops.implementation()
    facts = {'implementation': found, 'compile_command': mmcv_ops.compile_command()}
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version, nms, roi_align

    facts.update(compiler=get_compiler_version(), cuda=get_compiling_cuda_version())
    devices = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
    for device in devices:
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4.1]], device=device)
        assert nms(boxes, torch.tensor([0.5, 0.9], device=device), 0.5)[1].tolist() == [1]
        features = torch.ones(1, 2, 8, 8, device=device, requires_grad=True)
        rois = torch.tensor([[0.0, 1, 1, 6, 6]], device=device)
        pooled = roi_align(features, rois, (2, 2), 1.0, 0, 'avg', True)
        pooled.sum().backward()
        assert abs(float(pooled.mean()) - 1) < 1e-5 and float(features.grad.sum()) > 0
    return facts


def mmdet():
    """The detectors."""
    import mmdet

    facts = {'version': mmdet.__version__}
    import mmdet.models
    from mmdet.registry import MODELS

    assert MODELS.get('CascadeRCNN') is not None
    return facts


def mmseg():
    """The segmentors."""
    import mmseg

    facts = {'version': mmseg.__version__}
    import mmseg.models
    from mmseg.registry import MODELS

    assert MODELS.get('UPerHead') is not None
    return facts


def pycocotools():
    """What the COCO metric needs."""
    from pycocotools import mask

    assert mask.frPyObjects([[0, 0, 2, 0, 2, 2]], 4, 4)
    return {}


def step():
    """One forward, backward and update of a small backbone on the device that training uses."""
    import torch
    from mmengine.registry import MODELS

    import mmhybrid.plugin  # noqa: F401  registers

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    arch = {'dim': 8, 'stem_width': 8, 'depths': (1, 1, 2, 2), 'num_heads': (1, 1, 2, 2),
            'window_size': (8, 8, 4, 2)}
    model = MODELS.build({'type': 'mmhybrid.MambaVision', 'arch': arch}).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = next(model.parameters()).detach().clone()
    started = time.perf_counter()
    maps = model(torch.randn(2, 3, 64, 64, device=device))
    # Of a normalised map the mean square is constant, so weigh its entries.
    sum((m * torch.randn_like(m)).mean() for m in maps).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters()), 'weights became NaN or Inf'
    assert not torch.equal(before, next(model.parameters())), 'the update changed nothing'
    return {'device': device, 'seconds': time.perf_counter() - started}


# ---------------------------------------------------------------- running them
def _failure(error):
    frames = traceback.extract_tb(error.__traceback__)
    where = f'{frames[-1].filename}:{frames[-1].lineno}' if frames else ''
    text = str(error).strip() or 'no message'
    return {'ok': False, 'error': f'{type(error).__name__}: {text}', 'where': where}


def main(names):
    """Run the named probes and print one marked JSON line for each."""
    for name in names:
        try:
            result = {'ok': True, **globals()[name]()}
        except BaseException as error:  # noqa: B036  a broken package may even call sys.exit
            result = _failure(error)
        sys.stdout.flush()
        sys.stdout.write(f'\n{MARK}{json.dumps([name, result])}\n')
        sys.stdout.flush()
