"""What the papers of the repository itself claim: CONTRIBUTING, CHANGELOG, CITATION, forms."""

import re
from pathlib import Path

import pytest
import yaml

import mmhybrid
from mmhybrid import cli

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()
CHANGELOG = (ROOT / 'CHANGELOG.md').read_text()
# What is made by the commands that are named beside it.
MADE = {'.venv', '.venv-upstream'}


def named_paths(text):
    """Words in backticks or of links that look like paths; patterns with dots stand for names."""
    words = [word for span in re.findall(r'`([^`\n]+)`', text) for word in span.split()]
    words += re.findall(r'\]\(([^)]+)\)', text)
    for word in words:
        if '...' not in word and not word.startswith('__') and (
                word.startswith('.venv') or re.fullmatch(r'[\w.-]+(/[\w.-]*)+', word)
                or re.search(r'\w\.(py|md|yml|toml|sh|cfg|txt|json|cff)\Z', word)):
            yield word


def test_contributing_names_what_is_there():
    paths = set(named_paths(CONTRIBUTING)) - MADE - {'head_backbone_size_recipe_dataset.py'}
    assert {'mmhybrid/ops', 'tests/test_layout.py', 'mmhybrid/families'} <= paths
    missing = sorted(path for path in paths if path != 'private_files.py'
                     and not (ROOT / path).exists())
    assert not missing and (ROOT / 'mmhybrid/private_files.py').is_file()


@pytest.mark.parametrize(('file', 'name'), [
    ('mmhybrid/families/__init__.py', 'FAMILIES'),
    ('mmhybrid/ops/selective_scan/__init__.py', '_BACKENDS'),
    ('mmhybrid/datasets/exports/recognise.py', 'FORMS'),
])
def test_contributing_names_tables_that_are_there(file, name):
    assert file in CONTRIBUTING and f'`{name}`' in CONTRIBUTING
    assert re.search(rf'^{name}\b.*=', (ROOT / file).read_text(), re.M)


def test_contributing_shows_options_of_the_test_script():
    script = (ROOT / 'tools/run_tests.sh').read_text()
    options = set(re.findall(r'run_tests\.sh.*(--[\w-]+)', CONTRIBUTING))
    assert options and all(f'{option})' in script for option in options)


def test_the_changelog_lists_every_command_and_this_version():
    section = CHANGELOG.partition('### Commands')[2].partition('###')[0].partition(';')[0]
    assert re.findall(r'`([\w-]+)`', section)[1:] == cli.names()
    assert re.search(rf'^## {re.escape(mmhybrid.__version__)} \(', CHANGELOG, re.M)


def test_the_citation_names_this_version_and_the_papers_of_the_model_index():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
    assert citation['version'] == mmhybrid.__version__
    collections = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())['Collections']
    papers = {each['Paper']['URL']: each['Paper']['Title'] for each in collections
              if each['Name'] != 'Peers'}
    assert {each['url']: each['title'] for each in citation['references']} == papers


@pytest.mark.parametrize('form', sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml')),
                         ids=lambda path: path.stem)
def test_issue_forms_ask_for_doctor(form):
    content = yaml.safe_load(form.read_text())
    assert {'name', 'description', 'body'} <= set(content)
    fields = {field['id']: field['attributes']['label'] for field in content['body']}
    assert len(fields) == len(content['body']) and '`mmhybrid doctor`' in fields['doctor']


def test_pull_requests_ask_for_doctor():
    assert '`mmhybrid doctor`' in (ROOT / '.github/pull_request_template.md').read_text()


def test_pre_commit_pins_the_linters_of_the_test_script():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
    assert [hook['id'] for hook in hooks] == ['ruff', 'codespell']
    script = (ROOT / 'tools/run_tests.sh').read_text()
    for hook in hooks:
        assert re.fullmatch(rf'{hook["id"]}==[\d.]+', hook['additional_dependencies'][0])
        assert f'-m {hook["id"]}' in script


def test_the_package_says_that_it_is_typed():
    assert (ROOT / 'mmhybrid/py.typed').is_file()
    assert 'py.typed' in (ROOT / 'setup.cfg').read_text()
    assert 'py.typed' in (ROOT / 'MANIFEST.in').read_text()
