"""Compile the benchmarks' kernels on a machine without a GPU, for one that has one.

    python tools/benchmark/kernel_cache.py fill work_dirs/kernels.tar.gz --only 'scan|mixer'
    KERNELS=work_dirs/kernels.tar.gz OUT=results bash tools/benchmark/gpu_run.sh 10

fill runs jobs of gpu_jobs.py under the driver that takes notes (host.py) and packs what Triton has
compiled. Take the same Python (3.11 or 3.12, ...) and the same Triton build as on the machine with
the GPU, and the same state of this repository: Triton finds an entry by its own files, the source
of a kernel, the kinds of its arguments, options, the version of ptxas and the GPU's generation. No
path is among them, and a driver is not; these keys were equal on a machine with an H200. What costs
the time there all the same is closed here:

- An entry names its files by absolute paths. Moved into another folder it is found, seems empty,
  and is compiled again; unpack writes the paths anew.
- How a kernel is launched is a C module of its own, one for each signature, which the driver that
  takes notes does not need. fill builds them against an empty libcuda, and Triton's own module too.

Of an entry only the machine code and its description are packed.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

_KEPT = ('.cubin', '.json', '.so')
_GROUP = '__grp__'


def pack(folder: Path, archive: Path) -> int:
    """Pack a cache of Triton; returns the number of entries. The archive is never half there."""
    part = archive.with_name(archive.name + '.part')
    entries = sorted(path for path in folder.iterdir() if path.is_dir())
    with tarfile.open(part, 'w:gz', compresslevel=6) as tar:
        for path in (file for entry in entries for file in sorted(entry.iterdir())):
            if path.suffix in _KEPT and path.is_file():
                tar.add(path, f'{path.parent.name}/{path.name}')
    part.replace(archive)
    return len(entries)


def unpack(archive: Path, folder: Path) -> int:
    """Unpack an archive into a cache of Triton; returns the number of its entries.

    Entries that are there already stay.

    Raises:
        ValueError: for a member that :func:`pack` would not have written.
    """
    found = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            entry, _, name = member.name.partition('/')
            if not (member.isfile() and re.fullmatch(r'\w+', entry) and name.endswith(_KEPT)
                    and re.fullmatch(r'[\w.-]+', name)):
                raise ValueError(f'{archive} holds {member.name!r}, which is not a file of a cache '
                                 'of kernels; expected what kernel_cache.py fill has written')
            data, target = tar.extractfile(member).read(), folder / entry / name
            if name.startswith(_GROUP):
                data = _moved(data, target.parent)
            found.add(entry)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f'{name}.{os.getpid()}')
                part.write_bytes(data)
                part.replace(target)
    return len(found)


def _moved(group: bytes, folder: Path) -> bytes:
    """A list of an entry's files, as it reads in another folder."""
    files = json.loads(group)['child_paths']
    kept = {name: str(folder / name) for name in files if name.endswith(_KEPT)}
    return json.dumps({'child_paths': kept}).encode()


@contextlib.contextmanager
def launchers_built() -> Iterator[None]:
    """A context in which Triton builds its C modules without a driver; none of them is loaded."""
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime import build

    with tempfile.TemporaryDirectory() as folder:
        empty = str(Path(folder) / 'libcuda.so.1')
        subprocess.run([os.environ.get('CC', 'cc'), '-shared', '-o', empty, '-x', 'c', os.devnull],
                       check=True)
        driver.library_dirs.cache_clear()
        before, knobs.nvidia.libcuda_path = knobs.nvidia.libcuda_path, folder
        try:
            with mock.patch.object(build, '_load_module_from_path', mock.Mock()):
                driver.compile_module_from_src(
                    src=(Path(driver.dirname) / 'driver.c').read_text(), name='cuda_utils',
                    library_dirs=driver.library_dirs(), include_dirs=driver.include_dirs,
                    libraries=driver.libraries)
                yield
        finally:
            knobs.nvidia.libcuda_path = before
            driver.library_dirs.cache_clear()


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """A context in which layers compute nothing but the shape of what they would give.

    Products and convolutions of whole networks take a CPU minutes, in 16 bits even longer, and
    kernels are the same whatever the numbers are.
    """
    import torch
    import torch.nn.functional as F

    convolution = F.conv2d

    def last(x):
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()

    def shaped(real):
        class Shaped(torch.autograd.Function):
            @staticmethod
            def forward(ctx, options, *tensors):
                ctx.save_for_backward(*tensors)
                dtype = tensors[0].dtype
                if torch.is_autocast_enabled('cpu'):
                    dtype = torch.get_autocast_dtype('cpu')
                found = real(*(None if x is None else x.to('meta', dtype) for x in tensors),
                             **options)
                if real is convolution and any(map(last, tensors[:2])):  # as on a GPU
                    found = found.contiguous(memory_format=torch.channels_last)
                return torch.empty_strided(found.shape, found.stride(), dtype=dtype)

            @staticmethod
            def backward(ctx, _):
                return None, *(None if x is None else torch.zeros_like(x)
                               for x in ctx.saved_tensors)

        return Shaped

    linear, conv = shaped(F.linear), shaped(convolution)
    names = 'stride', 'padding', 'dilation', 'groups'
    with (
        mock.patch.object(F, 'linear', lambda x, w, b=None: linear.apply({}, x, w, b)),
        mock.patch.object(F, 'conv2d', lambda x, w, b=None, *more, **options: conv.apply(
            dict(zip(names, more, strict=False)) | options, x, w, b)),
        mock.patch.object(F, 'scaled_dot_product_attention', lambda q, k, v: q.clone()),
    ):
        yield


def fill(args) -> int:
    """Compile one process's share of the jobs, or start the processes and pack their work."""
    if args.worker:
        return compile_share(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, 'fill', str(args.archive), '--only', args.only,
                   '--folder', str(folder)]
        workers = [subprocess.Popen([*command, '--worker', f'{i}/{args.processes}'])
                   for i in range(args.processes)]
        codes = [worker.wait() for worker in workers]
        args.archive.parent.mkdir(parents=True, exist_ok=True)
        count = pack(folder, args.archive)
    size = args.archive.stat().st_size / 1e6
    print(f'{args.archive}: {count} entries, {size:.1f} MB', flush=True)
    return int(any(codes))


def compile_share(args) -> int:
    """Run jobs under the driver that takes notes."""
    os.environ['TRITON_CACHE_DIR'] = str(args.folder)
    import gpu_jobs
    import host
    import torch
    from timing import Failures

    torch.set_num_threads(1)
    number, count = map(int, args.worker.split('/'))
    failures, stub = Failures(), host.Stub(build_launchers=True)
    autograd = torch.autograd.set_multithreading_enabled(False)
    with launchers_built(), only_shapes(), stub.installed(), autograd:
        jobs = [(name, job) for name, job in gpu_jobs.compile_jobs('cpu', False)
                if re.search(args.only, name)]
        for name, job in jobs[number::count]:
            started, before = time.monotonic(), stub.binaries
            with failures.noted(name):
                job()
            print(f'{time.monotonic() - started:6.1f} s, {stub.binaries - before} kernels: {name}',
                  flush=True)
    return int(bool(failures))


def main(arguments=None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    filling = commands.add_parser('fill', help='compile and pack')
    filling.add_argument('archive', type=Path)
    filling.add_argument('--only', default='', metavar='REGEX', help='names of jobs that match')
    filling.add_argument('--folder', help='of the cache meanwhile; what it holds stays')
    filling.add_argument('--processes', type=int, default=1)
    filling.add_argument('--worker', help=argparse.SUPPRESS)
    filling.set_defaults(run=fill)
    unpacking = commands.add_parser('unpack', help='put it where Triton looks')
    unpacking.add_argument('archive', type=Path)
    unpacking.add_argument('folder', type=Path, help='TRITON_CACHE_DIR of the runs to come')
    unpacking.set_defaults(run=lambda args: print(f'{unpack(args.archive, args.folder)} entries'))
    args = parser.parse_args(arguments)
    return args.run(args) or 0


if __name__ == '__main__':
    sys.exit(main())
