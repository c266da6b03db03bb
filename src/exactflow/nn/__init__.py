"""Network parts that know no model."""
