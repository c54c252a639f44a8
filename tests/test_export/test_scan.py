"""The selective scan in operators of ONNX against the reference in float64."""
import numpy as np
import pytest
import torch
from torch import nn

from mmhybrid.ops import selective_scan
from mmhybrid.ops.selective_scan.reference import selective_scan_reference

pytest.importorskip('onnx'), pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')
tracing = pytest.importorskip('mmhybrid.export.tracing')

# name: (D, N, G, with skip, with gate, with bias, softplus, reverse)
FORMS = {
    'mambavision': (6, 8, 1, True, False, True, True, False),
    'reverse': (6, 3, 2, True, False, True, True, True),
    'one state': (4, 1, 2, False, True, False, True, True),
    'bare': (4, 2, 1, False, False, False, False, False),
}
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'bias')


def tensors(form, length, batch=2, largest=3.):
    D, N, G, skip, gate, bias, softplus, _ = FORMS[form]
    noise = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=noise)

    delta = draw(batch, D, length) * largest if softplus else draw(batch, D, length).abs() * largest
    return (draw(batch, D, length), delta, -draw(D, N).abs() - 0.1, draw(batch, G, N, length),
            draw(batch, G, N, length), draw(D) if skip else None,
            draw(batch, D, length) if gate else None, draw(D) if bias else None)


class Scans(nn.Module):
    """All forms in one graph, so that one export serves them all."""

    def forward(self, given):
        return tuple(
            selective_scan(*(given[form].get(name) for name in NAMES), FORMS[form][6],
                           reverse=FORMS[form][7], backend='export')
            for form in FORMS)


@pytest.fixture(scope='module')
def sessions(tmp_path_factory):
    """``sessions(length)``: what is exported for that length, None for any."""
    made = {}

    def session(length):
        if length not in made:
            path = tmp_path_factory.mktemp('scan') / 'scan.onnx'
            shown = length or 70
            given = {form: {name: x for name, x in zip(NAMES, tensors(form, shown), strict=True)
                            if x is not None} for form in FORMS}
            names = [f'{form}.{name}' for form in FORMS for name in given[form]]
            axes = None if length else {f'{form}.{name}' for form in FORMS for name in (
                'u', 'delta', 'B', 'C', 'z')}
            shapes = None if length else ({form: {name: (
                {x.dim() - 1: torch.export.Dim.DYNAMIC} if f'{form}.{name}' in axes else None)
                for name, x in given[form].items()} for form in FORMS},)
            program = tracing.to_onnx(Scans(), (given,), names, list(FORMS), shapes=shapes)
            program.save(path)
            made[length] = onnxruntime.InferenceSession(path)
        return made[length]
    return session


@pytest.mark.parametrize('length', [5, None, pytest.param(70, marks=pytest.mark.slow)],
                         ids=['one chunk', 'any length', 'chunks'])
@pytest.mark.parametrize('largest', [3., 300.], ids=['ordinary steps', 'huge steps'])
def test_numbers_are_those_of_the_reference(sessions, length, largest):
    for real in [length] if length else [70, 64, 33, 1]:
        given = {form: tensors(form, real, largest=largest) for form in FORMS}
        feed = {f'{form}.{name}': x.numpy() for form in FORMS
                for name, x in zip(NAMES, given[form], strict=True) if x is not None}
        for form, y in zip(FORMS, sessions(length).run(None, feed), strict=True):
            wide = [x if x is None else x.double() for x in given[form]]
            right = selective_scan_reference(*wide, *FORMS[form][6:])[0].numpy()
            assert y.shape == right.shape and np.isfinite(y).all(), form
            assert np.abs(y - right).max() < 2e-6 * np.abs(right).max(), (form, real)


def test_no_operator_is_our_own(sessions):
    path = sessions(5)._model_path
    import onnx
    model = onnx.load(path)
    assert {each.domain for each in model.opset_import} <= {'', 'pkg.onnxscript.torch_lib.common'}
    assert {node.domain for node in model.graph.node} == {''}
    assert next(each.version for each in model.opset_import if not each.domain) == tracing.OPSET


def test_the_backend_is_chosen_by_name_alone(monkeypatch):
    from mmhybrid.ops.selective_scan import choose_backend
    assert choose_backend() != 'export' and choose_backend('export') == 'export'
    one, other = (selective_scan(*tensors('mambavision', 20), True, backend=backend)
                  for backend in ('export', 'torch'))
    assert torch.equal(one, other)
