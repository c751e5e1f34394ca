"""Measurements for the documentation, each beside its peers in one run."""
