"""Check claims of the papers: list them, show one, run its commands.

A claim is a table or a figure, such as vim/figure-1. Without --row, those of its commands run that
need neither the published data sets nor a GPU. configs/papers.md has all claims on one page.
"""

import argparse
from pathlib import Path

EXAMPLE = 'mmhybrid reproduce vim/figure-1 --with --sizes 64 96'


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('claim', nargs='?', metavar='CLAIM', help='one of --list')
    parser.add_argument('--list', action='store_true', help='name all claims')
    parser.add_argument('--page', metavar='FILE', help='write all claims as Markdown')
    parser.add_argument('--row', metavar='NAME', help='run the command of this row, '
                                                      'whatever it needs')
    parser.add_argument('--show', action='store_true', help='run nothing')
    parser.add_argument('--with', nargs=argparse.REMAINDER, default=[], dest='extra',
                        metavar='OPTION', help='all that follows goes to the commands')
    parser.set_defaults(usage_error=parser.error)


def run(args):
    """List, print or run; returns the status of what ran."""
    from mmhybrid.papers import as_page, as_text, find_claim, overview, read_papers
    from mmhybrid.papers.running import chosen_rows, run_rows

    if sum((args.list, args.page is not None, args.claim is not None)) != 1:
        args.usage_error('expected one of CLAIM, --list and --page')
    papers = read_papers()
    if args.list:
        print(overview(papers))
        return 0
    if args.page is not None:
        Path(args.page).write_text(f'{as_page(papers)}\n', encoding='utf-8')
        return 0
    claim = find_claim(papers, args.claim)
    print(as_text(claim), flush=True)
    return 0 if args.show else run_rows(chosen_rows(claim, args.row), args.extra)
