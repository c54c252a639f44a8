"""CUDA graphs without a GPU: a stand-in records and replays, everything else is the real thing.

With it a graphed training is the eager one bit for bit, because a replay computes the same.
"""
import copy
import io
import pickle
import random
import sys
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from backbone_cases import loss_of
from graph_stand_in import Recorder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmhybrid.engine import graphs as engine
from mmhybrid.engine.graphs import bucket, use_cuda_graphs
from mmhybrid.layers import DropPath, recomputed
from mmhybrid.models import MambaVision

SIZES = [(64, 32), (32, 32)]
SMALL = dict(arch=dict(dim=8, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4),
                       window_size=(8, 8, 4, 2)), drop_path_rate=0.3)


class Net(nn.Module):
    """Two maps, at strides 4 and 8; ``kind`` adds what a test is about."""

    def __init__(self, kind=''):
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.norm = nn.BatchNorm2d(6)
        self.drop, self.path = nn.Dropout(0.3), DropPath(0.4)
        self.down = nn.Conv2d(6, 8, 2, 2)
        self.unused = nn.Linear(2, 2)
        self.error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        if self.kind == 'host':
            x = x * random.random()
        x = self.drop(self.norm(self.stem(x)).relu())
        x = x + self.path(x)
        if self.kind == 'recomputed':
            return x, recomputed(nn.Sequential(self.down, self.drop), x)
        return x, self.down(x)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(engine, 'print_log', lambda text, **_: lines.append(text))
    return lines


def graphed(module, **settings):
    recorder = Recorder()
    graphs = use_cuda_graphs(module, recorder=recorder, **settings)
    graphs.stand_in = recorder
    return graphs


def images(size=(64, 32), seed=0, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def train(net, steps=8, sizes=SIZES, accumulate=1, context=nullcontext, wrap=None):
    """Losses of some steps of AdamW, and the random state after them."""
    torch.manual_seed(1)
    model = net if wrap is None else wrap
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(steps):
        with context():
            maps = model(images(sizes[step % len(sizes)], step))
        loss = loss_of(maps).float()
        loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, torch.get_rng_state()


def same(one, other):
    """Whether two modules have the same weights, statistics and gradients, bit for bit."""
    state = other.state_dict()
    assert [k for k, v in one.state_dict().items() if not torch.equal(v, state[k])] == []
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    return True


def compare(net, **how):
    """Train a copy eagerly and the module with graphs; returns its graphs."""
    eager = copy.deepcopy(net)
    graphs = graphed(net)
    expected, found = train(eager, **how), train(net, **how)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert same(net, eager)
    return graphs


# --- training -------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['', 'recomputed'])
@pytest.mark.parametrize('accumulate', [1, 3])
def test_training_is_the_eager_one(kind, accumulate):
    graphs = compare(Net(kind), accumulate=accumulate)
    assert graphs.stand_in.records == 2 * len(SIZES)
    assert '4 shapes' not in graphs.report()
    assert '2 shapes of images, 2 after padding, which adds 0.0 % pixels' in graphs.report()
    assert '2 graphs recorded, 0 dropped; 6 of 8 calls replayed (75.0 %), 2 eager because' \
        in graphs.report()


@pytest.mark.parametrize('changes', [
    dict(), dict(with_cp=True), dict(frozen_stages=2), dict(norm_eval=True), dict(frozen_stages=4),
    dict(out_indices=(1, 2))], ids=str)
def test_training_of_a_backbone(changes):
    torch.manual_seed(0)
    graphs = compare(MambaVision(**SMALL, **changes).train(), steps=5, sizes=[(32, 32)])
    assert graphs.closed is None and graphs.stand_in.records == 2


def test_mixed_precision_casts_inside_of_the_graph():
    casts = []

    class Looking(Net):
        def forward(self, x):
            casts.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    graphs = compare(Looking(), context=lambda: torch.autocast('cpu', torch.bfloat16))
    assert graphs.stand_in.records == 4
    assert set(casts[8 + 2:]) == {False}, 'all but the eager runs'
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.is_autocast_cache_enabled()


def test_the_backward_pass_is_not_under_autocast():
    net, dtypes = Net(), []
    graphs = graphed(net)

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            dtypes.append(torch.is_autocast_enabled('cpu'))
            return g

    plain = net.path.forward
    net.path.forward = lambda x: Look.apply(plain(x))
    with torch.autocast('cpu', torch.bfloat16):
        for step in range(3):
            y = net(images(seed=step))
    loss_of(y).backward()
    assert graphs.closed is None and dtypes and not any(dtypes)


def test_every_replay_draws_anew():
    net = Net()
    graphed(net)
    x = images()
    maps = [net(x)[0].detach() for _ in range(5)]
    zeros = [(y == 0).sum().item() for y in maps]
    assert len(set(zeros)) > 2
    assert not any(torch.equal(maps[-1], y) for y in maps[:-1])


def test_frozen_weights_and_unused_ones_get_no_gradient():
    net = Net()
    net.stem.requires_grad_(False)
    for step in range(3):
        if step == 0:
            graphs = graphed(net)
        loss_of(net(images(seed=step))).backward()
    assert net.stem.weight.grad is None and net.unused.weight.grad is None
    assert net.down.weight.grad is not None and graphs.stand_in.replays


def test_input_gradients_and_a_map_that_no_loss_reads():
    eager = Net()
    net = copy.deepcopy(eager)
    graphs = graphed(net)
    for step in range(4):
        found = []
        for module in (eager, net):
            torch.manual_seed(step)
            x = images(seed=step).requires_grad_()
            module.zero_grad()
            module(x)[step % 2].square().sum().backward()
            found.append(x.grad)
        assert torch.equal(*found)
        pairs = zip(eager.parameters(), net.parameters(), strict=True)
        for p, q in pairs:
            # a graph has zeros where the map does not depend on a weight
            assert torch.equal(torch.zeros_like(p) if p.grad is None else p.grad,
                               torch.zeros_like(q) if q.grad is None else q.grad)
    assert graphs.stand_in.records == 2 and graphs.closed is None


def calls_of(function):
    """How many functions of Python and of its extensions a call takes."""
    count = [0]

    def profile(frame, event, argument):
        count[0] += event in ('call', 'c_call')

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count[0]


class Quick(Recorder):
    """Replays nothing after the comparison with an eager run, so that the way there remains."""

    def record(self, run):
        left = [1]
        run()

        def replay():
            self.replays += 1
            if left[0]:
                left[0] -= 1
                run()

        return replay


def test_a_replay_takes_few_calls():
    """Of a network of 139 modules and 149 weights; the looks and the forward took 1782 before."""
    net = MambaVision(**SMALL | dict(arch=SMALL['arch'] | dict(depths=(1, 1, 4, 4))))
    graphs, x = use_cuda_graphs(net, recorder=Quick()), images()

    for _ in range(3):
        sum(y.sum() for y in net(x)).backward()
    assert graphs._count['replays'] == 2 and graphs.closed is None
    assert calls_of(graphs._watched.state) <= 25
    maps = []
    assert calls_of(lambda: maps.extend(net(x))) <= 130
    given = [torch.ones_like(y) for y in maps]
    net.zero_grad()
    assert calls_of(lambda: torch.autograd.backward(maps, given)) <= 250


def test_gradients_lie_as_their_parameters_do():
    """So that autograd keeps them, and copies none, however weights lie in memory."""
    net = Net()
    net.stem.to(memory_format=torch.channels_last)
    net.down.weight = nn.Parameter(net.down.weight.detach().permute(1, 0, 3, 2).contiguous()
                                   .permute(1, 0, 3, 2))
    graphs, made = compare(net), []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function.__name__.partition('.')[0])
            return function(*args, **kwargs or {})

    net.zero_grad()
    loss = loss_of(net(images()))
    with Noted():
        loss.backward()
    assert graphs._count['replays'] and made and 'new_empty_strided' not in made
    for name, p in net.named_parameters():
        assert p.grad is None or p.grad.stride() == p.stride(), name


def set_data(net):
    net.stem.weight.data = net.stem.weight.data.clone()


CHANGES = {
    'mode': lambda net: net.norm.eval(),
    'attribute': lambda net: setattr(net.path, 'rate', 0.1),
    'new attribute': lambda net: setattr(net, 'more', 1),
    'attribute gone': lambda net: delattr(net, 'error'),
    'frozen': lambda net: net.stem.requires_grad_(False),
    'memory': set_data,
    'dtype': lambda net: net.double(),
    'parameter': lambda net: setattr(net.stem, 'bias', nn.Parameter(net.stem.bias.detach())),
    'no parameter': lambda net: setattr(net.stem, 'bias', None),
    'buffer': lambda net: setattr(net.norm, 'running_mean', net.norm.running_mean.clone()),
    'module': lambda net: setattr(net, 'drop', nn.Dropout(0.2)),
    'module inside': lambda net: net.drop.add_module('inner', nn.ReLU()),
    'hook': lambda net: net.down.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_quick_look_sees_every_change(change):
    net = Net()
    watched = engine._Watched(net)
    number = watched.state()
    assert number == watched.state() == 0 and watched._seen.still()
    CHANGES[change](net)
    assert not watched._seen.still()
    assert watched.state() == (None if change == 'hook' else 1)


def test_a_quick_look_takes_what_training_does_for_no_change():
    net = Net()
    watched = engine._Watched(net)
    train(net.train(), steps=2)
    number, seen = watched.state(), watched._seen
    train(net, steps=2)
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    net.zero_grad()
    assert seen.still() and watched.state() == number and watched._seen is seen


def test_what_changes_unseen_is_looked_at_every_time():
    """Lists inside of tuples; and modules that keep a new object each time have no quick look."""
    net = Net()
    net.pair = ([1], 2)
    watched = engine._Watched(net)
    assert watched.state() == 0 and not watched._seen.still()
    net.pair[0].append(2)
    assert watched.state() == 1
    net.pair = None
    for i in range(engine.MANY_STATES + 3):
        net.kept = [i]
        assert watched.state() == 2
    assert watched._seen is None


def test_gradients_are_no_part_of_the_graph():
    """Whoever keeps or changes a gradient, or a map, does not meet the next replay in it."""
    net = Net().eval()
    graphed(net)
    kept = []
    for step in range(4):
        maps = net(images(seed=step))
        grads = torch.autograd.grad(loss_of(maps), net.down.weight)
        kept.append((maps[1].detach(), maps[1].detach().clone(), grads[0], grads[0].clone()))
    for y, y_then, g, g_then in kept:
        assert torch.equal(y, y_then) and torch.equal(g, g_then)


def test_hooks_of_parameters_run_outside():
    net, calls = Net(), []
    graphs = graphed(net)
    net.stem.weight.register_hook(lambda g: calls.append('gradient'))
    net.stem.weight.register_post_accumulate_grad_hook(lambda p: calls.append('sum'))
    for step in range(4):
        calls.clear()
        loss_of(net(images(seed=step))).backward()
        assert calls == ['gradient', 'sum']
    assert graphs.stand_in.replays >= 6


def test_distributed_training(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/here', rank=0, world_size=1)
    try:
        results = []
        for use in (False, True):
            torch.manual_seed(0)
            net = Net()
            net.unused.requires_grad_(False)
            wrap = nn.parallel.DistributedDataParallel(net)
            reduced = []

            def hook(state, bucket, reduced=reduced):
                reduced.append(bucket.buffer().numel())
                future = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            wrap.register_comm_hook(None, hook)
            graphs = graphed(net) if use else None
            results.append((train(net, wrap=wrap)[0], net, reduced))
        (expected, eager, once), (found, net, again) = results
        assert found == expected and same(net, eager)
        assert sum(again) == sum(once) == 8 * sum(
            p.numel() for p in net.parameters() if p.requires_grad)
        assert graphs.stand_in.records == 4
    finally:
        torch.distributed.destroy_process_group()


# --- what is in the way of each other -------------------------------------------------------------

def test_two_forward_passes_before_a_backward_pass(said):
    eager = Net()
    net = copy.deepcopy(eager)
    graphs = graphed(net)
    for module in (eager, net):
        torch.manual_seed(2)
        for step in range(4):
            losses = [loss_of(module(images(size, step))) for size in (*SIZES, SIZES[0])]
            sum(losses).backward()
    for p, q in zip(eager.parameters(), net.parameters(), strict=True):
        if p.grad is not None:  # what was added first is another
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6)
    assert graphs._count['due'] > 0 and not said


def test_evaluation_between_forward_and_backward():
    eager = Net()
    net = copy.deepcopy(eager)
    graphed(net)
    for module in (eager, net):
        for step in range(4):
            torch.manual_seed(step)
            module.train()
            loss = loss_of(module(images(seed=step)))
            module.eval()
            with torch.no_grad():
                module(images((32, 32), seed=9))
            loss.backward()
    assert same(net, eager)


def test_a_loss_that_is_thrown_away_is_not_waited_for():
    net = Net()
    graphs = graphed(net)
    for step in range(4):
        net(images(seed=step))
    assert graphs._count['due'] == 0 and graphs._count['replays'] == 3


def test_a_second_backward_pass_is_refused():
    net = Net()
    graphed(net)
    for step in range(3):
        loss = loss_of(net(images(seed=step)))
        loss.backward(retain_graph=True)
        if step == 0:
            loss.backward()  # eager
    with pytest.raises(RuntimeError, match=r'second time \(retain_graph=True\).*add the losses'):
        loss.backward()


# --- state ----------------------------------------------------------------------------------------

def test_recording_leaves_everything_as_it_was():
    """Also what an error ends: the call that recorded is the eager one in every respect."""
    for error in (None, RuntimeError('no such kernel'), KeyboardInterrupt()):
        eager = Net()
        net = copy.deepcopy(eager)
        graphs = graphed(net)
        record = graphs.stand_in.record

        def failing(run, error=error, record=record):
            replay = record(run)
            if error is not None:
                raise error
            return replay

        graphs.stand_in.record = failing
        for module in (net, eager):
            torch.manual_seed(0)
            loss_of(module(images())).backward()
        state = torch.get_rng_state()
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                net(images())
            assert torch.equal(state, torch.get_rng_state())
        else:
            maps = net(images())
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            assert all(torch.equal(y, z) for y, z in zip(maps, eager(images()), strict=True))
            assert torch.equal(after, torch.get_rng_state())
        assert same(net, eager)


def test_an_error_is_told_once(said):
    net = Net()
    graphs = graphed(net)
    graphs.stand_in.record = lambda run: 1 / 0
    for step in range(4):
        for size in SIZES:
            net(images(size, step))
    assert len(said) == 1
    assert 'No further CUDA graphs of Net: recording failed for images of 2x3x64x32 ' \
        '(ZeroDivisionError: division by zero).' in said[0]
    assert graphs.stand_in.replays == 0 and 'after recording had stopped' in graphs.report()


def test_graphs_that_exist_go_on_after_an_error(said):
    net = Net()
    graphs = graphed(net)
    for step in range(2):
        net(images(seed=step))
    graphs.stand_in.record = lambda run: 1 / 0
    before = graphs._count['replays']
    for step in range(3):
        net(images((32, 32), step))
        net(images(seed=step))
    assert graphs._count['replays'] == before + 3 and len(said) == 1


def test_an_error_of_the_module_itself_is_raised(said):
    net = Net()
    graphed(net)
    net(images())
    net.error = ValueError('no')
    with pytest.raises(ValueError, match='no'):
        net(images())
    with pytest.raises(ValueError, match='no'):
        net(images())


def test_numbers_drawn_on_the_host_are_not_recorded(said):
    net = Net('host')
    graphs = graphed(net)
    outputs = {net.eval()(images())[0].sum().item() for _ in range(4)}
    assert len(outputs) == 4 and graphs.stand_in.records == 0
    assert 'draws random numbers on the CPU' in said[0] and len(said) == 1


def test_a_wrong_replay_is_not_used(said):
    """What decides is the result: here the recording forgets the input."""
    net = Net()
    graphs = graphed(net)
    record = graphs.stand_in.record

    def wrong(run):
        replay = record(run)
        count = graphs.stand_in.records

        def doubled():
            replay()
            if count == 2:
                for p in graphs_of():
                    p.mul_(1.2)
        return doubled

    def graphs_of():
        return [graphs._arena._memory.view(torch.float32)]

    graphs.stand_in.record = wrong
    for _ in range(3):
        net(images())
    assert graphs._count['replays'] == 0 and len(said) == 1
    assert 'the gradient of a replay is not that of an eager run' in said[0]


def test_weights_that_are_not_finite_are_recorded_all_the_same(said):
    net = Net()
    graphs = graphed(net)
    net.stem.weight.data.fill_(float('nan'))
    for _ in range(3):
        y = net(images())[0].detach()
    assert y.isnan().any() and graphs._count['replays'] == 2 and not said


# --- a graph that is out of date is never found ---------------------------------------------------

def new_storage(net):
    net.stem.weight.data = net.stem.weight.data.clone() * 2


def assigned(net):
    net.load_state_dict({k: v.clone() * 0.5 for k, v in net.state_dict().items()}, assign=True)


def new_module(net):
    net.down = nn.Conv2d(6, 8, 2, 2)


def rate(net):
    net.path.rate = 0.9


def new_rate(net):
    net.drop = nn.Dropout(0.9)


def frozen(net):
    net.stem.requires_grad_(False)
    net.norm.eval()


def momentum(net):
    net.norm.momentum = 0.5


def stepped(net):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)


@pytest.mark.parametrize('change', [new_storage, assigned, new_module, rate, new_rate, frozen,
                                    momentum, stepped])
def test_changes_of_the_module(change):
    eager = Net()
    net = copy.deepcopy(eager)
    graphs = graphed(net)
    for module in (eager, net):
        torch.manual_seed(0)
        for step in range(3):
            loss_of(module(images(seed=step))).backward()
        torch.manual_seed(1)
        change(module)
        for step in range(3):
            loss_of(module(images(seed=step))).backward()
    assert same(net, eager)
    assert graphs.stand_in.records == (2 if change is stepped else 4)


def test_other_kinds_of_calls_have_graphs_of_their_own():
    net = Net()
    graphs = graphed(net)
    eager = copy.deepcopy(net)

    def runs():
        for training in (True, False):
            for context in (nullcontext, torch.no_grad, torch.inference_mode,
                            lambda: torch.autocast('cpu', torch.bfloat16)):
                for x in (images(), images().double().float().to(
                        memory_format=torch.channels_last), images(batch=1)):
                    yield training, context, x

    for training, context, x in [*runs(), *runs(), *runs()]:
        found = []
        for module in (net, eager):
            module.train(training)
            torch.manual_seed(5)
            with context():
                found.append(module(x))
        for y, want in zip(*found, strict=True):
            assert torch.equal(y, want) and y.stride() == want.stride()
            assert y.requires_grad == want.requires_grad
        del y, want
    assert same(net, eager)
    # inference mode and no_grad share theirs
    assert graphs._count['recorded'] == 2 * 3 * 3 and graphs.closed is None


def test_a_module_that_always_changes_has_no_graph(said):
    net = Net()
    graphs = graphed(net)
    for step in range(80):
        net.step = step
        net(images((32, 32)))
    assert len(said) == 1 and 'change from call to call' in said[0]
    assert len(graphs._watched._states) == engine.MANY_STATES


def test_hooks_inside_are_not_passed_over(said):
    net, seen = Net(), []
    graphs = graphed(net)
    net.register_forward_hook(lambda *_: seen.append('whole'))
    for _ in range(3):
        net(images())
    assert graphs._count['replays'] == 2 and seen == ['whole'] * 3
    net.norm.register_forward_hook(lambda *_: seen.append('norm'))
    for _ in range(3):
        net(images())
    assert seen.count('norm') == 3 and 'has hooks' in said[0] and len(said) == 1


def test_copies_are_on_their_own():
    """As the hook for averaged weights (EMA) makes one, or torch.save of a whole model."""
    net = Net()
    graphs = graphed(net)
    for _ in range(3):
        net(images())
    file = io.BytesIO()
    torch.save(nn.Sequential(net), file)
    file.seek(0)
    for other in (copy.deepcopy(net), copy.deepcopy(nn.Sequential(net))[0],
                  pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)[0]):
        before = dict(graphs._count)
        with torch.no_grad():
            other.stem.weight.zero_()
            other.stem.bias.zero_()
        assert other.eval()(images())[0].unique().numel() <= 6
        assert graphs._count == before
    assert graphs.closed is None and net(images())[0].unique().numel() > 6


def test_remove_gives_the_forward_function_back():
    net = Net()
    own = net.forward
    graphs = graphed(net)
    with pytest.raises(RuntimeError, match='is replaced already'):
        graphed(net)
    net(images())
    graphs.remove()
    assert 'forward' not in net.__dict__ and net.forward == own
    net.forward = before = lambda x: own(x)
    graphs = graphed(net)
    graphs.remove()
    assert net.forward is before
    graphs = graphed(net)
    theirs, ours = (lambda x: ours(x)), net.forward
    net.forward = theirs  # somebody wraps ours, and then we go
    graphs.remove()
    assert net.forward is theirs and len(net(images())) == 2


@pytest.mark.parametrize('call', [
    lambda net: net(x=images()), lambda net: net(images()[0])], ids=['by name', 'without batch'])
def test_other_calls_are_eager(call):
    net = Net().eval()
    net.norm = nn.Identity()
    graphs = graphed(net)
    for _ in range(3):
        call(net)
    assert graphs.stand_in.records == 0


@pytest.mark.parametrize('make', [
    lambda maps: OrderedDict(a=maps[0]), lambda maps: (maps[0], 'text'), lambda maps: {1: maps[0]}])
def test_other_results_are_eager(make, said):
    class Odd(Net):
        def forward(self, x):
            return make(super().forward(x))

    net = Odd()
    graphed(net)
    kinds = {type(net(images())) for _ in range(3)}
    assert len(kinds) == 1 and len(said) == 1
    assert 'expected a tensor, or a tuple or list of tensors' in said[0]


@pytest.mark.parametrize('make', [lambda maps: maps[1], list, lambda maps: (maps[0],)])
def test_containers(make):
    class Other(Net):
        def forward(self, x):
            return make(super().forward(x))

    net = Other()
    graphs = graphed(net)
    results = [net(images()) for _ in range(3)]
    assert len({type(y) for y in results}) == 1 and graphs.stand_in.records == 2
    padded = [net(images((160, 288))) for _ in range(3)][-1]
    assert (padded if isinstance(padded, torch.Tensor) else padded[-1]).shape[-2:] in (
        (20, 36), (40, 72))


# --- which graphs there are -----------------------------------------------------------------------

def test_the_one_used_least_recently_goes(said):
    net = Net().eval()
    graphs = graphed(net, max_graphs=2)
    sizes = [(32, 32), (64, 32), (64, 64)]

    def call(index, times=1):
        before = graphs._count['replays']
        for _ in range(times):
            with torch.no_grad():
                net(images(sizes[index]))
        return graphs._count['replays'] - before

    assert [call(0, 2), call(1, 2)] == [1, 1]
    assert call(0) == 1
    assert call(2, 2) == 1  # takes the place of 1
    assert call(0) == 1 and graphs._count['dropped'] == 1
    assert call(1, 2) == 0  # waits for twice as many calls as at first
    assert call(1) == 1 and graphs._count['dropped'] == 2
    assert graphs._count['recorded'] == 4
    assert len(graphs._graphs) == 2 and graphs.stand_in.pools == 1


def test_more_kinds_than_graphs_are_not_recorded_for_ever():
    net = Net().eval()
    graphs = graphed(net, max_graphs=1)
    with torch.no_grad():
        for step in range(60):
            net(images(SIZES[step % 2]))
    assert graphs._count['recorded'] <= 10


@pytest.mark.parametrize(('side', 'divisor', 'expected'), [
    (160, 128, 160), (224, 128, 224), (384, 128, 384), (512, 128, 512), (640, 128, 640),
    (768, 128, 768), (1024, 128, 1024), (32, 128, 32), (480, 128, 512), (544, 128, 640),
    (800, 128, 896), (1344, 128, 1408), (1344, 64, 1344), (800, 64, 832), (288, 128, 320),
    (800, 32, 800), (800, None, 800), (500, 128, 500), (1333, 128, 1333), (800, 96, 864)])
def test_bucket(side, divisor, expected):
    assert bucket(side, divisor) == expected


def coco_batches(number):
    """Sizes of batches of two of ``coco_instance_ms.py``, of pictures with random ratios."""
    draw = random.Random(0)
    finals = list(range(480, 801, 32))

    def resized(width, height, short):
        factor = min(1333 / max(width, height), short / min(width, height))
        return int(width * factor + 0.5), int(height * factor + 0.5)

    def one():
        ratio = 2 ** draw.uniform(-1, 1)
        width, height = (640, int(640 / ratio)) if ratio > 1 else (int(640 * ratio), 640)
        if draw.random() < 0.5:
            width, height = resized(width, height, draw.choice((400, 500, 600)))
            height, width = (draw.randint(min(side, 384), min(side, 600))
                             for side in (height, width))
        return ratio > 1, *resized(width, height, draw.choice(finals))

    waiting = {True: [], False: []}
    while number:
        wide, width, height = one()
        waiting[wide].append((height, width))
        if len(waiting[wide]) == 2:
            yield tuple(-(-max(sides) // 32) * 32 for sides in zip(*waiting[wide], strict=True))
            waiting[wide].clear()
            number -= 1


@pytest.mark.parametrize(('divisor', 'graphs', 'more'), [(None, 600, 0), (64, 160, 0.06),
                                                         (128, 56, 0.15)])
def test_few_graphs_for_training_at_many_scales(divisor, graphs, more):
    batches = list(coco_batches(20_000))
    buckets = [tuple(bucket(side, divisor) for side in batch) for batch in batches]
    assert len(set(batches)) > 300
    assert len(set(buckets)) <= graphs
    pixels, padded = (sum(height * width for height, width in sizes)
                      for sizes in (batches, buckets))
    assert padded <= (1 + more) * pixels


# --- padding --------------------------------------------------------------------------------------

def test_padding_is_that_of_a_larger_image():
    net = Net()
    eager = copy.deepcopy(net)
    graphs = graphed(net, divisor=128)
    for step in range(3):
        x = images((160, 288), step)
        padded = torch.nn.functional.pad(x, (0, 32))
        for module, image in ((net, x), (eager, padded)):
            torch.manual_seed(step)
            maps = module(image)
            maps = [y[..., :160 // stride, :288 // stride]
                    for y, stride in zip(maps, (4, 8), strict=True)]
            loss_of(maps).backward()
            if module is net:
                got = maps
        assert all(torch.equal(y, z) for y, z in zip(got, maps, strict=True))
        assert all(y.is_contiguous() for y in got)
    assert same(net, eager) and graphs.stand_in.records == 2
    assert '1 shapes of images, 1 after padding, which adds 11.1 % pixels' in graphs.report()


def test_several_sizes_share_a_graph():
    net = Net()
    graphs = graphed(net)
    for size in ((160, 288), (160, 320), (160, 288)):
        maps = net(images(size))
        assert maps[0].shape[-2:] == (40, size[1] // 4)
    assert graphs.stand_in.records == 2 and '2 shapes of images, 1 after' in graphs.report()


def test_evaluation_pads_nothing_unless_asked():
    x = images((160, 288))
    for divisor, width in ((None, 288), (128, 320)):
        net = Net().eval()
        graphs = graphed(net, test_divisor=divisor)
        with torch.no_grad():
            maps = net(x)
        assert maps[0].shape[-1] == 72
        assert {kind[-1] for kind in graphs._kinds} == {width}


def test_maps_that_cannot_be_cut_back():
    class Pooled(Net):
        def forward(self, x):
            return super().forward(x)[1].mean((2, 3))

    net = Pooled()
    graphed(net)
    assert net(images((64, 64))).shape == (2, 8)
    with pytest.raises(ValueError, match=r'Pooled gives \(2, 8\) for a padded image of '
                                         r'\(2, 3, 160, 320\).*cuda_graphs.divisor=None'):
        net(images((160, 288)))


# --- arguments, and the part that needs a GPU -----------------------------------------------------

@pytest.mark.parametrize(('settings', 'error', 'text'), [
    (dict(divisor=100), ValueError, 'got divisor=100, expected a multiple of 32'),
    (dict(divisor=0), ValueError, 'got divisor=0'), (dict(divisor='64'), TypeError, "divisor='64'"),
    (dict(test_divisor=-32), ValueError, 'test_divisor=-32'),
    (dict(test_divisor=True), TypeError, 'test_divisor=True'),
    (dict(max_graphs=0), ValueError, 'max_graphs=0, expected at least 1'),
    (dict(max_graphs=1.5), TypeError, 'max_graphs=1.5, expected an integer')])
def test_arguments(settings, error, text):
    with pytest.raises(error, match=text):
        use_cuda_graphs(Net(), recorder=Recorder(), **settings)


def test_no_module():
    with pytest.raises(TypeError, match='got function, expected a torch.nn.Module'):
        use_cuda_graphs(lambda x: x, recorder=Recorder())


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu():
    net = Net()
    with pytest.raises(RuntimeError, match='need an NVIDIA GPU, and PyTorch finds none'):
        use_cuda_graphs(net)
    assert 'forward' not in net.__dict__


def test_recording_with_cuda(monkeypatch):
    """What PyTorch is asked for: generators known to the graph before it records, one pool."""
    calls = []

    class Graph:
        def register_generator_state(self, generator):
            calls.append(('register', generator))

        def replay(self):
            calls.append('replay')

    class Recording:
        def __init__(self, graph, **options):
            assert isinstance(graph, Graph)
            calls.append(options)

        def __enter__(self):
            calls.append('begin')

        def __exit__(self, *error):
            calls.append('end')

    for name, value in dict(
            CUDAGraph=Graph, graph=Recording, default_generators=['first', 'second'],
            current_device=lambda: 1, graph_pool_handle=lambda: 'pool').items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = engine.CudaRecorder()
    recorder.new_pool()
    recorder._stream = 'stream'
    replay = recorder.record(lambda: calls.append('run'))
    replay()
    assert calls == [
        ('register', 'second'),
        dict(pool='pool', stream='stream', capture_error_mode='thread_local'),
        'begin', 'run', 'end', 'replay']
    assert recorder.generators(torch.device('cuda', 0)) == ['first']
    assert not recorder.takes(images())


def test_the_host_state_knows_all_generators_of_the_host():
    recorder = engine.CudaRecorder()
    for draw in (random.random, lambda: torch.rand(1), lambda: __import__('numpy').random.rand()):
        before = recorder.host_state()
        assert recorder.host_state() == before
        draw()
        assert recorder.host_state() != before
