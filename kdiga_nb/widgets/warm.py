"""What a training imports late, for the server that trainings are forked from: about 3 s that no click waits for."""

import torch
from sklearn.datasets import load_digits

load_digits()
# The first optimiser of a process imports torch._dynamo, which takes most of that time.
torch.optim.SGD([torch.zeros(1)], lr=1.0)
