"""The studies of problem 2, as functions for the report: eta, slerp against lerp, the number of steps.

model is a UNet in evaluation mode, a noise is (1, 3, H, W) on the model's device. Images are uint8.
"""

import torch

from p2_ddim.ddim import lerp, noise_schedule, sample, slerp, step_generators, stretch

ALPHAS = [i / 10 for i in range(11)]
ETAS = (0, 0.25, 0.5, 0.75, 1)


def eta_grid(model, noises, etas=ETAS, steps=50, seed=0):
    """(len(etas) * len(noises), 3, H, W): one row of faces per eta, one column per noise; torchvision's make_grid
    with nrow=len(noises) lays them out. A column's added noise is the same random numbers in every row."""
    x = torch.cat(list(noises))
    return torch.cat([stretch(sample(model, x, steps, eta, step_generators(seed, range(len(x))))) for eta in etas])


def interpolation_strip(model, x, y, path, alphas=ALPHAS, steps=50):
    """(len(alphas), 3, H, W): the faces on the way from noise x to noise y, where `path` is slerp or lerp."""
    return torch.cat([stretch(sample(model, path(x, y, alpha), steps)) for alpha in alphas])


def norm_table(x, y, alphas=ALPHAS):
    """Rows (alpha, norm of slerp, norm of lerp), norms divided by sqrt(number of values), so that noise has about 1.

    Independent noises are nearly orthogonal, and the mean of two such vectors is sqrt(1/2) as long: lerp leaves the
    sphere on which all noise of the training has lain, slerp stays on it.
    """
    return [(alpha, *((path(x, y, alpha).norm() / x.numel() ** 0.5).item() for path in (slerp, lerp)))
            for alpha in alphas]


def consistent(model):
    """The network `model`, its eps replaced by what the clamped x0 implies.

    The course's convention clamps x0 and goes on with the network's own eps. Where the clamp acts, x0 and eps then no
    longer make up x_t, and the sampler no longer solves the differential equation of DDIM; with this network it does.
    """
    alphas_cumprod = noise_schedule()

    def eps_of_clamped_x0(x, t):
        alpha_bar = alphas_cumprod[t[0]].item()
        signal, noise = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5
        x0 = ((x - noise * model(x, t)) / signal).clamp(-1, 1)
        return (x - signal * x0) / noise
    return eps_of_clamped_x0


def steps_table(model, noises, steps=(5, 10, 20, 50, 100), reference=1000):
    """Rows (steps, errors) with eta 0: each image's MSE on 0-255 against that of `reference` steps, float64, one for
    each of the list of noises."""
    x = torch.cat(noises)
    truth = stretch(sample(model, x, reference)).double()
    return [(n, (stretch(sample(model, x, n)).double() - truth).square().mean(dim=(1, 2, 3))) for n in steps]
