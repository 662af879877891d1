"""A chain on the line that is Gaussian throughout, whose J_alpha and its gradient are known without sampling."""

import torch
from torch import Tensor, nn

from rayft.chain import Process, reverse_process
from rayft.schedule import linear

# eps_theta = a x + b on the line: every x_t is Gaussian, so J_alpha with r(x) = -(x - 1)^2 / 2 is a polynomial in the
# chain's means and variances, and autograd gives its gradient without sampling.

ALPHA = 0.6
PROCESSES = {"beta": reverse_process(linear(4, 0.2, 0.6)), "ddim": reverse_process(linear(4, 0.2, 0.6), "gamma", 0.8)}
THETA = torch.tensor([0.75, -0.35], dtype=torch.float64)
THETA_PRE = torch.tensor([0.55, 0.1], dtype=torch.float64)


class Line(nn.Module):
    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x_t: Tensor, timestep: Tensor, context: dict[str, Tensor]) -> Tensor:
        return self.theta[0] * x_t + self.theta[1]


def exact_objective(theta: Tensor, process: Process) -> Tensor:
    """J_alpha by the recursion of mean and variance."""
    keep, gain, _, _ = process.linear_in("eps")
    mean, variance, kl = torch.zeros(()).double(), torch.ones(()).double(), torch.zeros(()).double()
    for t in range(process.num_steps, 0, -1):
        slope, offset = gain[t] * (theta - THETA_PRE)  # mu_theta - mu_pre = slope x_t + offset
        kl = kl + ((slope * mean + offset) ** 2 + slope**2 * variance) / (2 * process.sigma[t] ** 2)
        mean = (keep[t] + gain[t] * theta[0]) * mean + gain[t] * theta[1]
        variance = (keep[t] + gain[t] * theta[0]) ** 2 * variance + process.sigma[t] ** 2
    return -((mean - 1) ** 2 + variance) / 2 - ALPHA * kl


def reward(x_0: Tensor) -> Tensor:
    return -((x_0 - 1) ** 2) / 2


def exact_gradient(process: Process) -> Tensor:
    """dJ/dtheta at THETA."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(exact_objective(theta, process), theta)[0]
