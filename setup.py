"""Build steps that setup.cfg cannot express; the metadata is there."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_EXTENSION = ('configs', 'tools', 'model-index.yml')


def copy_mim_extension(package):
    """Put configs, tools and the model index under ``package/.mim``, as mm packages do."""
    target = package / '.mim'
    shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left deleted configs
    target.mkdir(parents=True)
    for name in MIM_EXTENSION:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns('__pycache__', '*.pyc')
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.is_file():
            shutil.copy2(source, target / name)


def link_mim_extension(package):
    """The same for an editable install: links, so that edits are seen."""
    target = package / '.mim'
    target.mkdir(exist_ok=True)
    for name in MIM_EXTENSION:
        link = target / name
        if link.is_symlink() or not (ROOT / name).exists():
            continue
        if link.is_dir():
            shutil.rmtree(link)
        try:
            link.symlink_to(Path('..', '..', name), target_is_directory=(ROOT / name).is_dir())
        except OSError:
            # No permission for links (Windows): mmhybrid then reads the checkout's configs.
            print(f'Could not link {link}; the configs are read from {ROOT / name}.')


class BuildWithExtension(build_py):
    """Add the ``.mim`` folder."""

    def run(self):
        """Build the packages, then the addition."""
        super().run()
        if getattr(self, 'editable_mode', False):
            link_mim_extension(ROOT / 'mmhybrid')
        else:
            copy_mim_extension(Path(self.build_lib, 'mmhybrid'))


setup(cmdclass={'build_py': BuildWithExtension})
