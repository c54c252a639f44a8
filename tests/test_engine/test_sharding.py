"""Models that processes divide among themselves, on a CPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
import toy
from mmengine.config import Config

from mmhybrid import cli
from mmhybrid.engine.amp import has_accelerator
from mmhybrid.engine.sharding import apply_fsdp
from mmhybrid.errors import UserError
from mmhybrid.weights import WeightsError, read_checkpoint
from mmhybrid.weights.shards import piece_name

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(has_accelerator(), reason='several processes on a CPU')
needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, 'FSDPModule'),
    reason='an older PyTorch')

WORKER = """
import copy, sys, torch, toy
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmhybrid.engine.distributed import leave_process_group, prepare_launch
from mmhybrid.engine.pieces import whole_tensor
from mmhybrid.engine.sharding import ShardedRunner, _shard, units
from mmhybrid.registry import MODELS
folder, what = sys.argv[1:]
cfg = Config(dict())
prepare_launch(cfg, 'pytorch')


def whole(state):
    return {name: whole_tensor(tensor) for name, tensor in state.items()}


def worst(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def steps(model):
    torch.manual_seed(dist.get_rank())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(2):
        sum(map_.square().mean() for map_ in model(torch.randn(2, 3, 72, 56))).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert norm > 0.1


def compare_families(*wanted):
    mambavision = dict(dim=16, stem_width=8, depths=(1, 1, 3, 2), num_heads=(1, 1, 2, 2),
                       window_size=(8, 8, 4, 4), mlp_ratio=2)
    cases = dict(
        recomputed=(dict(type='MambaVision', arch=mambavision, drop_path_rate=0.1, with_cp=True),
                    12),
        lean=(dict(type='MambaVision', arch=mambavision, windows='tight', drop_path_rate=0.,
                   lean_mixer=True), 12),
        padded=(dict(type='MambaVision', arch=mambavision, drop_path_rate=0.1), 12),
        vmamba=(dict(type='VMamba', arch=dict(dim=16, depths=(1, 1, 2, 1)), drop_path_rate=0.1),
                15),
        localvmamba=(dict(type='LocalVMamba', arch=dict(dim=16, depths=(1, 1, 2, 1)),
                          directions='unsearched'), 10),
        vim=(dict(type='Vim', arch=dict(dim=32, depth=4), img_size=64, out_indices=[3]), 4),
        localvim=(dict(type='LocalVim', arch=dict(dim=32, depth=4), img_size=64, out_indices=[3],
                       directions='unsearched'), 4),
        resnet=(dict(type='TimmFeatures', name='resnet18'), 0),  # one piece
    )
    for options, least in map(cases.get, wanted):
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(options))
        before = {name for name, p in model.named_parameters()
                  if getattr(p, '_no_weight_decay', False)}
        reference = torch.nn.parallel.DistributedDataParallel(
            copy.deepcopy(model), broadcast_buffers=False, static_graph=True)
        _shard(model, 'cpu')
        assert len(units(model)) == least, (options, len(units(model)))
        assert before == {name for name, p in model.named_parameters()
                          if getattr(p, '_no_weight_decay', False)}
        steps(model)
        steps(reference)
        difference = worst(whole(model.state_dict()), reference.module.state_dict())
        assert difference < 1e-5, (options, difference)


train, ckpt = dict(by_epoch=False, max_iters=8, val_interval=3), dict(interval=4, by_epoch=False)
common = dict(train_cfg=train, checkpoint=ckpt, sampler='InfiniteSampler', launcher='pytorch')
last = dict(optim=dict(accumulative_counts=3, clip_grad=dict(max_norm=1.0)))


def sharded(name, kind, **more):
    return toy.run(f'{folder}/{name}', kind=ShardedRunner, fsdp=dict(checkpoints=kind),
                   **{**common, **more})


def states(runner):
    optimizer = runner.optim_wrapper.state_dict()['state']
    return {f'{i}.{name}': whole_tensor(value) for i, state in optimizer.items()
            for name, value in state.items()} | whole(runner.model.state_dict())


def same(left, right):  # running statistics differ between processes, and rank 0's are saved
    left, right = ({name: value for name, value in states(each).items() if 'running' not in name}
                   for each in (left, right))
    return worst(left, right)


if what == 'families':
    compare_families('lean', 'padded', 'localvmamba', 'vim', 'localvim', 'resnet')
elif what == 'training':
    compare_families('recomputed', 'vmamba')
    ddp = toy.run(f'{folder}/ddp', wrapper=cfg.model_wrapper_cfg, **common)
    full, pieces = sharded('full', 'full'), sharded('sharded', 'sharded')
    difference = worst(whole(full.model.state_dict()), ddp.model.module.state_dict())
    assert difference < 1e-5, difference
    assert same(full, pieces) == 0
    for path in ('full/iter_4.pth', 'sharded/iter_4.pth'):
        resumed = sharded('resumed', 'full', resume=f'{folder}/{path}')
        assert same(full, resumed) == 0, path
    # gradients that wait for a step at iteration 4
    waiting = sharded('waiting', 'sharded', **last)
    resumed = sharded('resumed', 'full', resume=f'{folder}/waiting/iter_4.pth', **last)
    assert same(waiting, resumed) == 0
    del ddp, full, pieces, resumed, waiting
else:
    runner = sharded('others', 'sharded', resume=what)
    assert runner.iter == 8
    del runner
print('done')
leave_process_group()
"""


def launch(folder, processes, *arguments):
    script = folder / 'worker.py'
    script.write_text(WORKER)
    env = dict(os.environ, OMP_NUM_THREADS='1',
               PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(toy.__file__).parent)]))
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         f'--nproc_per_node={processes}', str(script), str(folder), *map(str, arguments)],
        capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('done') == processes
    return result


@on_cpu
@needs_fsdp
def test_a_sharded_training_is_that_of_ddp(tmp_path):
    launch(tmp_path, 2, 'training')
    full, ddp = (read_checkpoint(tmp_path / name / 'iter_8.pth') for name in ('full', 'ddp'))
    pieces = read_checkpoint(tmp_path / 'sharded' / 'iter_8.pth')
    assert sorted(os.listdir(tmp_path / 'sharded' / 'iter_8.pth')) == [
        'piece_0_of_2.pth', 'piece_1_of_2.pth', 'rest.pth']
    assert full.keys() == ddp.keys() == pieces.keys()
    for other, tolerance in ((ddp, 1e-5), (pieces, 0)):
        torch.testing.assert_close(full['state_dict'], other['state_dict'], rtol=0, atol=tolerance)
        torch.testing.assert_close(
            full['optimizer']['state'], other['optimizer']['state'], rtol=0, atol=1e-4)
    # one process without sharding goes on with either
    runners = [
        toy.run(tmp_path / 'alone', dict(by_epoch=False, max_iters=6, val_interval=10),
                dict(interval=9), sampler='InfiniteSampler', resume=str(tmp_path / name))
        for name in ('full/iter_4.pth', 'sharded/iter_4.pth')]
    assert toy.difference(*runners) == []


@on_cpu
@needs_fsdp
@pytest.mark.slow
def test_all_families_and_another_number_of_processes(tmp_path):
    launch(tmp_path, 2, 'families')
    toy.run(tmp_path / 'one', dict(by_epoch=False, max_iters=3, val_interval=10),
            dict(interval=3, by_epoch=False), sampler='InfiniteSampler')
    launch(tmp_path, 3, tmp_path / 'one' / 'iter_3.pth')
    launch(tmp_path, 2, tmp_path / 'others' / 'iter_4.pth')


# --- settings -------------------------------------------------------------------------------------

def settings(**more):
    common = dict(model=dict(), optim_wrapper=dict(optimizer=dict(type='AdamW')))
    return Config(dict(common, **more))


@needs_fsdp
@pytest.mark.parametrize('more, word', [
    (dict(cuda_graphs=True), 'cuda_graphs'),
    (dict(compile_backbone={}), None),  # an empty setting asks for nothing
    (dict(compile_backbone=dict(mode='x')), 'compile_backbone'),
    (dict(model=dict(backbone=dict(lora=dict(rank=4)))), '--lora'),
    (dict(custom_hooks=[dict(type='EMAHook')]), 'EMAHook'),
    (dict(custom_hooks=[dict(type='mmdet.MeanTeacherHook')]), None),
    (dict(model_wrapper_cfg=dict(type='x')), 'model_wrapper_cfg'),
    (dict(runner_type='FlexibleRunner'), 'FlexibleRunner'),
    (dict(optim_wrapper=dict(type='DeepSpeedOptimWrapper')), 'DeepSpeedOptimWrapper'),
    (dict(optim_wrapper=dict(optimizer=dict(type='mmhybrid.lamb'))), 'lamb'),
    (dict(optim_wrapper=dict(type='AmpOptimWrapper', optimizer=dict(type=torch.optim.SGD))), None),
    (dict(optim_wrapper=dict(clip_grad=dict(norm_type='inf'))), 'norm_type'),
    (dict(optim_wrapper=dict(clip_grad=dict(max_norm=1.0))), None),
])
def test_what_goes_with_sharding(more, word):
    cfg = settings(**more)
    if word is None:
        apply_fsdp(cfg, 'full', 'pytorch')
        assert cfg.runner_type == 'ShardedRunner' and cfg.fsdp == dict(checkpoints='full')
        return
    with pytest.raises(UserError, match=f'--fsdp.*{word}.*go together'):
        apply_fsdp(cfg, 'full', 'pytorch')


@needs_fsdp
def test_settings_of_sharding():
    cfg = settings()
    apply_fsdp(cfg, None, 'none')
    assert 'runner_type' not in cfg
    with pytest.raises(UserError, match='dist_train.sh'):
        apply_fsdp(settings(), 'full', 'none')
    for wrong in (dict(checkpoint='full'), 'yes', dict(checkpoints='half')):
        with pytest.raises(UserError, match='full'):
            apply_fsdp(settings(fsdp=wrong), None, 'pytorch')
    cfg = settings(fsdp=dict(checkpoints='sharded'))
    apply_fsdp(cfg, None, 'pytorch')
    assert cfg.fsdp.checkpoints == 'sharded'
    apply_fsdp(cfg, 'full', 'pytorch')  # the command line wins
    assert cfg.fsdp.checkpoints == 'full'


def test_an_older_torch(monkeypatch):
    monkeypatch.setattr('mmhybrid.engine.sharding._fsdp', object)
    with pytest.raises(UserError, match='--fsdp needs torch'):
        apply_fsdp(settings(), 'full', 'pytorch')


# --- folders of pieces ----------------------------------------------------------------------------

@pytest.fixture
def pieces(tmp_path):
    """A checkpoint of three processes, the last with nothing of a short tensor."""
    folder = tmp_path / 'epoch_1.pth'
    folder.mkdir()
    weight, bias = torch.arange(12.).view(4, 3), torch.arange(2.)
    keys = [('state_dict', 'weight'), ('optimizer', 'state', 0, 'exp_avg')]
    torch.save(dict(
        meta=dict(iter=1), state_dict=dict(count=torch.tensor(3)), optimizer=dict(state={}),
        pieces=dict(run=7, ranks=3, shapes=list(zip(keys, [(4, 3), (2,)], strict=True))),
    ), folder / 'rest.pth')
    for rank in range(3):
        parts = weight[2 * rank:2 * rank + 2], bias[rank:rank + 1]
        content = dict(run=7, pieces=list(zip(keys, parts, strict=True)))
        torch.save(content, folder / piece_name(rank, 3))
    return folder


def change(path, **entries):
    torch.save(dict(torch.load(path), **entries), path)


def test_pieces_are_put_together(pieces):
    found = read_checkpoint(pieces)
    assert found['meta'] == dict(iter=1) and 'pieces' not in found
    assert found['state_dict']['weight'].tolist() == torch.arange(12.).view(4, 3).tolist()
    assert found['state_dict']['count'] == 3
    assert found['optimizer']['state'][0]['exp_avg'].tolist() == [0, 1]


def test_pieces_become_one_file(pieces, tmp_path, capsys):
    target = tmp_path / 'whole.pth'
    assert cli.main(['convert', str(pieces), str(target)]) == 0
    assert 'one file of all pieces' in capsys.readouterr().out
    one, several = read_checkpoint(target), read_checkpoint(pieces)
    assert one.keys() == several.keys()
    assert torch.equal(one['state_dict']['weight'], several['state_dict']['weight'])
    assert cli.main(['convert', str(pieces), str(tmp_path / 'x.safetensors')]) == 1
    assert 'become a .pth file' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        cli.main(['convert', '--publish', str(pieces), str(target)])


@pytest.mark.parametrize('damage, said', [
    (lambda folder: (folder / piece_name(1, 3)).unlink(), 'epoch_1.pth lacks piece_1_of_3.pth'),
    (lambda folder: change(folder / piece_name(1, 3), run=8),
     'piece_1_of_3.pth is a piece of another checkpoint'),
    (lambda folder: change(folder / piece_name(2, 3), pieces=[]), 'holds other tensors'),
    (lambda folder: change(folder / piece_name(2, 3), pieces=[1, 2]),
     'not a piece of a checkpoint'),
    (lambda folder: torch.save([1], folder / piece_name(0, 3)), 'not a piece of a checkpoint'),
    (lambda folder: (folder / piece_name(0, 3)).write_bytes(
        (folder / piece_name(0, 3)).read_bytes()[:-200]), 'piece_0_of_3.pth is cut off'),
    (lambda folder: change(folder / piece_name(2, 3), pieces=torch.load(
        folder / piece_name(0, 3))['pieces']), r'state_dict.weight have the shapes .* \(4, 3\)'),
    (lambda folder: change(folder / 'rest.pth', pieces=dict(ranks=0)), 'does not describe'),
    (lambda folder: change(folder / 'rest.pth', pieces=None), 'does not describe'),
    (lambda folder: change(folder / 'rest.pth', state_dict=3), 'has something else'),
    (lambda folder: (folder / 'rest.pth').unlink(), 'is a folder'),
])
def test_damaged_pieces(pieces, damage, said):
    damage(pieces)
    with pytest.raises(WeightsError, match=said):
        read_checkpoint(pieces)
