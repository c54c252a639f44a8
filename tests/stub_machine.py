"""A machine whose driver takes notes: launches of Triton's kernels without a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

FOLDER = Path(__file__).parents[1] / 'tools' / 'benchmark'
_spec = importlib.util.spec_from_file_location('host', FOLDER / 'host.py')
host = importlib.util.module_from_spec(_spec)
sys.modules['host'] = host
_spec.loader.exec_module(host)


class Machine(host.Stub):
    """Notes every launch as (function, grid, arguments), with addresses for tensors."""

    def __init__(self):
        super().__init__()
        self.notes, self.functions, self.notice = [], 0, None
        self.metadata = SimpleNamespace(
            global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False, num_ctas=1,
        )

    def launch(self, *arguments):
        if self.notice is not None:
            notice, self.notice = self.notice, None
            try:
                return notice(*arguments)
            finally:
                self.notice = notice
        head, tail = arguments[:13], arguments[13:]
        assert head[3] == self.stream and head[9] == (1, 1, 0)
        tail = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in tail]
        self.notes.append((head[4], head[:3], tail))
        if head[11] is not None:
            head[11](head[10])

    stream = 7

    def compile(self, src, target, options):
        """A compiled kernel that has nothing but a number."""
        self.functions += 1
        runner = self.launcher_cls(src, self.metadata)
        return SimpleNamespace(
            function=self.functions, packed_metadata=(1, 1, 0), run=runner, src=src,
            launch_metadata=lambda grid, stream, *arguments: 'metadata',
        )
