"""A legend of the shapes that annotations name in many files.

The tests check annotations: within one call, axes of one name have one size.
"""

from jaxtyping import Float, Int, Integer
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]  # in [-1, 1], noisy ones beyond
GreyLevels = Integer[Tensor, "batch channels height width"]  # 0 .. levels - 1
Labels = Int[Tensor, " batch"]  # classes 0 .. num_classes - 1; num_classes is a dropped label
PerSample = Float[Tensor, " batch"]  # a time, or a sum over the dimensions of each sample
Tokens = Float[Tensor, "batch tokens dim"]  # in generation order
Latents = Float[Tensor, "batch *latent"]  # in the layout of the model's prior
Values = Float[Tensor, "batch *shape"]  # samples of any shape
