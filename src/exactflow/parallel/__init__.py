"""How processes work together: they know no model."""
