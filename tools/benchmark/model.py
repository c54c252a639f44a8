"""Time whole models, or their backbones, on made-up images.

    python tools/benchmark/model.py configs/upernet_vmamba_t_ade20k.py --shape 512 512
    python tools/benchmark/model.py --compare A.py B.py --train --batch 2 --csv results.csv

Several models take turns (A B A B) within one process, so that a change of the machine's load hits
all of them. Weights are random; box heads take every region for an object, so that masks are made
as for a crowded image. Data preparation is not timed, suppression and pasting of masks are. A
training step is loss, backward pass and a step of the config's optimizer with rate 0, so that every
step does the same work.

Peak memory holds the weights. On a GPU it is what PyTorch has allocated at most during one call
after the warm-up. On a CPU it is the sum of all tensors that live at one time, seen between
operators: what an operator needs inside is left out, and with --compile nothing is measured.
"""
import argparse
import contextlib
import statistics
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

# In a clone that is not installed the package is two folders up.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from timing import (  # noqa: E402
    CLOCKS,
    ENVIRONMENT,
    PERCENTILES,
    Work,
    append_rows,
    default_clock,
    environment,
    percentiles,
    take_turns,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import mmhybrid.plugin  # noqa: E402, F401
from mmhybrid.analysis.models.source import (  # noqa: E402
    build_model,
    checked_shape,
    find_model,
    takes_samples,
)
from mmhybrid.analysis.models.synthetic import find_everything, synthetic_batch  # noqa: E402
from mmhybrid.cli.actions.running import run_command  # noqa: E402
from mmhybrid.engine.options import OptionsAction  # noqa: E402
from mmhybrid.errors import UserError  # noqa: E402

COLUMNS = (*ENVIRONMENT, 'model', 'pass', 'height', 'width', 'batch', 'dtype', 'compiled',
           'parameters', *PERCENTILES, 'images_per_s', 'peak_mb', 'peak_of', 'time_over_first')
DTYPES = ('float32', 'float16', 'bfloat16')
SHAPES = dict(mmdet=(800, 1280), mmseg=(512, 512))


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config file, or a class and its variant such as '
                                                  'VMambaClassifier:tiny_s1l8')
    parser.add_argument('--compare', nargs='+', default=[], metavar='CONFIG',
                        help='further models that take turns; ratios are to the first of all')
    parser.add_argument('--shape', type=int, nargs='+', metavar='PIXELS',
                        help='height and width (default: detectors 800 1280, segmentors 512 512, '
                             'others 224 224)')
    parser.add_argument('--batch', type=int, default=1, help='images (default: 1)')
    parser.add_argument('--dtype', default='float32',
                        help=f'{", ".join(DTYPES)}; the short ones through autocast')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    parser.add_argument('--compile', action='store_true',
                        help='torch.compile the backbone, or the model where it has none')
    parser.add_argument('--backbone-only', action='store_true')
    parser.add_argument('--train', action='store_true', help='a training step, not inference')
    parser.add_argument('--turns', type=int, default=20, help='timed calls (default: 20)')
    parser.add_argument('--warm-up', type=int, default=3, help='untimed calls before (default: 3)')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument('--clock', choices=CLOCKS,
                        help="cuda on a GPU, else wall; cpu for the process's own time")
    parser.add_argument('--csv', metavar='PATH', help='append the results to this file')
    parser.add_argument('--cfg-options', nargs='+', action=OptionsAction, metavar='KEY=VALUE',
                        help='change all configs, e.g. model.backbone.with_cp=True')
    parser.add_argument('--traceback', action='store_true', help='show full tracebacks')
    return parser.parse_args(argv)


def check(args) -> None:
    """Refuse what cannot be measured, before anything is built."""
    if args.dtype not in DTYPES:
        raise UserError(f'--dtype got {args.dtype!r}; expected one of {", ".join(DTYPES)}.')
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise UserError(f'--device got {args.device!r}, which PyTorch does not know; expected cpu '
                        'or cuda.') from error
    if kind not in ('cpu', 'cuda'):
        raise UserError(f'--device got {args.device!r}; expected cpu or cuda, where time and '
                        'memory are understood.')
    if kind == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda needs a GPU that PyTorch can use, and it sees none '
                        '(`mmhybrid doctor` says why). Use --device cpu.')
    if kind == 'cpu' and args.train and args.dtype == 'float16':
        raise UserError('Training in float16 needs loss scaling and kernels that a CPU does not '
                        'have. Use --dtype bfloat16 or float32, or a GPU.')
    if args.clock == 'cuda' and kind != 'cuda':
        raise UserError('--clock cuda times work on a GPU; this run is on the CPU. Use wall or '
                        'cpu.')
    for name in ('batch', 'turns'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name} got {getattr(args, name)}; expected at least 1.')
    if args.warm_up < 1:
        raise UserError(f'--warm-up got {args.warm_up}; expected at least 1: the first call '
                        'builds tables and picks kernels.')


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that live at the same time, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def hold(self, tensors) -> None:
        """Count storages that are new, until they go."""
        for x in tensors:
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage not in self.known:
                size = storage.nbytes()
                self.known[storage] = size
                self.now += size
                weakref.finalize(storage, self.release, size)
        self.peak = max(self.peak, self.now)

    def release(self, size: int) -> None:
        """A storage has gone."""
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.hold(tree_leaves(out))
        return out


@dataclass
class Case:
    """A model with its input, ready to run.

    Attributes:
        name: of the model.
        shape: (height, width) of the images.
        parameters: their number.
        call: one inference or training step.
        peak: bytes.
        peak_of: what the peak is one of.
    """

    name: str
    shape: tuple[int, int]
    parameters: int
    call: object
    peak: int | None = None
    peak_of: str = ''


def make_case(source, shape, args) -> Case:
    """Build a model, run it until it is warm, and measure its memory."""
    on_gpu = torch.device(args.device).type == 'cuda'
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = build_model(source, args.device, seed=0)
    find_everything(model)
    model.train(args.train)
    if args.compile:
        part = getattr(model, 'backbone', model)
        part.forward = torch.compile(part.forward)
    forward = make_forward(model, shape, args)
    call = make_step(model, forward, source, args) if args.train else forward
    with DefaultScope.overwrite_default_scope(source.scope):
        try:
            for _ in range(args.warm_up):
                call()
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f'{source.name} does not run on {args.batch} images of {shape[0]} x '
                            f'{shape[1]}: {type(error).__name__}: {error}\n'
                            '(--traceback shows where)') from error
    case = Case(source.name, shape, sum(p.numel() for p in model.parameters()), call)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        case.peak, case.peak_of = torch.cuda.max_memory_allocated() - before, 'allocated'
    elif not args.compile:
        case.peak, case.peak_of = live_peak(model, call), 'live tensors'
    return case


def live_peak(model, call) -> int:
    """Bytes that live at most during a call on the CPU, weights and optimizer included."""
    live = LiveTensors()
    live.hold([*model.parameters(), *model.buffers()])
    live.hold(tree_leaves([dict(state) for state in getattr(call, 'optimizer_state', [])]))
    with live:
        call()
    return live.peak


def autocast(args):
    """Context of the forward pass."""
    if args.dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=getattr(torch, args.dtype))


def make_forward(model, shape, args):
    """Give the function of one forward pass: predictions, or the loss in training."""
    if takes_samples(model):
        data = model.data_preprocessor(synthetic_batch(model, shape, args.batch), args.train)

        def run():
            if args.train:
                return model.parse_losses(model(**data, mode='loss'))[0]
            return model(**data, mode='predict')
    else:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(args.batch, 3, *shape, generator=generator).to(args.device)

        def run():
            out = model(images)
            return plain_loss(out) if args.train else out

    def forward():
        with torch.set_grad_enabled(args.train), autocast(args):
            return run()

    return forward


def plain_loss(out):
    """Cross entropy of logits with made-up labels, mean square of maps."""
    if isinstance(out, torch.Tensor) and out.dim() == 2:
        labels = torch.arange(len(out), device=out.device) % out.shape[1]
        return torch.nn.functional.cross_entropy(out.float(), labels)
    return sum(x.float().square().mean() for x in tree_leaves(out))


class TrainingStep:
    """Loss, backward pass and a step of the optimizer, which changes nothing at rate 0."""

    def __init__(self, forward, optimizer, scaler):
        self.forward, self.optimizer, self.scaler = forward, optimizer, scaler

    @property
    def optimizer_state(self):
        """One dictionary per parameter."""
        return list(self.optimizer.state.values())

    def __call__(self):
        """Do one step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def make_step(model, forward, source, args) -> TrainingStep:
    """One training step with the config's optimizer, or AdamW where there is none."""
    recipe = source.config.get('optim_wrapper') if source.config else None
    if recipe and not args.backbone_only:
        keys = ('constructor', 'paramwise_cfg', 'optimizer')
        recipe = dict(type='OptimWrapper', **{k: recipe[k] for k in keys if k in recipe})
        with DefaultScope.overwrite_default_scope(source.scope):
            optimizer = build_optim_wrapper(model, recipe).optimizer
    else:
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.dtype == 'float16')
    return TrainingStep(forward, optimizer, scaler)


def ratio_spread(times, first) -> str:
    """Median of the ratio turn by turn, with its 20th and 80th percentile."""
    cuts = sorted(a / b for a, b in zip(times, first, strict=True))
    if len(cuts) > 1:
        tenths = statistics.quantiles(cuts, n=10, method='inclusive')
        return f'{tenths[4]:.3f} ({tenths[1]:.3f} to {tenths[7]:.3f})'
    return f'{cuts[0]:.3f}'


def main(argv=None):
    """Run the command."""
    args = parse_args(argv)
    specs = [*([args.config] if args.config else []), *args.compare]
    if not specs:
        raise UserError('Nothing to measure: name a config, or several after --compare.')
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.csv:
        try:
            append_rows(args.csv, COLUMNS, [])  # before any time is spent
        except (ValueError, OSError) as error:
            raise UserError(f'--csv {args.csv}: {error}') from error
    clock = args.clock or default_clock(args.device)
    sources = [find_model(spec, args.cfg_options, args.backbone_only) for spec in specs]
    if args.shape:
        shapes = [checked_shape(args.shape)] * len(sources)
    else:
        shapes = [SHAPES.get(source.scope, (224, 224)) for source in sources]
        if len(set(shapes)) > 1:
            raise UserError('The models have different usual image sizes; give --shape.')
    cases = {}
    for i, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        name = source.name if source.name not in cases else f'{source.name} #{i + 1}'
        cases[name] = make_case(source, shape, args)
    times = take_turns({name: Work(case.call, 1) for name, case in cases.items()}, args.turns,
                       clock)
    report(cases, times, args, clock)


def report(cases, times, args, clock) -> None:
    """Print the table and append to the CSV file."""
    what = 'training step' if args.train else 'inference'
    record = environment(args.device, clock)
    first = next(iter(times.values()))
    compiled = ', compiled' if args.compile else ''
    print(f'{what}, batch {args.batch}, {args.dtype}{compiled}, {record["device"]}, torch '
          f'{record["torch"]}, {record["threads"]} threads, {clock} clock, median of {args.turns}')
    width = max(map(len, (*cases, 'model')))
    print(f'{"model":<{width}}  {"image":>11}  {"M params":>8}  {"ms":>9}  {"p20":>9}  {"p80":>9}  '
          f'{"images/s":>9}  {"peak MB":>9}  time over first (p20 to p80)')
    rows = []
    for name, case in cases.items():
        spread = percentiles(times[name])
        speed = args.batch / statistics.median(times[name])
        peak = '' if case.peak is None else f'{case.peak / 1e6:.1f}'
        ratio = ratio_spread(times[name], first)
        image = 'x'.join(map(str, case.shape))
        print(f'{name:<{width}}  {image:>11}  {case.parameters / 1e6:>8.2f}'
              f'  {spread["p50_ms"]:>9}  {spread["p20_ms"]:>9}  {spread["p80_ms"]:>9}'
              f'  {speed:>9.3g}  {peak or "-":>9}  {ratio if len(cases) > 1 else "-"}')
        rows.append({**record, **spread, 'model': name, 'pass': what, 'height': case.shape[0],
                     'width': case.shape[1], 'batch': args.batch, 'dtype': args.dtype,
                     'compiled': int(args.compile), 'parameters': case.parameters,
                     'images_per_s': f'{speed:.4g}', 'peak_mb': peak, 'peak_of': case.peak_of,
                     'time_over_first': ratio.partition(' ')[0]})
    kinds = sorted({case.peak_of for case in cases.values()} - {''})
    print('peak memory: ' + (f'{kinds[0]}, with the weights' if kinds else
                             'not measured for compiled models on a CPU'))
    if args.csv:
        append_rows(args.csv, COLUMNS, rows)


if __name__ == '__main__':
    sys.exit(run_command(main))
