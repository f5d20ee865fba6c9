"""What came of a run: one self-contained page, its figures as PNGs, and a table for the terminal."""

from sgtm.report.beside import compare
from sgtm.report.page import write_report
from sgtm.report.terminal import print_comparison, print_summary

__all__ = ["compare", "print_comparison", "print_summary", "write_report"]
