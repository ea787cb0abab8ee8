"""The run directory, and what is read from it: comparisons, plots, exports, model cards."""
