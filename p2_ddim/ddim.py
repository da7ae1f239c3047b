"""Denoising diffusion implicit models (Song et al. 2021, arXiv 2010.02502) in the conventions of the course.

The conventions are those behind the images of a public solution that meet the course's ground truth to 0.007 (mean
squared error on 0-255); each has its reason beside it. With numbers of steps that divide 1,000 they are those of
diffusers' DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=True,
set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"). They are why this chapter has a sampler of its own:
the one of p1_ddpm ends at the image itself and goes on with the eps that the clamped x0 implies.
"""

import math

import torch

from transforms import to_uint8
from utils import beta_scheduler, image_generators, randn

T = 1000


def noise_schedule():
    """alphas_cumprod: alpha_bar_t for t = 0 ... 999, float64 (1000,); float32 products would drift over T factors."""
    return torch.cumprod(1 - beta_scheduler(T), dim=0)


def ddpm_loss(model, x0, t, noise, alphas_cumprod):
    """Algorithm 1 of Ho et al. 2020: mean squared error (B,) of the predicted noise.

    x0 and noise (B, C, H, W), x0 in [-1, 1]; t int64 (B,), 0 ... T - 1; alphas_cumprod float64 (T,).
    """
    alpha_bar = alphas_cumprod[t][:, None, None, None]
    x_t = alpha_bar.sqrt().float() * x0 + (1 - alpha_bar).sqrt().float() * noise
    return (model(x_t, t).float() - noise).square().mean(dim=(1, 2, 3))


def timesteps(steps=50):
    """The timesteps that the sampler visits, from noise to image: 981, 961, ..., 21, 1 for 50 steps.

    tau_i = floor(i T / steps) + 1, the paper's linear choice (appendix D.2) shifted by one, so that the last
    call of the network is at t = 1 and not at t = 0. T steps visit 999 ... 1: there is no t = 1000.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be from 1 to {T}; got {steps}")
    return [t for i in reversed(range(steps)) if (t := i * T // steps + 1) < T]


@torch.no_grad()
def ddim(model, noise, steps=50, eta=0.0, generators=None):
    """Goes from noise to images by equation (12) of the paper, and yields (t, x, x0) after each step.

    model(x, t) predicts the noise in x; noise is x_T, of shape (B, C, H, W). With eta > 0 `generators` holds one
    generator for each image (step_generators), so an image does not depend on its batch; eta = 1 is DDPM.
    Yielded are the timestep that the network saw, what the step led to, and the x0 that was predicted in it; the last
    x is the images, about [-1, 1]. ValueError for an eta or a number of steps out of range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (DDIM) to 1 (DDPM); got {eta}")
    if eta > 0 and (generators is None or len(generators) != len(noise)):
        raise ValueError("eta > 0 adds noise at every step: give one generator for each image")
    alphas_cumprod = noise_schedule().tolist()
    visited = timesteps(steps)
    x = noise
    # The last step goes to alpha_bar_0 = 0.9999, not to 1: the course's images keep that last bit of noise.
    for t, t_prev in zip(visited, visited[1:] + [0]):
        # t counts from 0 here: alpha_bar_0 is already one beta away from the image.
        alpha_bar, alpha_bar_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
        # The network was trained on raw timesteps, not on t / T.
        eps = model(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        # Clamping keeps x0 an image: early on, dividing by sqrt(alpha_bar) = 0.0076 magnifies every error of eps.
        x0 = ((x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)).clamp(-1, 1)
        # Equation (16): with eta = 1 the variance of the DDPM's posterior.
        sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
        # The direction back to x_t is the network's own eps, not one recomputed from the clamped x0.
        x = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev - sigma ** 2) * eps
        if eta > 0:
            x = x + sigma * randn(generators, x.shape[1:], x.device)
        yield t, x, x0


def step_generators(seed, indices):
    """The generators of the noise that eta > 0 adds, one for each image.

    Their stream is not that of image_generators' default, for x_T may have been drawn from it, as p2_ddim/noise64 was:
    x_T itself, added to x_T, is no fresh noise.
    """
    return image_generators(seed, indices, stream=1)


def sample(model, noise, steps=50, eta=0.0, generators=None):
    """The images that `ddim` ends with, of noise's shape."""
    for _, x, _ in ddim(model, noise, steps, eta, generators):
        pass
    return x


def stretch(images):
    """Images (B, C, H, W) to uint8, each stretched from its own minimum and maximum to 0 ... 255.

    Over all channels and pixels of an image together, as torchvision's save_image(normalize=True) does with one
    image: this is how the ground truth was saved. A constant image becomes black.
    """
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return to_uint8((images - low) / (high - low).clamp_min(1e-5))


def lerp(x, y, alpha):
    """Straight line from x (alpha = 0) to y (alpha = 1), tensors of one shape."""
    return (1 - alpha) * x + alpha * y


def slerp(x, y, alpha):
    """Spherical interpolation from x (alpha = 0) to y (alpha = 1), each tensor being one vector (equation 67).

    Gaussian noise of many dimensions lies near a sphere, and slerp stays there. Parallel vectors have no arc
    between them: there it is the straight line. Opposite vectors have no shortest arc: ValueError.
    """
    a, b = x.double().flatten(), y.double().flatten()
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    theta = torch.acos(cosine)
    if theta.sin() < 1e-6:
        if cosine < 0:
            raise ValueError("x and y point in opposite directions: no arc between them is the shortest")
        return lerp(x, y, alpha)
    path = (torch.sin((1 - alpha) * theta) * x.double() + torch.sin(alpha * theta) * y.double()) / theta.sin()
    return path.to(x.dtype)
