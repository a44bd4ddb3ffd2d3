"""Intervals, plots and HTML pages."""
