"""What the latents of the training faces tell after training: a prior that fits them, and directions of attributes.

N(0, I) is what the KL pulls all posteriors together towards, but they fill it unevenly. A mixture of Gaussians fitted
to samples of them (Ghosh et al. 2020, section 4) says where faces are.
"""

import warnings

import numpy as np
import torch

from utils import in_batches, randn


@torch.no_grad()
def encode_all(model, images, batch_size=500):
    """(means, log variances) of q(z | x), each (N, L) on the CPU, for uint8 images (N, 3, 64, 64)."""
    device = next(model.parameters()).device
    parts = [part for _, part in in_batches(lambda batch: model.encode(batch.to(device).float() / 255), images,
                                            batch_size)]
    return tuple(torch.cat(part).cpu() for part in zip(*parts))


def fit_mixture(z, components=10, seed=0):
    """A mixture of Gaussians for latents z (N, L): dict of weights (K,), means (K, L) and the Cholesky factors
    (K, L, L) of the covariances; fewer than `components` where faces are few."""
    from sklearn.exceptions import ConvergenceWarning  # here, because sampling can do without and starts sooner
    from sklearn.mixture import GaussianMixture
    components = min(components, 1 + len(z) // (10 * z.shape[1]))
    mixture = GaussianMixture(components, reg_covar=1e-4, max_iter=30, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterations change nothing that one sees
        mixture.fit(z.double().numpy())
    factors = np.linalg.cholesky(mixture.covariances_)
    return {name: torch.from_numpy(value).float()
            for name, value in dict(weights=mixture.weights_, means=mixture.means_, factors=factors).items()}


def sample_prior(length, generators, mixture=None):
    """Latents (B, length), one generator an image: from N(0, I), or from a mixture of fit_mixture."""
    noise = randn(generators, (length,))
    if mixture is None:
        return noise
    share = mixture["weights"].double().numpy()
    chosen = torch.tensor([generator.choice(len(share), p=share / share.sum()) for generator in generators])
    return mixture["means"][chosen] + (mixture["factors"][chosen] @ noise[:, :, None]).squeeze(2)


def attribute_directions(means, numbers, attributes):
    """{attribute: mean latent of the faces with it less that of those without, (L,)}.

    means: (N, L) of the faces `numbers` (N,); attributes: see faces.read_attributes, which need not know every face.
    """
    known = [i for i, number in enumerate(numbers.tolist()) if number in attributes.index]
    means, table = means[known], attributes.loc[numbers[known].tolist()]
    has = {name: torch.tensor(table[name].tolist()) for name in table}
    return {name: means[h].mean(dim=0) - means[~h].mean(dim=0) for name, h in has.items() if 0 < h.sum() < len(h)}
