"""All casts of weights in one call; autocast on a CPU stands in for that on a GPU."""

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter

import pytest
import torch
from graph_stand_in import Recorder
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmhybrid.engine.graphs import use_cuda_graphs
from mmhybrid.layers import SS2D, casts_weights, recomputed, weight_casts
from mmhybrid.models import LocalVim, LocalVMamba, MambaVision, TimmFeatures, Vim, VMamba

CAST = 'aten._to_copy.default'
TOGETHER = 'aten._foreach_copy_.default'
BACKBONES = {
    'mambavision': lambda **k: MambaVision(dict(
        dim=8, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2), window_size=(8, 8, 4, 2),
        layer_scale=0.5), **k),
    'vmamba': lambda **k: VMamba(dict(dim=8, depths=(1, 1, 1, 1)), **k),
    'vmamba_v0': lambda **k: VMamba(dict(
        dim=8, depths=(1, 1, 1, 1), state_dim=2, mlp_ratio=0.0, gate=True, conv_bias=True,
        channel_first=False, stem='v1', downsample='v1', float32_scan=True), **k),
    'localvmamba': lambda **k: LocalVMamba(dict(
        dim=8, depths=(1, 1, 1, 1)), directions=[('h', 'w2')] * 4, **k),
    'vim': lambda **k: Vim(dict(dim=16, depth=4, state_dim=2), out_indices=(0, 1, 2, 3),
                           img_size=32, **k),
    'localvim': lambda **k: LocalVim(dict(
        dim=16, depth=4, state_dim=2), directions=[('h', 'w2')] * 4, out_indices=(0, 1, 2, 3),
        img_size=32, **k),
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(weight_casts, 'KINDS', {'cpu'})


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[str(function)] += 1
        return function(*args, **kwargs or {})


class Net(nn.Module):
    """Layers of several kinds, one of them used twice; a bias that is read by itself, too."""

    reads_itself = ('out.bias',)
    reads_cast = ('matrix',)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.hidden.weight
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.up = nn.ConvTranspose2d(6, 5, 2, bias=False)
        self.out = nn.Linear(5, 4)
        self.unused = nn.Linear(2, 2)
        self.look = self.cp = None

    @casts_weights
    def forward(self, x):
        x = self.norm(self.stem(x)).relu().permute(0, 2, 3, 1)
        x = recomputed(self.hidden, x) if self.cp else self.hidden(x)
        x = self.twin(self.hidden(x)) @ self.matrix
        if self.look is not None:
            self.look()
        x = self.out(self.up(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.out.bias  # not what autocast casts


def images(seed=0, size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def autocast():
    return torch.autocast('cpu', torch.bfloat16)


def step(net, x=None, backward=True):
    """Maps, and gradients by name, of a step from the same random state."""
    torch.manual_seed(1)
    net.zero_grad()
    with autocast(), Calls() as calls:
        maps = net(images() if x is None else x)
    maps = [maps] if isinstance(maps, torch.Tensor) else maps
    if backward:
        with calls:
            sum(y.float().square().mean() for y in maps).backward()
    return [y.detach() for y in maps], {n: p.grad for n, p in net.named_parameters()}, calls.count


def restored(net):
    """Nothing is left of the copies."""
    for m in net.modules():
        assert not set(m.__dict__) & set(m._parameters)
    return True


def same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for name, g in one[1].items():
        h = other[1][name]
        assert (g is None) == (h is None), name
        assert g is None or (g.dtype == h.dtype == torch.float32 and torch.equal(g, h)), name
    return True


def compare(net, monkeypatch, **how):
    """A step with and without the casts of one call; returns how operators were called."""
    other = copy.deepcopy(net)
    monkeypatch.setenv(weight_casts.VARIABLE, '0')
    expected = step(other, **how)
    monkeypatch.delenv(weight_casts.VARIABLE)
    assert not expected[2][TOGETHER]
    found = step(net, **how)
    assert same(found, expected) and restored(net)
    for (name, a), b in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name
    return found[2], expected[2]


# --- the numbers are those of autocast ------------------------------------------------------------


@pytest.mark.parametrize('kind', BACKBONES)
def test_backbones_have_the_bits_of_autocast(kind, monkeypatch):
    torch.manual_seed(0)
    if kind in ('vmamba_v0', 'localvmamba'):
        # their scans in float32 read dt_projs_weight in float32, too, where Triton cannot run
        monkeypatch.setattr(SS2D, 'reads_cast', ('x_proj_weight',))
    # the compiled scan of a CPU reads that weight in float32 always
    net = BACKBONES[kind](scan_backend='torch').train()
    found, expected = compare(net, monkeypatch)
    assert found[TOGETHER] == 2
    # each weight that has a gradient once forward and once backward
    trained = [m for m, n in weight_casts._castable(net) if m._parameters[n].grad is not None]
    # no layer has fallen out because it is another class now
    known = {*weight_casts._castable(net), *weight_casts._kept(net)}
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            assert (m, 'weight') in known, m
    assert expected[CAST] - found[CAST] >= 2 * len(trained)


def test_networks_of_others_are_left_to_autocast():
    pytest.importorskip('timm')
    net = TimmFeatures('convnext_atto', out_indices=(0,))
    seen = []
    net.register_forward_hook(lambda *_: seen.append(True))
    assert step(net)[2][TOGETHER] == 0 and seen == [True]


@pytest.mark.parametrize('options', [dict(with_cp=True), dict(frozen_stages=2), dict(
    out_indices=(0, 1)), dict(frozen_stages=4, with_cp=True)], ids=str)
def test_settings_of_a_backbone(options, monkeypatch):
    torch.manual_seed(0)
    net = BACKBONES['mambavision'](**options).train()
    compare(net, monkeypatch)
    for name, p in net.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_several_kinds_of_layers(monkeypatch):
    found, expected = compare(Net(), monkeypatch)
    assert found[TOGETHER] == 2
    assert {n for _, n in weight_casts._castable(Net())} == {'weight', 'bias', 'matrix'}


def test_recomputed_blocks(monkeypatch):
    net = Net()
    net.cp = True
    compare(net, monkeypatch)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, monkeypatch):
    with mode():
        found, _ = compare(Net().eval(), monkeypatch, backward=False)
    assert found[TOGETHER] == 1


def test_parts_that_are_frozen(monkeypatch):
    net = Net()
    for p in (net.stem.weight, net.hidden.bias, net.out.weight):
        p.requires_grad_(False)
    seen = []
    net.look = lambda: seen.append([net.stem.weight.requires_grad, net.up.weight.requires_grad])
    compare(net, monkeypatch)
    assert seen[-1] == [False, True]
    net.requires_grad_(False)
    compare(net, monkeypatch, backward=False)


def test_groups_of_gradients(monkeypatch):
    monkeypatch.setattr(weight_casts, '_TOGETHER', 100)
    found, _ = compare(Net(), monkeypatch)
    assert found[TOGETHER] == 1 + 5


def test_memory_formats_and_weights_with_holes(monkeypatch):
    net = Net().to(memory_format=torch.channels_last)
    net.hidden.weight = net.twin.weight = nn.Parameter(torch.randn(6, 12)[:, ::2])
    strides = []
    net.look = lambda: strides.append(net.stem.weight.stride())
    compare(net, monkeypatch, x=images().to(memory_format=torch.channels_last))
    assert strides[-1] == net.stem.weight.stride() and not net.stem.weight.is_contiguous()


def test_other_dtypes_are_left_alone(monkeypatch):
    net = Net()
    net.stem.bfloat16()
    compare_dtypes = []
    net.look = lambda: compare_dtypes.append(net.stem.weight is net.stem._parameters['weight'])
    torch.manual_seed(1)
    with autocast():
        net(images())
    assert compare_dtypes == [True]


def test_a_second_derivative():
    net = Net().eval()
    found = []
    for kinds in ({'cpu'}, set()):
        weight_casts.KINDS = kinds
        with autocast():
            y = net(images(size=8)).float()
        w = net.up.weight
        (g,) = torch.autograd.grad(y.pow(3).sum(), w, create_graph=True)
        found += torch.autograd.grad(g.square().sum(), [w, net.stem.weight])
    for a, b in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(a, b)


def test_without_autocast_and_on_other_devices_nothing_happens():
    net, seen = Net(), []
    net.look = lambda: seen.append(net.stem.weight is net.stem._parameters['weight'])
    net(images())
    weight_casts.KINDS = {'cuda'}
    with autocast():
        net(images())
    assert seen == [True, True]


# --- the parameters stay what they are ------------------------------------------------------------


def test_gradients_arrive_once_and_accumulate(monkeypatch):
    net, other, arrived = Net(), None, Counter()
    other = copy.deepcopy(net)
    for name, p in net.named_parameters():
        p.register_hook(lambda g, name=name: arrived.update([name] * (g is not None)))
    for module, wish in ((net, '1'), (other, '0')):
        monkeypatch.setenv(weight_casts.VARIABLE, wish)
        for seed in range(3):
            with autocast():
                y = module(images(seed))
            y.float().square().mean().backward()
    used = [n for n, _ in net.named_parameters() if 'unused' not in n]
    assert arrived == dict.fromkeys(used, 3)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name
        assert p.is_leaf and (p.grad is None or not p.grad.requires_grad)


def test_two_forward_passes_before_one_backward_pass():
    """What the second casts does not overwrite what the first has kept."""
    net = Net().eval()
    with autocast():
        first = net(images(0))
        with torch.no_grad():
            net(images(1))
        second = net(images(2))
    (first.float().sum() + second.float().sum()).backward()
    assert net.stem.weight.grad is not None


def test_what_goes_through_registered_parameters_sees_them():
    net = Net()
    before = {n: (p, p.data_ptr()) for n, p in net.named_parameters()}
    state = {n: t.clone() for n, t in net.state_dict().items()}
    seen = []

    def look():
        assert net.stem.weight.dtype == torch.bfloat16 and net.out.bias.dtype == torch.float32
        assert net.hidden.weight is net.twin.weight
        for name, p in net.named_parameters():
            assert p is before[name][0] and p.data_ptr() == before[name][1]
        for name, t in net.state_dict().items():
            assert t.dtype == state[name].dtype
            assert 'norm' in name or torch.equal(t, state[name])
        seen.append(True)

    net.look = look
    hooked = []
    net.hidden.register_forward_hook(lambda m, args, out: hooked.append(m.weight.dtype))
    step(net)
    assert seen == [True] and hooked == [torch.bfloat16] * 2 and restored(net)
    assert isinstance(net.stem.weight, nn.Parameter)


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_leaves_the_parameters(error):
    net = Net()

    def fail():
        raise error('here')

    net.look = fail
    with autocast(), pytest.raises(error, match='here'):
        net(images())
    assert restored(net) and isinstance(net.stem.weight, nn.Parameter)
    net.look = None
    step(net)


def test_parameters_that_come_and_go_during_the_call():
    net = Net()
    new = nn.Parameter(torch.randn(6))

    def change():
        net.hidden.bias = new
        del net.stem.weight

    net.look = change
    with autocast():
        net(images())
    assert net.hidden.bias is new and restored(net) and not hasattr(net.stem, 'weight')


def test_layers_that_are_replaced_later(monkeypatch):
    net = Net()
    step(net)
    net.stem = nn.Conv2d(3, 6, 3, bias=False)
    net.hidden = nn.Identity()
    compare(net, monkeypatch)


def test_copies_and_files_of_a_module_and_its_end(tmp_path):
    net = Net()
    step(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert same(step(other), step(net))
    average = ExponentialMovingAverage(net)
    average.update_parameters(net)
    with autocast():
        average(images())
    gone = weakref.ref(net)
    del net, average, other
    gc.collect()
    assert gone() is None


def test_a_base_class_and_a_subclass_cast_once():
    class Sub(Net):
        @casts_weights
        def forward(self, x):
            assert self.stem.weight.dtype == torch.bfloat16
            y = super().forward(x)
            assert self.stem.weight.dtype == torch.bfloat16
            return y

    assert step(Sub())[2][TOGETHER] == 2


def test_two_threads_do_not_see_the_copies_of_each_other():
    net, inside, go_on, found = Net().eval(), threading.Event(), threading.Event(), {}

    def evaluate():
        with autocast(), torch.no_grad():
            found['evaluated'] = net(images())

    def train():
        with autocast():
            found['trained'] = net(images())

    net.look = lambda: inside.is_set() or (inside.set(), go_on.wait(20))
    threads = [threading.Thread(target=work) for work in (evaluate, train)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert torch.equal(found['evaluated'], found['trained'].detach())
    found['trained'].float().sum().backward()
    assert net.stem.weight.grad is not None and restored(net)


# --- what else looks at a network -----------------------------------------------------------------


def test_the_environment_decides(monkeypatch):
    net = Net()
    for wish, count in (('0', 0), ('1', 2)):
        monkeypatch.setenv(weight_casts.VARIABLE, wish)
        assert step(net)[2][TOGETHER] == count
    monkeypatch.setenv(weight_casts.VARIABLE, 'off')
    with pytest.raises(ValueError, match='MMHYBRID_CAST_WEIGHTS=off, and it may be 1'):
        net(images())


def test_names_that_are_not_there():
    net = Net()
    net.reads_itself = ('out.biass',)
    with autocast(), pytest.raises(AssertionError, match='Net has no out.biass'):
        net(images())


def test_compiled():
    net = Net().eval()
    expected = step(net, backward=False)[0][0]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    with autocast():
        y = compiled(images())
    torch.testing.assert_close(y.detach(), expected)
    y.float().sum().backward()
    assert net.stem.weight.grad is not None


def test_functional_calls_and_transforms():
    net = Net().eval()
    other = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    with autocast():
        y = torch.func.functional_call(net, other, (images(),))
    y.float().sum().backward()
    assert other['stem.weight'].grad is not None and net.stem.weight.grad is None

    def loss(weights):
        with autocast():
            return torch.func.functional_call(net, weights, (images(),)).float().sum()

    grads = torch.func.grad(loss)({n: p.detach() for n, p in other.items()})
    assert torch.equal(grads['stem.weight'], other['stem.weight'].grad)


def test_parameters_in_pieces_are_left_alone():
    class FullyShardedDataParallel(nn.Linear):
        pass

    net = Net()
    net.hidden = FullyShardedDataParallel(6, 6)
    assert step(net)[2][TOGETHER] == 0
    net = Net()
    net.unused.weight.data = torch.empty(0)  # as DeepSpeed leaves what another process holds
    assert step(net)[2][TOGETHER] == 2


def test_one_process_of_distributed_training(tmp_path, monkeypatch):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/here', rank=0, world_size=1)
    try:
        net, other = Net(), None
        del net.unused
        other = copy.deepcopy(net)
        for view in (False, True):
            model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=view)
            for seed in range(2):
                with autocast():
                    y = model(images(seed))
                y.float().square().mean().backward()
            monkeypatch.setenv(weight_casts.VARIABLE, '0')
            for seed in range(2):
                with autocast():
                    y = other(images(seed))
                y.float().square().mean().backward()
            monkeypatch.delenv(weight_casts.VARIABLE)
            for (name, p), q in zip(net.named_parameters(), other.named_parameters(), strict=True):
                assert torch.equal(p.grad, q[1].grad), name
            for p in (*net.parameters(), *other.parameters()):
                p.grad = None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('options', [{}, dict(with_cp=True, frozen_stages=1)], ids=str)
def test_cuda_graphs_record_the_casts(options):
    torch.manual_seed(0)
    net = BACKBONES['mambavision'](**options).train()
    eager = copy.deepcopy(net)
    graphs = use_cuda_graphs(net, recorder=Recorder())
    for module in (eager, net):
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
        for seed in range(4):
            with autocast():
                maps = module(images(seed))
            sum(y.float().square().mean() for y in maps).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert '2 of 4 calls replayed' in graphs.report() or '3 of 4' in graphs.report()
    assert graphs.closed is None
    for (name, p), q in zip(net.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert restored(net)
