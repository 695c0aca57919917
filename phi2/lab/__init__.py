"""Experiments on preference losses, and the reports about runs."""
