"""Preference losses. Those of this package stand in the registry as soon as anything of it is imported."""

from phi2.losses import pairwise  # noqa: F401  its losses register themselves
