"""What a model is: abstract nouns, transforms, grey levels, randomness."""
