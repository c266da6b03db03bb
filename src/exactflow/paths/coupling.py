"""Which noise goes to which image in a training batch (Tong et al., arXiv 2302.00482)."""

from importlib import import_module

import torch

from exactflow.core.shapes import Values


@torch.no_grad()
def minibatch_transport(noise: Values, data: Values) -> Values:
    """The same noise in another order: row i goes to data row i, at the least total cost.

    The cost is the squared Euclidean distance, the assignment exact (Hungarian method, on the
    CPU, cubic in the batch): a permutation is an optimal plan between two batches of equal size.
    """
    scipy = import_module("scipy.optimize")
    rows, columns = data.flatten(1).double(), noise.flatten(1).double()
    cost = -(rows @ columns.T)  # up to terms of rows and columns, which no assignment changes
    _, order = scipy.linear_sum_assignment(cost.cpu().numpy())
    return noise[torch.as_tensor(order, device=noise.device)]
