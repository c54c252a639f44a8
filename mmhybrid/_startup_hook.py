"""What ``mmhybrid install-hook`` lets this Python run whenever it starts.

A config that says ``_base_ = 'mmhybrid::...'`` is parsed by stock tools before anything has
imported mmhybrid. This hook waits for ``mmengine.config.config`` to be imported and then teaches
its ``Config`` our prefix; mmhybrid itself is imported when a config really uses the prefix.

``hook_file.py`` squeezes this file into the one line that a ``.pth`` file may hold. It runs at
every start of the interpreter, so it imports nothing but ``sys`` and must not fail.
"""

import sys


class ConfigSchemeHook:
    """Finder that finds as the others do, and adds a step after one module has been executed."""

    module = 'mmengine.config.config'
    searching = False

    def find_spec(self, fullname, path=None, target=None):
        """See importlib; answers for ``mmengine.config.config`` only."""
        if fullname != self.module or self.searching:
            return None
        # Another finder may delegate to all others, us included.
        self.searching = True
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, 'find_spec'):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None and hasattr(spec.loader, 'exec_module'):
                    self.add_step(spec.loader)
                    return spec
        finally:
            self.searching = False
        return None

    def add_step(self, loader):
        """Let the loader patch ``Config`` once it has executed the module."""
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.teach(module)

        loader.exec_module = exec_module

    def teach(self, module):
        """Wrap ``Config._get_cfg_path`` (a static method) for our prefix."""
        original = getattr(getattr(module, 'Config', None), '_get_cfg_path', None)
        if original is None:
            return

        def get_cfg_path(cfg_path, filename):
            if cfg_path.startswith('mmhybrid::'):
                from mmhybrid import config_scheme

                return config_scheme.resolve(cfg_path), None
            return original(cfg_path, filename)

        get_cfg_path.resolves_mmhybrid = True
        module.Config._get_cfg_path = staticmethod(get_cfg_path)


# site.py runs the .pth files of a virtual environment twice, each time in a new namespace.
if not any(type(finder).__name__ == 'ConfigSchemeHook' for finder in sys.meta_path):
    sys.meta_path.insert(0, ConfigSchemeHook())
