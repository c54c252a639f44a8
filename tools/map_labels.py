#!/usr/bin/env python
"""Number the classes of label images that hold grey values or colours.

Examples:
    python tools/map_labels.py masks/ labels/ 0=0 255=1
    python tools/map_labels.py colours/ labels/ 0,0,0=255 128,0,0=0 0,128,0=1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmhybrid.datasets.label_mapping import map_labels, parse_mapping  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='folder of label images')
    parser.add_argument('target', help='new folder for the numbered ones, as PNG')
    parser.add_argument('mapping', nargs='+', metavar='VALUE=CLASS',
                        help='grey value, palette index or RED,GREEN,BLUE and its class; 255 is '
                        '"ignore"')
    args = parser.parse_args(argv)
    try:
        count = map_labels(args.source, args.target, parse_mapping(args.mapping))
    except (ValueError, OSError) as error:
        print(f'map_labels: {error}', file=sys.stderr)
        return 1
    print(f'{count} label images are in {args.target}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
