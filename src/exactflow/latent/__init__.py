"""What a density is used for: editing, classifying, detecting, restoring."""
