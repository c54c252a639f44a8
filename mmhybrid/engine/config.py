"""What the command line does to a config."""
from __future__ import annotations

import inspect
import os
import os.path as osp
from pathlib import Path

from mmengine.config import Config, ConfigDict

from mmhybrid.spelling import did_you_mean, nearest_few, suggestion
from mmhybrid.weights import RELEASED, is_known_source, is_remote

from ..errors import UserError
from ..models.backbones.base import DenseBackbone
from ..registry import MODELS, find_type
from .amp import has_accelerator
from .checkpointing import newest_whole
from .config_file import read_config
from .options import check_options
from .settings import check_settings

__all__ = ['load_config', 'redirect_data', 'apply_pretrained', 'apply_amp', 'apply_auto_scale_lr',
           'apply_resume', 'apply_tta', 'apply_out', 'apply_show', 'custom_hooks',
           'ensure_finite_loss', 'ensure_hooks', 'kind_of_hook']


def load_config(path: str, options: dict | None = None, data_root: str | None = None,
                work_dir: str | None = None) -> tuple[Config, list[str]]:
    """Read a config and apply the options every tool has.

    Args:
        path: the config file.
        options: what ``--cfg-options`` gave. ``data_root`` among them means the same as the next
            argument.
        data_root: folder to read the data from instead of the config's own, everywhere.
        work_dir: where logs and checkpoints go; else the config's, else ``work_dirs/<name>``.

    Returns:
        The config, and warnings for the log.

    Raises:
        UserError: if there is no such file, it cannot be read, an option does not fit it, or it
            holds a setting that nothing reads.
    """
    options, notes = dict(options or {}), []
    if not osp.exists(path):
        raise UserError(f'There is no config {path}.{_similar_file(path)}')
    cfg = read_config(path)
    from_options = options.pop('data_root', None)
    if None not in (data_root, from_options) and data_root != from_options:
        raise UserError(f'--data-root says {data_root}, --cfg-options data_root= says '
                        f'{from_options}. Give one of them.')
    data_root = data_root or from_options
    if data_root is not None:
        redirect_data(cfg, data_root)
    check_options(cfg, options)
    names = set(cfg)
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        raise UserError(f'--cfg-options {" ".join(options)} does not fit {path}. '
                        f'{type(error).__name__}: {error}') from error
    notes += check_settings(cfg, path, names, options)
    cfg.work_dir = str(work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(path))[0]))
    return cfg, notes


def _similar_file(path: str) -> str:
    folder = Path(path).parent
    names = [entry.name for entry in folder.glob('*.py')] if folder.is_dir() else []
    if not names:
        return f' The folder {folder} holds no configs.'
    near = nearest_few(Path(path).name, names, cutoff=0.5)
    return did_you_mean(*(str(folder / name) for name in near))


def redirect_data(cfg: Config, new: str) -> int:
    """Let every data set, evaluator and pipeline read below ``new``; returns how many settings.

    A config composes its paths from ``data_root`` while it is read, so a later change of that
    variable alone changes nothing. Here every text in the config that is the old folder, or a
    path below it, is moved.
    """
    old = cfg.get('data_root') or _common_root(cfg)
    stem = osp.normpath(old)
    if stem in ('.', '/', ''):
        raise UserError(f'The config reads its data from {old!r}, which is too general to be '
                        'replaced by --data-root. Set data_root of each data set with '
                        '--cfg-options.')
    new = osp.expanduser(str(new)).rstrip('/') or '/'
    count, done = 0, {}

    def moved(value):
        nonlocal count
        if isinstance(value, str):
            path = value[2:] if value.startswith('./') else value
            rest = path[len(stem):]
            if not path.startswith(stem) or rest[:1] not in ('', '/'):
                return value
            count += 1
            return new + rest
        if id(value) in done:  # one object may stand in two places, e.g. val and test
            return done[id(value)]
        if isinstance(value, dict):
            done[id(value)] = value
            for key in list(value):
                value[key] = moved(value[key])
        elif isinstance(value, list):
            done[id(value)] = value
            value[:] = [moved(item) for item in value]
        elif isinstance(value, tuple) and type(value) is tuple:
            return tuple(moved(item) for item in value)
        return value

    for key in list(cfg):
        if key not in ('model', 'work_dir', 'load_from', 'resume', 'pretrained'):
            cfg[key] = moved(cfg[key])
    cfg.data_root = new + ('/' if old.endswith('/') else '')
    if not count:
        raise UserError(f'Nothing in the config reads from its data_root {old!r}, so --data-root '
                        'has no effect.')
    return count


def _common_root(cfg: Config) -> str:
    roots = set()
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        stack = [cfg.get(key)]
        while stack:
            node = stack.pop()
            if isinstance(node, dict):
                if isinstance(node.get('data_root'), str):
                    roots.add(node['data_root'])
                stack.extend(node.values())
            elif isinstance(node, (list, tuple)):
                stack.extend(node)
    if len(roots) != 1:
        found = 'none' if not roots else ', '.join(sorted(roots))
        raise UserError('--data-root needs one folder to replace: the variable data_root, or the '
                        f'same data_root in all data sets. Found: {found}.')
    return roots.pop()


def apply_pretrained(cfg: Config, path: str | None) -> list[str]:
    """Start the backbone from ``path`` (or the config's ``pretrained``); returns warnings."""
    path = path or cfg.get('pretrained')
    backbone = cfg.model.get('backbone')
    if path:
        if backbone is None:
            raise UserError('--pretrained is for model.backbone, and this model has none. Use '
                            '--cfg-options load_from=... instead.')
        elsewhere = is_remote(path) or is_known_source(path)
        if not elsewhere and not osp.isfile(osp.expanduser(path)):
            raise UserError(f'--pretrained {path} does not exist.{_published(cfg)}')
        path = path if elsewhere else osp.expanduser(path)
        cfg.pretrained = path
        for node in (cfg.model, backbone):  # two files at once are an error, or the other one wins
            if node.get('pretrained'):
                node.pretrained = None
        argument = _weights_argument(backbone)
        backbone[argument] = path if argument != 'init_cfg' else ConfigDict(
            type='Pretrained', checkpoint=path)
        return []
    if backbone is None or has_weights(cfg):
        return []
    return ['Training starts from random weights.' + _published(cfg)]


def has_weights(cfg: Config) -> bool:
    """Whether anything says which weights the backbone starts from."""
    backbone = cfg.model.get('backbone') or {}
    return bool(cfg.get('load_from') or cfg.get('resume') or backbone.get('pretrained')
                or cfg.model.get('pretrained') or backbone.get(_weights_argument(backbone)))


def _weights_argument(backbone: ConfigDict) -> str:
    """The setting that names a backbone's weights: drop-ins take init_cfg without effect."""
    kind = find_type(backbone, MODELS, 'mmhybrid')
    if isinstance(kind, type) and issubclass(kind, DenseBackbone):
        for name in ('pretrained', 'pretrained_ckpt'):
            if name in inspect.signature(kind).parameters:
                return name
    return 'init_cfg'


def _published(cfg: Config) -> str:
    name = cfg.get('published_checkpoint')
    if not name:
        return ' To start the backbone from a file, pass --pretrained PATH.'
    row = RELEASED.get(name) if isinstance(name, str) else None
    if row is None:
        raise UserError(f'published_checkpoint={name!r} is not a short name of released weights; '
                        f'{suggestion(str(name), RELEASED)}.')
    return (f' The published recipe starts from {row.file} (licence {row.license}): --pretrained '
            f'{row.name} fetches it from {row.address} , or download it and pass its path.')


def apply_amp(cfg: Config, wanted: bool) -> list[str]:
    """Turn mixed precision on if ``wanted``, and make the config's own start on a CPU."""
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    name = kind if isinstance(kind, str) else kind.__name__
    if not wanted:
        if name == 'AmpOptimWrapper' and not has_accelerator():
            cfg.optim_wrapper.type = 'mmhybrid.AmpOptimWrapper'
        return []
    if name.rpartition('.')[2] == 'AmpOptimWrapper':
        if not has_accelerator():
            cfg.optim_wrapper.type = 'mmhybrid.AmpOptimWrapper'
        if cfg.optim_wrapper.get('dtype', 'float16') is None:  # ours: switched off
            cfg.optim_wrapper.dtype = 'float16'
        return []
    if name.rpartition('.')[2] != 'OptimWrapper':
        raise UserError(f'--amp replaces OptimWrapper, but the config uses {name}. Set '
                        'optim_wrapper in the config instead.')
    cfg.optim_wrapper.type = 'mmhybrid.AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('dtype', 'float16')
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    return []


def apply_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate with the real batch size."""
    setting = cfg.get('auto_scale_lr')
    if not setting or 'base_batch_size' not in setting:
        raise UserError(
            '--auto-scale-lr needs auto_scale_lr = dict(enable=False, base_batch_size=N) in the '
            'config, where N is the batch size (all GPUs together) that the learning rate was '
            'chosen for.')
    setting.enable = True


def apply_resume(cfg: Config, resume: str | None) -> list[str]:
    """``resume``: None, "auto" (the latest checkpoint in work_dir) or a path; returns notes.

    Processes that a launcher starts again go on from what they have written since it started.
    """
    written = _since_the_start(cfg.work_dir)
    if written is not None:
        cfg.resume, cfg.load_from = True, written
        return [f'Start {int(os.environ[RESTARTS]) + 1} of this job: it goes on from {written}']
    if resume is None and not cfg.get('resume'):
        return []
    if resume in (None, 'auto'):
        cfg.resume = True
        if resume is None and cfg.get('load_from'):
            return []
        cfg.load_from, notes = newest_whole(cfg.work_dir)
        if cfg.load_from is None:
            cfg.resume = False
            return [f'--resume: {cfg.work_dir} holds no checkpoint yet, so training starts anew.']
        return notes
    cfg.resume, cfg.load_from = True, resume
    return []


RESTARTS, JOB_START = 'TORCHELASTIC_RESTART_COUNT', 'MMHYBRID_JOB_START'


def _since_the_start(work_dir: str) -> str | None:
    """The newest checkpoint, if torchrun has restarted this job and it is of this job."""
    start = os.environ.get(JOB_START)
    if os.environ.get(RESTARTS, '0') == '0' or start is None:
        return None
    path, _ = newest_whole(work_dir)
    return path if path is not None and osp.getmtime(path) >= float(start) else None


FLIP_TTA = dict(
    type='TestTimeAug',
    transforms=[
        [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
        [dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                               'scale_factor', 'flip', 'flip_direction'))],
    ])


def apply_tta(cfg: Config) -> list[str]:
    """Test with augmentation: the config's, or both mirror images of each picture (detection)."""
    notes = []
    dataset = _innermost(cfg.test_dataloader.dataset)
    if cfg.get('default_scope') == 'mmdet':
        cfg.setdefault('tta_model', dict(type='DetTTAModel', tta_cfg=dict(
            nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
        if 'tta_pipeline' not in cfg:
            loading = [step for step in dataset.pipeline
                       if step['type'].rpartition('.')[2] not in ('LoadAnnotations',
                                                                  'PackDetInputs')]
            cfg.tta_pipeline = [*loading, FLIP_TTA]
        # mmdet's mask heads fail on a mirrored image, and its merging refuses masks.
        roi_head = cfg.model.get('roi_head')
        if roi_head is not None and roi_head.get('mask_head') is not None:
            roi_head.update(mask_head=None, mask_roi_extractor=None)
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [
            cfg.test_evaluator]
        for evaluator in evaluators:
            metric = evaluator.get('metric')
            if metric and metric != 'bbox' and set(metric) != {'bbox'}:
                evaluator.metric = ['bbox']
                notes.append('--tta merges boxes only (mmdet has no rule for masks), so box AP '
                             'alone is computed.')
    else:
        missing = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
        if missing and cfg.get('default_scope') != 'mmseg':
            raise UserError(f'--tta needs {" and ".join(missing)} in the config. Detectors and '
                            'segmentors of this package can be tested with it, classifiers cannot: '
                            'leave --tta out.')
        if missing:
            raise UserError(f'--tta needs {" and ".join(missing)} in the config. '
                            'configs/_base_/datasets/ade20k.py and configs/_base_/runtime_seg.py '
                            'show both.')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    return notes


def _innermost(dataset):
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def apply_out(cfg: Config, out: str) -> None:
    """Write all predictions to the pickle file ``out``."""
    if not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out must end with .pkl or .pickle, got {out}.')
    os.makedirs(osp.dirname(osp.abspath(out)), exist_ok=True)
    kinds = dict(mmdet='DumpDetResults', mmseg='mmhybrid.DumpSegmentation')
    dump = dict(type=kinds.get(cfg.get('default_scope'), 'DumpResults'), out_file_path=out)
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [
        cfg.test_evaluator]
    cfg.test_evaluator = [*evaluators, dump]


def apply_show(cfg: Config, show: bool, folder: str | None, wait: float) -> list[str]:
    """Draw predictions on the screen and/or into ``folder``."""
    if cfg.get('default_scope') not in ('mmdet', 'mmseg'):
        raise UserError('--show and --show-dir draw detections and segmentations. Predictions of '
                        'a classifier are numbers: --out FILE.pkl writes them.')
    det = cfg.get('default_scope') == 'mmdet'
    cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
    hook = cfg.default_hooks.setdefault('visualization', ConfigDict(
        type='DetVisualizationHook' if det else 'SegVisualizationHook'))
    hook.draw, hook.interval = True, 1
    if show:
        hook.show, hook.wait_time = True, wait
    if not folder:
        return []
    folder = osp.abspath(folder)
    if det:
        hook.test_out_dir = folder
        return [f'Pictures of the predictions go to {folder}']
    visualizer = cfg.setdefault('visualizer', ConfigDict(type='SegLocalVisualizer'))
    visualizer.save_dir = folder
    if not visualizer.get('vis_backends'):
        visualizer.vis_backends = [dict(type='LocalVisBackend')]
    return [f'Pictures of the predictions go to {osp.join(folder, "vis_data", "vis_image")}']


def custom_hooks(cfg: Config) -> list:
    """The list ``custom_hooks`` of a config, empty where it has none."""
    hooks = cfg.get('custom_hooks') or []
    if not isinstance(hooks, (list, tuple)):
        raise UserError(f'custom_hooks must be a list such as [dict(type="EMAHook")], got {hooks}.')
    return list(hooks)


def kind_of_hook(hook) -> str:
    """Name of a hook's class; a config in pure Python has the class itself."""
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]


def ensure_hooks(cfg: Config, *hooks: str) -> None:
    """Add hooks that the tools rely on to ``custom_hooks`` unless they are there."""
    present = custom_hooks(cfg)
    names = {kind_of_hook(hook) for hook in present}
    cfg.custom_hooks = present + [
        dict(type=hook) for hook in hooks if hook.rpartition('.')[2] not in names]


def ensure_finite_loss(cfg: Config) -> None:
    """Watch the loss, with the settings of ``default_hooks.finite_loss``; None there does not."""
    if any(kind_of_hook(hook) == 'FiniteLossHook' for hook in custom_hooks(cfg)):
        return
    cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
    setting = cfg.default_hooks.setdefault('finite_loss', ConfigDict())
    if setting is None or setting is False:
        del cfg.default_hooks.finite_loss  # mmengine switches off its own hooks only
    elif isinstance(setting, dict):
        setting.setdefault('type', 'mmhybrid.FiniteLossHook')
    else:
        raise UserError('default_hooks.finite_loss must be a dict of settings such as '
                        f'dict(patience=3), or None to switch it off, got {setting!r}.')
