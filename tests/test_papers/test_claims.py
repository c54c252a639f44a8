"""Claims of the papers: complete, well-formed, on the page, and checked by commands that exist."""
import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from mmengine.fileio import load

from mmhybrid import cli
from mmhybrid.analysis import CONVENTIONS
from mmhybrid.errors import UserError
from mmhybrid.papers import STATES, as_page, as_text, find_claim, overview, read_papers
from mmhybrid.weights import RELEASED
from mmhybrid.weights.released import find_released

ROOT = Path(__file__).resolve().parents[2]
PAPERS = read_papers()
CLAIMS = [claim for paper in PAPERS for claim in paper.claims]
ROWS = [(claim, row) for claim in CLAIMS for row in claim.rows]
# Tables and figures of each paper.
EXTENT = {
    'mambavision': ([*'12345', 's1', 's2'], [*'12345']),
    'vim': ([*'1234567'], [*'12345']),
    'localmamba': ([*'123456'], [*'12345']),
    'vmamba': ([str(n) for n in range(1, 16)], [str(n) for n in range(1, 15)]),
}


def test_the_page_is_made_of_the_data():
    page = (ROOT / 'configs/papers.md').read_text()
    assert page == as_page(PAPERS) + '\n', 'mmhybrid reproduce --page configs/papers.md'


def test_every_table_and_figure_has_a_claim():
    for paper in PAPERS:
        assert (list(paper.tables), list(paper.figures)) == EXTENT[paper.id]
        places = [claim.id.partition('/')[2] for claim in paper.claims]
        assert sorted(places) == sorted([
            *(f'table-{n}' for n in paper.tables), *(f'figure-{n}' for n in paper.figures)])
    assert {paper.id for paper in PAPERS} == set(EXTENT)


@pytest.mark.parametrize('claim', CLAIMS, ids=lambda claim: claim.id)
def test_rows_say_what_they_can(claim):
    names = [row.name for row in claim.rows]
    assert len(set(names)) == len(names)
    for row in claim.rows:
        assert row.state in STATES
        if row.state in ('runs here', 'needs a GPU'):
            assert row.command, row.name
        if row.state in ('not built', 'drawing'):
            assert not row.command and not row.here
    text = as_text(claim)
    assert all(row.command in text and row.published in text for row in claim.rows)
    assert f'  {claim.id} ' in overview(PAPERS)


@pytest.mark.parametrize('command', sorted({row.command for _, row in ROWS if row.command}))
def test_commands_are_understood(command, monkeypatch):
    """Files exist, weights have names, and the command line takes the options; nothing runs."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    for word in words:
        if word.startswith(('configs/', 'tools/')):
            assert (ROOT / word).is_file(), word
    if words[0] == 'python':
        assert words[1].startswith('tools/benchmark/')
        return
    assert words[0] == 'mmhybrid' and words[1] in cli.names()
    module, parser = cli.command(words[1]), argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(words[2:])
    if words[1] == 'test':
        assert find_released(args.checkpoint).address
    if words[1] == 'flops':
        assert args.convention in CONVENTIONS


def test_every_ablation_belongs_to_a_claim():
    named = {name for _, row in ROWS
             for name in re.findall(r'configs/ablations/(\w+)\.py', row.command)}
    assert named == {path.stem for path in (ROOT / 'configs/ablations').glob('*.py')}


def counted_rows():
    return [(claim, row) for claim, row in ROWS if row.here.endswith('(counted)')]


def check_count(row, capsys):
    words = shlex.split(row.command)
    assert cli.main([*words[1:], '--format', 'json']) == 0
    told = json.loads(capsys.readouterr().out)
    counted = f"{told['parameters'] / 1e6:.2f} M, {told['macs'] / 1e9:.2f} G (counted)"
    assert counted == row.here


@pytest.mark.parametrize('name', ['vmamba/table-12', 'localmamba/figure-3'])
def test_counts_come_out_again(name, capsys):
    check_count(find_claim(PAPERS, name).rows[1], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(('claim', 'row'), [
    pytest.param(claim, row, id=f'{claim.id}-{row.name}') for claim, row in counted_rows()])
def test_every_count_comes_out_again(claim, row, capsys):
    check_count(row, capsys)


def test_there_is_something_to_count():
    assert len(counted_rows()) > 25 and len(RELEASED) > 50


# --- faults of the file --------------------------------------------------------------------------


def changed(tmp_path, change):
    papers = load(str(ROOT / 'configs/papers.yml'))
    change(papers['vim']['claims'])
    path = tmp_path / 'papers.yml'
    path.write_text(yaml.safe_dump(papers, sort_keys=False))
    return path


def test_the_file_may_be_written_again(tmp_path):
    assert read_papers(changed(tmp_path, lambda claims: None)) == PAPERS


@pytest.mark.parametrize(('change', 'words'), [
    (lambda claims: claims['table-1']['rows'][0].update(state='runs there'),
     "vim/table-1, row 'Vim-Ti': got state 'runs there', expected one of runs here, "),
    (lambda claims: claims['table-1']['rows'][0].update(orders='x'),
     "vim/table-1, row 'Vim-Ti': unknown orders; keys are name, state, "),
    (lambda claims: claims['table-1'].pop('state'),
     "vim/table-1, row 'Vim-Ti': without state; keys are "),
    (lambda claims: claims['table-1'].pop('about'), 'vim/table-1: without about; keys are id, '),
    (lambda claims: claims.update({'tabel-9': dict(about='x', state='drawing')}),
     'vim/tabel-9: expected a place such as table-2'),
])
def test_faults_are_named(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        read_papers(changed(tmp_path, change))
    assert words in str(error.value) and 'papers.yml' in str(error.value)


@pytest.mark.parametrize(('name', 'words'), [
    ('vim/figure1', "Did you mean 'vim/figure-1"),
    ('vim', "Did you mean 'vim/"), ('nonsense', '--list` names them all')])
def test_an_unknown_claim_names_its_neighbours(name, words):
    with pytest.raises(UserError, match=re.escape(words)):
        find_claim(PAPERS, name)
