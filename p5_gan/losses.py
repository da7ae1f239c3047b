"""The losses of the two players: hinge (Lim & Ye 2017; Miyato et al. 2018), or the cross-entropy of the first GAN
(Goodfellow et al. 2014) with the generator's loss that does not saturate.

Logits are float (B,): high for real. All losses are means over the batch.
"""

import torch.nn.functional as F


def hinge_discriminator(real, generated):
    return F.relu(1 - real).mean() + F.relu(1 + generated).mean()


def hinge_generator(generated):
    return -generated.mean()


def cross_entropy_discriminator(real, generated):
    """-log D(x) - log(1 - D(G(z))), where D is the sigmoid of the logit."""
    return F.softplus(-real).mean() + F.softplus(generated).mean()


def cross_entropy_generator(generated):
    """-log D(G(z))."""
    return F.softplus(-generated).mean()


LOSSES = {"hinge": (hinge_discriminator, hinge_generator),
          "cross_entropy": (cross_entropy_discriminator, cross_entropy_generator)}
