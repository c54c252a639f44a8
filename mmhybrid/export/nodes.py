"""Nodes of an ONNX graph, written while ``torch.onnx.export`` translates an operator."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnxscript.ir import convenience
from torch.onnx._internal.exporter import _core

__all__ = ['PREFIX', 'ZERO', 'call', 'constant', 'known', 'numbers', 'shape_of', 'subgraph',
           'tensor']

#: How the names of our own nodes begin.
PREFIX = 'mmhybrid_'
#: What ``ConstantOfShape`` fills with.
ZERO = ir.tensor(np.zeros(1, dtype=np.float32))
_count = itertools.count()


def call(kind: str, *inputs, num_outputs: int = 1, **attributes):
    """Add a node to the graph that is being written; returns its output, or a list of several."""
    tracer = _core.current_tracer
    assert tracer is not None, 'nothing is being exported'
    node = _node(kind, inputs, num_outputs, attributes, tracer.opset.version)
    node.name = f'{PREFIX}{kind}_{next(_count)}'
    tracer.nodes.append(node)
    return node.outputs[0] if num_outputs == 1 and kind != 'Scan' else list(node.outputs)


def _node(kind, inputs, num_outputs, attributes, version=None):
    return ir.Node('', kind, inputs=list(inputs), num_outputs=num_outputs, version=version,
                   attributes=convenience.convert_attributes(attributes))


def constant(values: Sequence[int]):
    """A constant of int64 with one axis."""
    return tensor(np.array(values, dtype=np.int64))


def numbers(values: float | Sequence[float], dtype=np.int64):
    """A constant of any shape."""
    return tensor(np.array(values, dtype=dtype))


def tensor(values: np.ndarray):
    """A constant."""
    return call('Constant', value=ir.tensor(values))


def known(side) -> int | None:
    """A size as a number, None where it is a variable."""
    return int(side) if isinstance(side, int) else None


def shape_of(x, start: int, end: int | None = None):
    """Sizes of x from one axis on, up to another."""
    return call('Shape', x, start=start, **({} if end is None else dict(end=end)))


def subgraph(body: Callable, states: Sequence, rows: Sequence):
    """The body of a ``Scan``.

    Args:
        body: takes a function that adds a node, then what is carried and a row of each; returns
            what is carried and the outputs.
        states: values whose like is carried.
        rows: values whose rows are read.
    """
    number = next(_count)
    nodes = []

    def node(kind, *inputs, **attributes):
        nodes.append(_node(kind, inputs, 1, attributes))
        nodes[-1].outputs[0].name = f'body{number}_{len(nodes)}'
        return nodes[-1].outputs[0]

    inputs = [ir.Value(name=f'body{number}_in{place}', type=ir.TensorType(ir.DataType.FLOAT))
              for place in range(len(states) + len(rows))]
    outputs = body(node, *inputs)
    for output in outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(inputs, outputs, nodes=nodes, name=f'body{number}')
