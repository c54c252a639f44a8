"""Claims of the papers as data: what was published, how to check it, what came out here."""
from .claims import STATES, Claim, Paper, Row, find_claim, read_papers
from .page import as_page, as_text, overview

__all__ = ['STATES', 'Claim', 'Paper', 'Row', 'as_page', 'as_text', 'find_claim', 'overview',
           'read_papers']
