"""Draw predictions next to ground truth: python tools/visualize.py CONFIG CHECKPOINT [--help]."""
import sys
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmhybrid.cli import tool  # noqa: E402

if __name__ == '__main__':
    sys.exit(tool('visualize'))
