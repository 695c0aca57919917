"""Preference losses. Those of this package stand in the registry as soon as anything of it is imported."""

from phi2.losses import logistic, links, pointwise, reference_free, scored, window  # noqa: F401, I001  in the table's order
