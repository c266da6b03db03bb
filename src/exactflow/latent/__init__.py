"""Uses of a density: editing, classifying, detecting outliers, restoring."""
