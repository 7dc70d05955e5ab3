"""Paired comparisons: ablation, confirmation, test rows."""
