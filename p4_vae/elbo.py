"""The loss of a variational autoencoder (Kingma & Welling 2014) and the weight of its two parts.

With p(x | z) normal of variance sigma^2 in each of D = 12,288 pixel values, -log p(x | z) is D MSE / (2 sigma^2) and a
constant. So the course's MSE + beta KL, with the MSE averaged over pixels and the KL summed over latents, is the
negative ELBO times 2 sigma^2 / D for sigma^2 = beta D / 2. Its best sigma^2 is the MSE itself (Rybkin et al. 2021,
"sigma-VAE"), hence the automatic beta = 2 MSE / D.
"""

D = 3 * 64 * 64


def squared_errors(decoded, x):
    """Mean squared error of each image: (B,) for images (B, 3, 64, 64) in [0, 1]."""
    return (decoded - x).square().flatten(1).mean(dim=1)


def kl_divergence(mean, log_variance):
    """KL(N(mean, variance) || N(0, I)) of each image in nats, summed over latents: (B,) for (B, L) and (B, L)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def automatic_beta(mse):
    """The weight of the KL at which sigma^2 is the batch's MSE (B,): a number that passes no gradient."""
    return 2 * mse.detach().mean() / D
