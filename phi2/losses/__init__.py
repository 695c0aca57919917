"""Preference losses. Those of this package stand in the registry as soon as anything of it is imported."""

# in the table's order
from phi2.losses import logistic, links, pointwise, reference_free, scored, window, unpaired, listwise  # noqa: F401, I001
