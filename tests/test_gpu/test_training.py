"""Training on a GPU: mixed precision, compilers, one process of a group, the mini detector.

Without a GPU every test runs its own code on the CPU, small: three steps, float32 where mixed
precision needs an accelerator, gloo for NCCL, a backend of torch.compile that compiles nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('mmcv')

from backbone_cases import CASES, build
from fill import make_input
from interpreter import DEVICE
from torch import nn

from mmhybrid.datasets.mini_coco import write_mini_coco
from mmhybrid.engine.amp import AmpOptimWrapper
from mmhybrid.layers import weight_casts
from mmhybrid.ops.layer_norm import fused as fused_norm

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = DEVICE == 'cuda'
STEPS = 300 if ON_GPU else 3
#: A mask AP that the mini detector must pass in its epochs: low, for it tells training from
#: none; what it reaches on a GPU has not been measured.
AP = 0.05

pytestmark = [pytest.mark.gpu, pytest.mark.plain_empty]

#: Another file shows the same on a CPU, or it takes minutes there.
on_gpu_or_slow = pytest.mark.usefixtures() if ON_GPU else pytest.mark.slow
# One of each class of the registry, in the order of its table.
FAMILIES = list({case.values[0]: case for case in CASES}.values())


def network(cls, arguments):
    """A backbone with a linear read-out of every map, and images with targets to learn."""
    arch = dict(arguments['arch'], **(dict(dim=32) if ON_GPU else {}))
    backbone = build(cls, arguments | dict(arch=arch))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            with torch.no_grad():
                maps = backbone(make_input(0, (1, 3, 64, 64)))
            self.heads = nn.ModuleList(nn.Conv2d(y.shape[1], 4, 1) for y in maps)

        def forward(self, x, target):
            total = 0
            for head, y in zip(self.heads, self.backbone(x), strict=True):
                scores = head(y).float().mean((2, 3))
                total = total + nn.functional.cross_entropy(scores, target)
            return total

    torch.manual_seed(0)
    model = Network().train().to(DEVICE)
    return model, make_input(1, (4, 3, 64, 64)).to(DEVICE), torch.arange(4, device=DEVICE)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_mixed_precision(cls, arguments, dtype):
    """No loss is infinite or not a number, and four images are learned by heart."""
    model, x, target = network(cls, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapper = AmpOptimWrapper(optimizer, dtype=dtype)
    assert wrapper.active == ON_GPU
    losses = []
    for _ in range(STEPS):
        with wrapper.optim_context(model):
            loss = model(x, target)
        wrapper.update_params(loss)
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert losses.isfinite().all(), f'step {int((~losses.isfinite()).nonzero()[0])}: {losses}'
    assert losses[-1] < losses[0] * (0.2 if ON_GPU else 1), losses


@on_gpu_or_slow
@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_fused_norms_and_casts_of_all_weights(cls, arguments, monkeypatch):
    """A step under autocast is that of PyTorch's own norms and casts, to rounding."""
    monkeypatch.setattr(weight_casts, 'KINDS', {DEVICE})
    model, x, target = network(cls, arguments)
    found = []
    for norms, casts in ((0, 0), (0, 1), (1, 1)):
        monkeypatch.setenv(fused_norm.VARIABLE, str(norms))
        monkeypatch.setenv(weight_casts.VARIABLE, str(casts))
        torch.manual_seed(2)
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(x, target)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        found.append((loss.item(), torch.cat(grads)))
    for loss, grads in found[1:]:
        assert abs(loss - found[0][0]) <= 0.02 * abs(found[0][0])
        assert (grads - found[0][1]).norm() <= 0.05 * found[0][1].norm()


@on_gpu_or_slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_adapters(cls, arguments, dtype):
    """Kernels read adapted weights: maps are those of the merged network, and adapters learn."""
    merged = build(cls, arguments).to(DEVICE).eval()
    model = cls(**arguments, lora=dict(rank=2)).to(DEVICE).eval()
    model.load_state_dict(merged.state_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('_lora_B'):
                p.copy_(make_input(len(name), p.shape) * 0.05)
    merged.load_state_dict(model.state_dict())
    x = make_input(0, (2, 3, 64, 48)).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        maps, expected = model(x), merged(x)
    bound = 0.02 if dtype == torch.bfloat16 else 1e-4
    for y, want in zip(maps, expected, strict=True):
        assert float((y.float() - want.float()).norm() / want.float().norm()) < bound
    sum(y.float().square().mean() for y in maps).backward()
    found = {name: p.grad for name, p in model.named_parameters() if '_lora_' in name}
    assert found and all(bool(grad.isfinite().all()) and grad.any() for grad in found.values())
    assert not [name for name, p in model.named_parameters() if p.grad is not None
                and name.endswith('in_proj.weight')]


@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_torch_compile(cls, arguments):
    """A compiled training step gives the maps and gradients of the eager one."""
    model, x, target = network(cls, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='inductor' if ON_GPU else 'eager')
    found = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(x, target)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    torch._dynamo.reset()
    (expected, wanted), (got, grads) = found
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert grads.keys() == wanted.keys()
    for name, want in wanted.items():
        scale = want.abs().max().item() or 1
        assert (grads[name] - want).abs().max().item() <= 2e-2 * scale, name


def test_one_process_of_a_group(tmp_path):
    """NCCL with one process (gloo without a GPU): gradients of a wrapped model are its own."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    cls, arguments = FAMILIES[0].values
    model, x, target = network(cls, arguments)
    model(x, target).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    backend = 'nccl' if ON_GPU else 'gloo'
    distributed.init_process_group(
        backend, init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        wrapped(x, target).backward()
        total = torch.ones(3, device=DEVICE)
        distributed.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
    finally:
        distributed.destroy_process_group()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@on_gpu_or_slow
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'amp'])
def test_mini_detector(tmp_path, amp):
    """The command of the README on the generated data, to its AP on held-out images."""
    pytest.importorskip('mmdet')
    data = tmp_path / 'mini_coco'
    write_mini_coco(data, **({} if ON_GPU else dict(train=4, val=2)))
    short = ['--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.num_workers=0',
             'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0',
             'val_dataloader.persistent_workers=False', 'model.test_cfg.rcnn.score_thr=0.0',
             'model.test_cfg.rcnn.max_per_img=5']
    command = [
        sys.executable, ROOT / 'tools' / 'train.py',
        ROOT / 'configs' / 'cascade_mambavision_mini_coco.py', '--data-root', f'{data}/',
        '--work-dir', tmp_path / 'work', *(['--amp'] if amp else []), *([] if ON_GPU else short),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for path in tmp_path.glob('work/*/vis_data/*.json')
            for line in path.read_text().splitlines() if line.startswith('{')]
    found = [row['coco/segm_mAP'] for row in rows if 'coco/segm_mAP' in row]
    assert found, rows
    assert not ON_GPU or max(found) >= AP, found
