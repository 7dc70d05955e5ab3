"""Dataframes -> findings, figures and one self-contained page."""
