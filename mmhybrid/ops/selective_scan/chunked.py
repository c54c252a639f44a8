"""Placeholder until the chunked path lands: the sequential loop."""

from .reference import selective_scan_reference


def selective_scan_chunked(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    """Run the reference in the dtype of A."""
    parts = [x if x is None else x.to(A.dtype) for x in (u, delta, A, B, C, D, z, delta_bias)]
    y, last_state = selective_scan_reference(*parts, delta_softplus, reverse)
    return y.to(u.dtype), last_state
