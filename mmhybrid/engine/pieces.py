"""Tensors that several processes hold together (PyTorch's DTensor), each a part of the rows."""
from __future__ import annotations

from torch import Tensor

__all__ = ['is_sharded', 'local_part', 'piece_like', 'whole_tensor']


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a part of one that several processes hold together."""
    return hasattr(tensor, 'full_tensor')


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; all of an ordinary one."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor that processes hold together; to be called in all of them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def piece_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor, if that is divided as a parameter is."""
    if not is_sharded(parameter) or is_sharded(whole) or whole.shape != parameter.shape:
        return whole
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    rows = -(-whole.shape[0] // mesh.size())  # as torch.chunk divides them
    mine = whole[rows * mesh.get_local_rank():][:rows]
    return DTensor.from_local(mine.to(parameter.device, copy=True), mesh, parameter.placements,
                              run_check=False, shape=parameter.shape, stride=parameter.stride())
