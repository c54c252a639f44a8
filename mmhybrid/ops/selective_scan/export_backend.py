"""The selective scan as one operator that an exporter finds and translates.

``torch.export`` sees one node where any other form is hundreds, for every length.
:mod:`mmhybrid.export.scan` writes it in standard operators of ONNX.  Where nobody exports, the
operator is the ``torch`` backend, so a model can be run as it will be exported.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .torch_backend import selective_scan_torch

__all__ = ['selective_scan_export']

_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_library.define(
    'export_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, bool delta_softplus, bool reverse) -> Tensor'
)


@torch.library.impl(_library, 'export_scan', 'CompositeExplicitAutograd')
def _scan(*arguments) -> Tensor:
    return selective_scan_torch(*arguments)[0]


@torch.library.register_fake('mmhybrid::export_scan', lib=_library)
def _scan_fake(u, *_) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def selective_scan_export(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y, and for the last state nothing, which no model asks for.

    The arguments are those of :func:`mmhybrid.ops.selective_scan.run_backend`.
    """
    y = torch.ops.mmhybrid.export_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return y, u.new_empty(0)
