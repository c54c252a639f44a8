"""Vim against DeiT from 224 to 1248 pixels: images per second, memory and cost (Vim's claim).

    python tools/benchmark/resolutions.py --sizes 224 384 --csv vim.csv --plot vim.png
    python tools/benchmark/resolutions.py --count-only
    python tools/benchmark/resolutions.py --fpn --csv vim.csv --plot vim_fpn.png

The paper says that Vim-Ti extracts features of 1248 x 1248 images 2.8 times faster than DeiT-Ti
and with 86.8 % less memory (arXiv 2401.09417, Figures 1, 3 and 4). Its DeiT keeps whole matrices of
attention; with PyTorch's fused kernels, which are a second row here, memory no longer grows with
their square. Networks have random weights, and take turns (A B A B) at each size. Sizes are cut
to whole patches of 16, so that 738 is read as 736, in 46 x 46 patches, as there.

Multiply-accumulates and memory are counted from shapes on any machine: memory as the allocator of a
GPU would have it in use at the peak of a forward pass, float32, without workspaces. On a GPU the
peak is measured too. On a GPU a network gets the largest batch up to --batch, halved until it fits.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import (
    CLOCKS,
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    TimeLimit,
    append_rows,
    default_clock,
    environment,
    in_sequence,
    percentiles,
    seconds_per_call,
    take_turns,
)
from torch import nn

from mmhybrid.analysis import count_macs
from mmhybrid.analysis.memory import Memory
from mmhybrid.analysis.pretended_gpu import pretended_gpu
from mmhybrid.models.backbones.vim import Vim, make_pyramid

SIZES = (224, 384, 512, 640, 738, 1024, 1248)
MODELS = ('Vim', 'DeiT', 'DeiT fused')
WIDTHS = {'tiny': 192, 'small': 384, 'base': 768}
HEADS = {'tiny': 3, 'small': 6, 'base': 12}
PATCH = 16
COLUMNS = (
    *ENVIRONMENT, 'model', 'fpn', 'size', 'tokens', 'B', 'dtype', *PERCENTILES, 'images_per_s',
    'peak_MB', 'counted_B', 'counted_MB', 'counted_GMACs',
)


class DeiT(nn.Module):
    """DeiT of timm as a backbone: tokens of the last block, or four maps.

    Args:
        variant: 'tiny', 'small' or 'base'.
        side: of the images in pixels.
        fused: whether attention goes through PyTorch's fused kernels.
        fpn: whether four maps are brought to strides 4 to 32, as Vim's are.
    """

    def __init__(self, variant: str, side: int, fused: bool, fpn: bool):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.net = VisionTransformer(
            img_size=side, patch_size=PATCH, embed_dim=WIDTHS[variant], depth=12,
            num_heads=HEADS[variant], num_classes=0)
        for block in self.net.blocks:
            block.attn.fused_attn = fused
        self.pyramid = nn.ModuleList(make_pyramid(WIDTHS[variant], PATCH)) if fpn else None

    def forward(self, x: torch.Tensor):
        """Tokens (B, L, C), or four maps."""
        if self.pyramid is None:
            return self.net.forward_features(x)
        maps = self.net.get_intermediate_layers(x, n=(2, 5, 8, 11), reshape=True)
        return [level(y) for level, y in zip(self.pyramid, maps, strict=True)]


def build(model: str, variant: str, side: int, fpn: bool) -> nn.Module:
    """A network for images of this side, in eval mode."""
    torch.manual_seed(0)
    if model != 'Vim':
        return DeiT(variant, side, model == 'DeiT fused', fpn).eval()
    options = {} if fpn else dict(out_indices=(23,))
    return Vim(variant, img_size=side, pyramid=fpn, drop_path_rate=0.0, **options).eval()


def counted_macs(model: str, variant: str, side: int, fpn: bool) -> int:
    """Multiply-accumulates of one image."""
    with torch.device('meta'):
        network = build(model, variant, side, fpn)
    for module in network.modules():
        if hasattr(module, 'backend'):
            module.backend = 'torch'  # shapes need no device for it
    image = torch.empty(1, 3, side, side, device='meta')
    return sum(record.macs for record in count_macs(network, lambda: network(image)))


def counted_bytes(model: str, variant: str, side: int, fpn: bool, batch: int) -> int:
    """Bytes in use at the peak of a forward pass on a GPU, in float32."""
    with torch.device('meta'):
        network = build(model, variant, side, fpn)
    memory = Memory()
    with pretended_gpu(), torch.no_grad():
        network.to_empty(device='cuda')
        images = torch.empty(batch, 3, side, side, device='cuda')
        memory.hold([*network.parameters(), *network.buffers(), images], 'before')
        with memory:
            network(images)
    return memory.peak.bytes


def largest(call: Callable[[torch.Tensor], object], batch: int, side: int, device: str
            ) -> torch.Tensor | None:
    """Images of the largest batch, halved until it fits; None where not even one does."""
    while batch:
        try:
            x = torch.randn(batch, 3, side, side, device=device)
            call(x)
            return x
        except torch.cuda.OutOfMemoryError:
            x = None
            torch.cuda.empty_cache()
            batch //= 2
    return None


def peak_of(call: Callable[[], object], device: str) -> str:
    """Megabytes in use at the peak of a call, weights and images included; GPU only."""
    if device != 'cuda':
        return ''
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return f'{torch.cuda.max_memory_allocated() / 2**20:.5g}'


def measure(args, size: int, record: dict, failures: Failures) -> Iterator[dict]:
    """The rows of one size."""
    side = size // PATCH * PATCH
    fixed = record | dict(fpn=int(args.fpn), size=size, tokens=(side // PATCH) ** 2,
                          counted_B=args.counted_batch)
    rows = {}
    for model in args.models:
        with failures.noted(f'{model} at {size}, counted'):
            macs = counted_macs(model, args.variant, side, args.fpn)
            rows[model] = fixed | dict(
                model=f'{model} {args.variant}', counted_GMACs=f'{macs / 1e9:.4g}')
            if not args.no_memory:
                held = counted_bytes(model, args.variant, side, args.fpn, args.counted_batch)
                rows[model]['counted_MB'] = f'{held / 2**20:.5g}'
    works = {}
    for model in () if args.count_only else rows:
        with failures.noted(f'{model} at {size}'), torch.no_grad():
            network = build(model, args.variant, side, args.fpn).to(args.device)
            x = largest(network, args.batch, side, args.device)
            if x is None:
                print(f'{model} at {size}: one image does not fit', flush=True)
                continue
            rows[model] |= dict(B=len(x), dtype='float32', peak_MB=peak_of(
                lambda network=network, x=x: network(x), args.device))
            # On a GPU two networks at once would not fit what one does.
            own = {model: in_sequence([lambda network=network, x=x: network(x)])}
            if args.device == 'cuda':
                seconds_per_call(own[model], args.clock)
                times = take_turns(own, args.turns, args.clock, args.seconds)
                rows[model] |= speed(times[model], len(x))
                del network, x, own
                torch.cuda.empty_cache()
            else:
                works |= own
    with torch.no_grad():
        for model, seconds in take_turns(works, args.turns, args.clock, args.seconds).items():
            rows[model] |= speed(seconds, rows[model]['B'])
    yield from rows.values()


def speed(seconds: list[float], batch: int) -> dict[str, str]:
    """The columns of time."""
    columns = percentiles(seconds)
    return columns | dict(images_per_s=f"{batch / float(columns['p50_ms']) * 1e3:.4g}")


def plot(rows: list[dict], path: Path, title: str) -> None:
    """A curve per network: images per second, memory, cost."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    def value(row, *names):
        return next((float(row[name]) for name in names if row.get(name)), None)

    panels = (
        ('images per second', lambda r: value(r, 'images_per_s')),
        ('counted memory in GB, batch {counted_B}', lambda r: (value(r, 'counted_MB') or 0) / 1024),
        ('multiply-accumulates in G per image', lambda r: value(r, 'counted_GMACs')),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.6), layout='constrained')
    for axis, (name, of_row) in zip(axes, panels, strict=True):
        for model in dict.fromkeys(row['model'] for row in rows):
            points = [(row['size'], of_row(row)) for row in rows if row['model'] == model]
            points = [point for point in points if point[1]]
            if points:
                axis.plot(*zip(*points, strict=True), marker='o', label=model)
        axis.set(xlabel='side of the image in pixels', title=name.format(**rows[0]))
        axis.grid(alpha=0.3)
    axes[0].set_yscale('log')
    axes[-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summary(rows: list[dict]) -> str:
    """What the claim comes to at the largest size, with what is known of it."""
    last = max(row['size'] for row in rows)
    at = {row['model'].rpartition(' ')[0]: row for row in rows if row['size'] == last}
    lines = [f'at {last} pixels:']
    for peer in ('DeiT', 'DeiT fused'):
        if 'Vim' not in at or peer not in at:
            continue
        vim, other = at['Vim'], at[peer]
        said = []
        if vim.get('images_per_s') and other.get('images_per_s'):
            said.append(f"Vim is {float(vim['images_per_s']) / float(other['images_per_s']):.2f} "
                        'times as fast')
        for column, name in (('peak_MB', 'measured'), ('counted_MB', 'counted')):
            if vim.get(column) and other.get(column):
                more = float(vim[column]) / float(other[column]) - 1
                said.append(f"takes {abs(more):.1%} {'more' if more > 0 else 'less'} memory "
                            f'({name})')
        lines.append(f"  against {peer}: {', '.join(said) or 'nothing to compare'}")
    return '\n'.join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', type=int, default=SIZES, metavar='PIXELS')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS)
    parser.add_argument('--variant', choices=WIDTHS, default='tiny')
    parser.add_argument('--fpn', action='store_true', help='with the pyramid of the segmentors')
    parser.add_argument('--count-only', action='store_true', help='time nothing')
    parser.add_argument('--batch', type=int, help='images (default: 64 on a GPU, 1 on a CPU)')
    parser.add_argument('--counted-batch', type=int, default=64, metavar='N',
                        help='for which memory is counted (default: 64)')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=60, metavar='S',
                        help='no further turn after these at one size (default: 60)')
    parser.add_argument('--minutes', type=float, metavar='M', help='begin no further size after')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument('--device', choices=('cpu', 'cuda'),
                        default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--clock', choices=CLOCKS, help='default: cuda on a GPU, else wall')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    parser.add_argument('--plot', metavar='PATH', help='write a picture')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; use --device cpu.')
    if min(args.sizes) < 2 * PATCH:
        parser.error(f'--sizes got {min(args.sizes)}; expected at least {2 * PATCH} pixels.')
    args.clock = args.clock or default_clock(args.device)
    args.batch = args.batch or (64 if args.device == 'cuda' else 1)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record; return 1 when something failed."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with pretended_gpu():
            args.no_memory = False
    except RuntimeError as error:
        args.no_memory = True
        print(f'memory is not counted: {error}')
    record = environment(args.device, args.clock)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    rows, failures, limit = [], Failures(), TimeLimit(args.minutes)
    for size in sorted(args.sizes):
        if limit.passed(f'{size} pixels'):
            continue
        for row in measure(args, size, record, failures):
            shown = ('model', 'size', 'tokens', 'B', 'images_per_s', 'peak_MB', 'counted_MB',
                     'counted_GMACs')
            print('  '.join(f'{key} {row[key]}' for key in shown if row.get(key)), flush=True)
            rows.append(row)
            if args.csv:
                append_rows(args.csv, COLUMNS, [row])
    if rows:
        print(summary(rows))
        if args.plot:
            plot(rows, Path(args.plot), f"{record['device']}, torch {record['torch']}, "
                 f"float32{', with FPN' if args.fpn else ''}, {record['commit']}")
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
