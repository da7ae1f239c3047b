"""The mathematics of problem 1: noise schedule, Algorithm 1's loss, guidance and three samplers.

Timesteps are numbered as in Ho et al. 2020 (arXiv 2006.11239): t = 1 ... T, x_0 is an image in [-1, 1] and x_T is
noise. `alphas_cumprod` has T + 1 entries, so that alphas_cumprod[t] is the paper's alpha-bar_t and alphas_cumprod[0]
= 1; it is kept in float64 and cast where it meets an image.

Images have any shape (B, ...), and a condition is whatever the network takes, one row an image: a label, or a set of
them. `null` is the condition of the same shape that says nothing (Ho & Salimans 2022, arXiv 2207.12598).

A sampler is a generator function (predict, x, timesteps, alphas_cumprod, generators) that yields (t, x_t) after each
step. `predict(x, t)` returns (x0, eps), see `guided_predictor`; `timesteps` descend from T to 0; `generators` hold one
stream of random numbers an image.
"""

import functools
import math

import torch

from transforms import as_input
from utils import UserError, autocast, beta_scheduler, randn


def noise_schedule(name="linear", timesteps=1000):
    """alpha-bar_0 ... alpha-bar_T as a float64 tensor of shape (timesteps + 1,); ValueError for an unknown name.

    'linear': betas of Ho et al. 2020, section 4. 'cosine': Nichol & Dhariwal 2021, equation 17.
    """
    if name == "linear":
        betas = beta_scheduler(timesteps)
    elif name == "cosine":
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown noise schedule {name!r}")
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])


def require_noise(alphas_cumprod, name):
    """UserError when an image shows through at the last timestep of the schedule `name`: sampling starts from noise."""
    if alphas_cumprod[-1] > 0.01:
        raise UserError(f"with --schedule {name} the last of {len(alphas_cumprod) - 1} timesteps still shows the image "
                        f"(alpha-bar {alphas_cumprod[-1]:.2f}), but sampling starts from noise; take more --timesteps")


def per_image(values, x):
    """values (B,), one for each image, in the shape that broadcasts over x (B, ...)."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def diffuse(x0, t, noise, alphas_cumprod):
    """A draw of q(x_t | x_0) with the given noise, equation 4; x0 and noise (B, ...), t (B,)."""
    alpha_bar = per_image(alphas_cumprod[t], x0)
    return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise


def velocity(x0, t, noise, alphas_cumprod):
    """v of the same draw: the derivative of x_t along the arc from x_0 to noise (Salimans & Ho 2022, appendix D)."""
    alpha_bar = per_image(alphas_cumprod[t], x0)
    return alpha_bar.sqrt().to(x0.dtype) * noise - (1 - alpha_bar).sqrt().to(x0.dtype) * x0


def draw_timesteps(count, timesteps, logit_normal=0.0, device="cpu"):
    """t (count,) in 1 ... `timesteps`, uniform; a share `logit_normal` of them logit-normal instead.

    These lie around the middle, where the shape of what an image shows is decided (Esser et al. 2024, arXiv 2403.03206,
    section 3.1): sigmoid(0.4 + z) of the range for standard normal z. The location 0.4, towards noise, is ours.
    """
    t = torch.randint(1, timesteps + 1, (count,), device=device)
    if logit_normal:
        middle = 1 + (timesteps * torch.sigmoid(0.4 + torch.randn(count, device=device))).long()
        t = torch.where(torch.rand(count, device=device) < logit_normal, middle.clamp(max=timesteps), t)
    return t


def ddpm_loss(model, x0, condition, null, alphas_cumprod, label_drop=0.1, logit_normal=0.0):
    """Algorithm 1 with label dropping (Ho & Salimans 2022, Algorithm 1), in terms of v.

    The network predicts v = sqrt(alpha-bar) eps - sqrt(1 - alpha-bar) x_0 (Salimans & Ho 2022, appendix D). Its squared
    error is that of eps divided by alpha-bar, so the noisy timesteps, which decide about an image's shape, count for
    more than in the plain loss, whose sum is nearly all texture. `label_drop` is the share of images whose whole
    condition becomes `null`; `logit_normal` is draw_timesteps'. Returns (t, loss), both (B,): the timesteps and each
    image's mean squared error of v.
    """
    t = draw_timesteps(len(x0), len(alphas_cumprod) - 1, logit_normal, x0.device)
    noise = torch.randn_like(x0)
    dropped = torch.rand(len(x0), device=x0.device) < label_drop
    condition = torch.where(per_image(dropped, condition), null, condition)
    v = model(diffuse(x0, t, noise, alphas_cumprod), t, condition)
    return t, (v - velocity(x0, t, noise, alphas_cumprod)).square().flatten(1).mean(1)


@torch.no_grad()
def validation_loss(model, images, condition, alphas_cumprod):
    """The loss (N,) of uint8 images (N, ...) under their whole conditions, with the same noise at every call."""
    torch.manual_seed(0)
    device, losses = alphas_cumprod.device, []
    for x, y in zip(images.split(250), condition.split(250)):
        y = y.to(device)
        losses.append(ddpm_loss(model, as_input(x.to(device)), y, y, alphas_cumprod, label_drop=0.0)[1])
    return torch.cat(losses)


def guided_predictor(model, condition, null, alphas_cumprod, guidance, interval=(0, 1000), dtype=None):
    """predict(x, t) -> (x0, eps) under classifier-free guidance of the given strength; t is one timestep for all.

    v = (1 + guidance) v(x, y) - guidance v(x), which is equation 6 of Ho & Salimans 2022 since eps is linear in v;
    0 is the plain conditional model. Guidance acts only while t, in thousandths of T, is in the closed interval
    (Kynkaanniemi et al. 2024); elsewhere the unconditional pass is skipped. x0 is clamped to [-1, 1], and eps is what
    that x0 implies. The network alone computes in `dtype`, see utils.autocast.
    """
    total = len(alphas_cumprod) - 1

    def network(*inputs):
        with autocast(inputs[0].device, dtype):
            return model(*inputs)

    def predict(x, t):
        times = torch.full((len(x),), t, device=x.device)
        if guidance != 0 and interval[0] <= 1000 * t / total <= interval[1]:
            both = network(torch.cat([x, x]), torch.cat([times, times]), torch.cat([condition, null]))
            conditional, unconditional = both.chunk(2)
            v = (1 + guidance) * conditional - guidance * unconditional
        else:
            v = network(x, times, condition)
        a, s = signal_and_noise(alphas_cumprod, t)
        x0 = (a * x - s * v).clamp(-1, 1)
        return x0, (x - a * x0) / s

    return predict


def signal_and_noise(alphas_cumprod, t):
    """(sqrt(alpha-bar_t), sqrt(1 - alpha-bar_t)) as Python floats."""
    alpha_bar = alphas_cumprod[t].item()
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


# --- Which timesteps a sampler visits -----------------------------------------------------------

def uniform_timesteps(alphas_cumprod, steps):
    """The timesteps visited from T down to 0 in `steps` equal strides, steps + 1 integers."""
    total = len(alphas_cumprod) - 1
    return [round(total * (steps - i) / steps) for i in range(steps + 1)]


def log_snr_timesteps(alphas_cumprod, steps, low=-math.inf, high=math.inf):
    """The timesteps visited from T down to 0, `steps` + 1 integers, about equally far apart in log(signal / noise).

    That is lambda, in which a solver's error per stride is even (Lu et al. 2022, arXiv 2206.00927), so strides are
    short in t where the image emerges from noise and where it is finished. Targets are `steps` equidistant lambdas
    from -lambda_1, or lambda_T where that is higher, to lambda_1, within `low` and `high`; T itself stands in for the
    first of them. No stride is below one timestep: with steps = T every one is visited.
    """
    lambda_ = torch.log(alphas_cumprod[1:] / (1 - alphas_cumprod[1:])) / 2  # of t = 1 ... T
    first, last = max(low, -lambda_[0].item(), lambda_[-1].item()), min(high, lambda_[0].item())
    targets = torch.linspace(first, last, steps, dtype=torch.float64)
    nearest = 1 + (lambda_ - targets[:, None]).abs().argmin(dim=1)
    timesteps = [len(lambda_)]
    for i in range(1, steps):
        timesteps.append(max(min(nearest[i].item(), timesteps[-1] - 1), steps - i))
    return timesteps + [0]


# `trimmed` leaves out nearly pure noise and nearly finished images, whose steps serve better elsewhere; its limits are
# from the report's appendix.
SPACINGS = {"log_snr": log_snr_timesteps, "trimmed": functools.partial(log_snr_timesteps, low=-4.2, high=3.0),
            "uniform": uniform_timesteps}


# --- Samplers -----------------------------------------------------------------------------------

def ddpm(predict, x, timesteps, alphas_cumprod, generators):
    """Ancestral sampling: Algorithm 2 of Ho et al. 2020, on any subsequence of the timesteps.

    The mean is that of q(x_s | x_t, x_0) (equation 7) and sigma^2 its variance (beta-tilde).
    """
    for t, s in zip(timesteps, timesteps[1:]):
        x0, _ = predict(x, t)
        alpha_bar_t, alpha_bar_s = alphas_cumprod[t].item(), alphas_cumprod[s].item()
        alpha = alpha_bar_t / alpha_bar_s
        mean = (math.sqrt(alpha_bar_s) * (1 - alpha) / (1 - alpha_bar_t) * x0
                + math.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t) * x)
        sigma = math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha))
        x = mean + sigma * randn(generators, x.shape[1:], x.device) if s > 0 else mean
        yield s, x


def ddim(predict, x, timesteps, alphas_cumprod, generators, eta=0.0):
    """Song et al. 2021 (arXiv 2010.02502), equation 12; eta 0 is deterministic, eta 1 is `ddpm`."""
    for t, s in zip(timesteps, timesteps[1:]):
        x0, eps = predict(x, t)
        alpha_bar_t, alpha_bar_s = alphas_cumprod[t].item(), alphas_cumprod[s].item()
        sigma = eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
        x = math.sqrt(alpha_bar_s) * x0 + math.sqrt(1 - alpha_bar_s - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * randn(generators, x.shape[1:], x.device)
        yield s, x


def dpmpp(predict, x, timesteps, alphas_cumprod, generators):
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), Algorithm 2; deterministic, `generators` are not asked.

    A second-order multistep method in lambda = log(signal / noise); its first and last step are of first order.
    """
    previous = None  # (lambda, x0) of the step before
    for t, s in zip(timesteps, timesteps[1:]):
        x0, _ = predict(x, t)
        if s == 0:
            x = x0
        else:
            (signal_t, noise_t), (signal_s, noise_s) = (signal_and_noise(alphas_cumprod, u) for u in (t, s))
            lambda_t, lambda_s = math.log(signal_t / noise_t), math.log(signal_s / noise_s)
            h = lambda_s - lambda_t
            if previous is None:
                direction = x0
            else:
                r = (lambda_t - previous[0]) / h
                direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous[1]
            x = noise_s / noise_t * x - signal_s * math.expm1(-h) * direction
            previous = lambda_t, x0
        yield s, x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp}
