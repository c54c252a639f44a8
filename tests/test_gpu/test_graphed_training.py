"""Trainings that replay CUDA graphs of their backbone, against the same trainings without.

Without a GPU a stand-in records and replays, and a training is a few steps long.
"""

import copy

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('mmcv')

from backbone_cases import CASES, build, loss_of
from fill import make_input
from graph_stand_in import Recorder
from interpreter import DEVICE
from mmengine.optim import OptimWrapper

from mmhybrid.engine import use_cuda_graphs
from mmhybrid.engine.amp import AmpOptimWrapper
from mmhybrid.layers import DropPath

ON_GPU = DEVICE == 'cuda'
STEPS = 50 if ON_GPU else 6
SIZES = [(64, 96), (64, 64)]  # each is met often enough to be recorded
FAMILIES = list({case.values[0]: case for case in CASES}.values())
DTYPES = ['float32', 'float16', 'bfloat16'] if ON_GPU else ['float32']

pytestmark = [pytest.mark.gpu, pytest.mark.plain_empty]


def graphed(module):
    return use_cuda_graphs(module, divisor=None, recorder=None if ON_GPU else Recorder())


def losses_of(model, dtype):
    """Losses of a training whose target are the maps of random numbers."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    wrapper = (OptimWrapper(optimizer) if dtype == 'float32' else
               AmpOptimWrapper(optimizer, dtype=dtype))
    losses = []
    for step in range(STEPS):
        x = make_input(step % 4, (2, 3, *SIZES[step % len(SIZES)])).to(DEVICE)
        with wrapper.optim_context(model):
            loss = loss_of(model(x)).float()
        wrapper.update_params(loss)
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_losses_are_those_of_eager_training(cls, arguments, dtype):
    start = build(cls, arguments | dict(drop_path_rate=0.0)).train().to(DEVICE)
    eager = losses_of(copy.deepcopy(start), dtype)
    module = copy.deepcopy(start)
    graphs = graphed(module)
    found = losses_of(module, dtype)
    said = graphs.report()
    graphs.remove()
    assert f'{STEPS - len(SIZES)} of {STEPS} calls replayed' in said, said
    assert eager.isfinite().all()
    if not ON_GPU:
        assert torch.equal(found, eager)
        return
    error = ((found - eager).abs() / eager.abs()).max().item()
    assert error < (1e-3 if dtype == 'float32' else 5e-2), (error, found, eager)


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.drop = torch.nn.Conv2d(3, 4, 4, 4), DropPath(0.5)

    def forward(self, x):
        return (self.drop(self.stem(x).square() + 1),)


def test_every_replay_draws_anew():
    module = Dropping().train().to(DEVICE)
    graphs = graphed(module)
    x = make_input(0, (64, 3, 8, 8)).to(DEVICE)
    kept = []
    for _ in range(6):
        (y,) = module(x)
        y.sum().backward()
        kept.append((y.detach().flatten(1) != 0).any(1).tolist())
    said = graphs.report()
    graphs.remove()
    assert '5 of 6 calls replayed' in said, said
    assert len({tuple(row) for row in kept}) == len(kept)
    assert all(10 < sum(row) < 54 for row in kept)
