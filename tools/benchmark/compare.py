"""Time any other module against ours: same weights, outputs compared first, then turns A B A B.

    python tools/benchmark/compare.py --factory mine.py:detector --size 832 1344 --dtype float16

FILE:FUNCTION is yours. The function takes nothing and returns a dictionary: the module, which model
of ours it is to be held against, and how names of its weights become names of ours. For example:

    from their_package import their_backbone  # whatever is to be compared

    def detector():
        return dict(
            module=their_backbone(pretrained=True),
            config='MambaVision:tiny',        # CLASS:ARCH, or a config file, whose backbone counts
            options=dict(drop_path_rate=0.0),  # further settings of our class
            # Regular expressions and replacements, all in turn; None leaves a weight out.
            keys=[(r'^levels\\.', 'stages.'), (r'\\.num_batches_tracked$', None)],
        )

`keys` may also be a function of a name that returns our name or None. Every weight of ours must get
a value of its shape, and none may be left over. Both take images (B, 3, H, W); outputs are compared
tensor by tensor in the order in which the modules give them. Modules that differ are not timed, and
the exit code is then 1.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import (
    CLOCKS,
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    append_rows,
    as_graph,
    default_clock,
    environment,
    in_sequence,
    percentiles,
    relative_rms,
    seconds_per_call,
    take_turns,
)
from torch.utils._pytree import tree_leaves

import mmhybrid.models  # noqa: F401  (fills the registry)
from mmhybrid.analysis.models.source import build_model, find_model
from mmhybrid.cli.actions.running import run_command
from mmhybrid.errors import UserError

COLUMNS = (
    *ENVIRONMENT, 'case', 'B', 'H', 'W', 'dtype', 'pass', 'mode', 'module', *PERCENTILES,
    'theirs_over_this', 'peak_MB', 'error',
)
PASSES = ('forward', 'forward+backward')
KEYS = ('module', 'config', 'options', 'keys')
# RMS of the difference of two outputs over RMS of the outputs: two ways of rounding.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.05, 'float16': 0.01}


def load_factory(spec: str) -> dict:
    """What the user's function returns, its entries checked.

    Raises:
        UserError: there is no such file or function, or it returns something else.
    """
    path, _, name = spec.rpartition(':')
    if not path or not name.isidentifier():
        raise UserError(f"--factory got '{spec}', expected FILE:FUNCTION, such as mine.py:detector")
    if not Path(path).is_file():
        raise UserError(f'--factory {spec}: there is no file {path}.')
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None:
        raise UserError(f'--factory {spec}: {path} is not a Python file; its name must end in .py.')
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f'--factory {spec}: {path} has no function {name}.')
    found = function()
    if not isinstance(found, dict) or not {'module', 'config'} <= set(found) <= set(KEYS):
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"--factory {spec} returned {got}, expected a dictionary with 'module' and "
                        f"'config', and perhaps 'options' and 'keys'.")
    if not isinstance(found['module'], torch.nn.Module):
        raise UserError(f"--factory {spec}: 'module' is a {type(found['module']).__name__}, "
                        'expected a torch.nn.Module.')
    return found


def renamed(name: str, keys) -> str | None:
    """Our name for a weight; None for one that has none."""
    if callable(keys):
        return keys(name)
    for pattern, replacement in keys:
        if replacement is None and re.search(pattern, name):
            return None
        if replacement is not None:
            name = re.sub(pattern, replacement, name)
    return name


def load_theirs(ours: torch.nn.Module, theirs: torch.nn.Module, keys) -> None:
    """Give our module the weights of the other.

    Raises:
        UserError: a weight of either has no partner of its shape.
    """
    state, wanted, sources = {}, ours.state_dict(), {}
    for name, value in theirs.state_dict().items():
        own = renamed(name, keys)
        if own is None:
            continue
        if own in state:
            raise UserError(f"'keys' turns both {sources[own]} and {name} into {own}.")
        state[own], sources[own] = value, name
    problems = [f'{name}: ours has it, theirs gives none' for name in wanted if name not in state]
    problems += [f'{name} (theirs: {sources[name]}): ours has none of this name'
                 for name in state if name not in wanted]
    problems += [
        f'{name}: {tuple(value.shape)}, theirs ({sources[name]}) {tuple(state[name].shape)}'
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f'\n  and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise UserError("the weights do not fit; change 'keys' of the factory:\n  "
                        + '\n  '.join(problems[:8]) + more)
    ours.load_state_dict(state)


def outputs(module, x: torch.Tensor, dtype: str) -> list[torch.Tensor]:
    """All tensors that a module returns."""
    with torch.autocast(x.device.type, getattr(torch, dtype), enabled=dtype != 'float32'):
        return [y for y in tree_leaves(module(x)) if isinstance(y, torch.Tensor)]


@torch.no_grad()
def difference(theirs, ours, x: torch.Tensor, dtype: str) -> float:
    """Largest difference of two outputs, in evaluation mode.

    Raises:
        UserError: the outputs are not even alike.
    """
    first, second = (outputs(module.eval(), x, dtype) for module in (theirs, ours))
    shapes = [[tuple(y.shape) for y in ys] for ys in (first, second)]
    if shapes[0] != shapes[1] or not first:
        raise UserError(f'theirs returns tensors of {shapes[0]}, ours of {shapes[1]}; wrap the '
                        'module in the factory so that both return the same.')
    return max(relative_rms(b.float(), a.float()) for a, b in zip(first, second, strict=True))


def step(module, x: torch.Tensor, what: str, dtype: str) -> Callable[[], object]:
    """One call of the pass; the backward pass ends in the gradients of all parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def run():
        with torch.set_grad_enabled(what != 'forward'):
            ys = outputs(module, x, dtype)
            if what == 'forward':
                return ys
            ys = [y for y in ys if y.requires_grad]
            seeds = [torch.ones_like(y) for y in ys]
            return torch.autograd.grad(ys, parameters, seeds, allow_unused=True)

    return run


def peak_megabytes(call: Callable[[], object], device: str) -> str:
    """What one call takes at most beyond what is there before; empty on a CPU."""
    call()
    if device != 'cuda':
        return ''
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return f'{(torch.cuda.max_memory_allocated() - before) / 2**20:.4g}'


def measure(args, modules: dict[str, torch.nn.Module], fixed: dict, failures: Failures):
    """The rows, each pass's as soon as it is known."""
    x = torch.randn(args.batch, 3, *args.size, generator=torch.Generator().manual_seed(0))
    x = x.to(args.device)
    for what in args.passes:
        calls = {name: step(module.train(what != 'forward'), x, what, args.dtype)
                 for name, module in modules.items()}
        peaks = {name: peak_megabytes(call, args.device) for name, call in calls.items()}
        for mode in args.modes:
            works = {}
            for name, call in calls.items():
                with failures.noted(f'{name}: {what}, {mode}'):
                    work = (as_graph if mode == 'graph' else in_sequence)([call])
                    seconds_per_call(work, args.clock)
                    works[name] = work
            times = take_turns(works, args.turns, args.clock, args.seconds)
            stamps = {name: percentiles(values) for name, values in times.items()}
            for name, stamp in stamps.items():
                row = fixed | {'pass': what, 'mode': mode, 'module': name, 'peak_MB': peaks[name]}
                if 'theirs' in stamps:
                    ratio = float(stamps['theirs']['p50_ms']) / float(stamp['p50_ms'])
                    row['theirs_over_this'] = f'{ratio:.3f}'
                yield row | stamp


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--factory', required=True, metavar='FILE:FUNCTION')
    parser.add_argument('--size', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dtype', choices=TOLERANCE, default='float32', help='through autocast')
    parser.add_argument('--passes', nargs='+', choices=PASSES, default=PASSES)
    parser.add_argument('--turns', type=int, default=10, help='of each module (default: 10)')
    parser.add_argument('--seconds', type=float, default=30, metavar='S',
                        help='no further turn after these of one measurement (default: 30)')
    parser.add_argument('--tolerance', type=float, metavar='RMS',
                        help='of the outputs (default: '
                             + ', '.join(f'{v:g} in {k}' for k, v in TOLERANCE.items()) + ')')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default=here)
    parser.add_argument('--clock', choices=CLOCKS, help='default: cuda on a GPU, else wall')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    parser.add_argument('--traceback', action='store_true', help='show full tracebacks')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; use --device cpu')
    args.modes = ('eager', 'graph') if args.device == 'cuda' else ('eager',)
    args.clock = args.clock or default_clock(args.device)
    return args


def main(arguments: list[str] | None = None) -> None:
    """Compare, then measure, print and record.

    Raises:
        UserError: the factory, the weights or the outputs do not fit, or a measurement failed.
    """
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    found = load_factory(args.factory)
    source = find_model(found['config'], backbone_only=found['config'].endswith('.py'))
    source.cfg.update(found.get('options') or {})
    ours = build_model(source, seed=0)
    load_theirs(ours, found['module'], found.get('keys') or [])
    modules = {'theirs': found['module'].to(args.device), 'ours': ours.to(args.device)}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, 3, *args.size, generator=generator).to(args.device)
    error = difference(*modules.values(), x, args.dtype)
    limit = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    if not error <= limit:
        raise UserError(f'the outputs differ by {error:.1e} (RMS), more than {limit:g}, and '
                        'nothing is timed; check the weights and settings, or give --tolerance.')
    print(f'same outputs: they differ by {error:.1e} (RMS)')
    fixed = environment(args.device, args.clock) | {
        'case': args.factory.rpartition(':')[2], 'B': args.batch, 'H': args.size[0],
        'W': args.size[1], 'dtype': args.dtype, 'error': f'{error:.1e}',
    }
    failures = Failures()
    for row in measure(args, modules, fixed, failures):
        shown = ('pass', 'mode', 'module', 'p20_ms', 'p50_ms', 'p80_ms', 'theirs_over_this',
                 'peak_MB')
        print('  '.join(f'{key} {row[key]}' for key in shown if row.get(key)), flush=True)
        if args.csv:
            append_rows(args.csv, COLUMNS, [row])
    if failures:
        raise UserError(f'not measured: {"; ".join(failures)} (see above).')


if __name__ == '__main__':
    sys.exit(run_command(main))
