"""Classifier guidance: Algorithms 1 and 2 of Dhariwal & Nichol 2021 (arXiv 2105.05233) for sets of objects.

The classifier's log p(y | x) for a set y is the sum of log p over the objects in it and of log (1 - p) over all others,
so guidance also removes what was not asked for. A gradient is a function (x, t, x0) -> the gradient of log p(y | x_t)
with respect to x_t, of the shape of x: of a network that knows noisy images, or of one that knows clean ones at the
predicted x0. It joins a `predict(x, t) -> (x0, eps)` of p1_ddpm.diffusion, that with classifier-free guidance as well.
"""

import torch
import torch.nn.functional as F

from p1_ddpm.diffusion import ddpm, signal_and_noise


def log_probability(logits, labels):
    """log p(y | x), (B,), of log-odds (B, 24) and multi-hot labels (B, 24)."""
    return -F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)


@torch.enable_grad()
def gradient_of(log_p, x):
    """The gradient of the sum of log_p(x) at x (B, ...): each image's own, where images do not meet in log_p."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(log_p(x).sum(), x)[0]


def noisy_gradient(network, labels):
    """Of a classifier of noisy images, log p(y | x_t), `network.logits(x, t)`."""
    def gradient(x, t, x0):
        times = torch.full((len(x),), t, device=x.device)
        return gradient_of(lambda x: log_probability(network.logits(x, times), labels), x)
    return gradient


def clean_gradient(network, labels, alphas_cumprod):
    """Of a classifier of clean images: log p(y | x0) at the predicted x0 = sqrt(alpha-bar) x - sqrt(1 - alpha-bar) v.

    v is held fixed, which spares the way back through the diffusion network: dx0/dx_t = sqrt(alpha-bar). That is exact
    for standard normal images, whose v is zero, and for any others at the end, t = 0.
    """
    def gradient(x, t, x0):
        signal, _ = signal_and_noise(alphas_cumprod, t)
        return signal * gradient_of(lambda x0: log_probability(network.logits(x0), labels), x0)
    return gradient


def algorithm_1(predict, gradient, x, timesteps, alphas_cumprod, generators, scale):
    """Ancestral sampling from N(mu + scale Sigma gradient, Sigma): p1_ddpm's `ddpm`, its mean shifted."""
    for t, s in zip(timesteps, timesteps[1:]):
        prediction = predict(x, t)
        shift = scale * gradient(x, t, prediction[0])
        alpha_bar_t, alpha_bar_s = alphas_cumprod[t].item(), alphas_cumprod[s].item()
        variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        _, x = next(ddpm(lambda x, t: prediction, x, [t, s], alphas_cumprod, generators))
        x = x + variance * shift
        yield s, x


def algorithm_2(predict, gradient, alphas_cumprod, scale):
    """predict(x, t) with eps - sqrt(1 - alpha-bar) scale gradient in eps' place, for DDIM and other solvers.

    x0 follows from it, is clamped to [-1, 1], and eps is what that x0 implies, as in p1_ddpm's guided_predictor.
    """
    def guided(x, t):
        x0, _ = predict(x, t)
        signal, noise = signal_and_noise(alphas_cumprod, t)
        x0 = (x0 + noise**2 / signal * scale * gradient(x, t, x0)).clamp(-1, 1)
        return x0, (x - signal * x0) / noise
    return guided
