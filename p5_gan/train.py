"""Trains the generative adversarial network of problem 2 on faces.

    python3 p5_gan/train.py --data_dir first9000.zip squashed.zip:6-58      # 100 minutes on two cores; face rate 93.9 %
    python3 p5_gan/train.py --data_dir ... --resume                   # goes on where the last run stopped
    python3 p5_gan/train.py --data_dir face/train                     # the course's set
    torchrun --nproc_per_node=4 p5_gan/train.py --data_dir ...        # several GPUs; --batch_size is for all together

What --data_dir takes: faces.py. The faces 8001 to 9000 are kept for validation. Writes into --output_dir:
    last.pt         everything that --resume needs, every --save_every steps
    model.pt        the generator's EMA weights in half precision, for inference.py
    metrics.jsonl   one line per checkpoint, see below
    samples_*.png   32 faces from latents that are always the same

Whether the two players match is in metrics.jsonl: the discriminator's mean logits of real and generated images and the
share that it classifies rightly (1 means that it has won, 0.5 that it guesses), the gradients' norms of both, and the
share of images that is augmented, which rises when the discriminator knows its training faces by heart.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, image_generators, int_between, nonempty_path, randn, run

import torch
from torchvision.utils import make_grid

import training
from faces import add_arguments, training_faces
from p5_gan.losses import LOSSES
from p5_gan.model import Discriminator, Generator
from transforms import as_input, random_mirror, to_uint8


def parse_args():
    parser = argument_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p5_gan/output", help="where to write")
    training.add_arguments(parser, epochs=50, batch_size=64, lr=2e-4, warmup=100, weight_decay=0.0, ema=0.999,
                           save_every=500)
    parser.add_argument("--loss", choices=sorted(LOSSES), default="cross_entropy",
                        help="what the two players minimise")
    parser.add_argument("--no_augment", action="store_true", help="show the discriminator the images as they are")
    parser.add_argument("--latents", type=int_between(1), default=128, help="length of the latent vector")
    parser.add_argument("--channels", type=int_between(1), default=32, help="width of both networks at 32x32")
    parser.add_argument("--no_modulation", action="store_true", help="normalise every image alike in the generator")
    args = parser.parse_args()
    if args.optimizer == "muon":
        raise UserError("--optimizer muon has no matrix to train here; leave it out")
    return args


def make_optimizers(network, args):
    """Those of training.py with the momentum of DCGAN: a longer memory of the other player's past does harm."""
    optimizers = training.make_optimizers(network, args)
    optimizers[-1].param_groups[0]["betas"] = (0.5, 0.99)
    return optimizers


def gradient_norm(network):
    """The norm of the whole gradient, (1,); (0,) where it overflows, a step that the loss scaler of float16 skips."""
    norm = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()[None]
    return norm[norm.isfinite()]


def sample_grid(generator, device):
    """A picture, uint8 (3, H, W), of 32 faces from fixed latents."""
    with torch.no_grad():
        images = generator(randn(image_generators(0, range(32)), (generator.latents,), device))
    return make_grid(to_uint8((images + 1) / 2).cpu(), nrow=8)


def main():
    args = parse_args()
    process, saved = training.start(args, "p5_gan")
    device = process.device
    images = training_faces(args.data_dir).images.to(device)
    per_epoch = training.steps_per_epoch(len(images), args.batch_size)
    total = args.epochs * per_epoch

    training.seed_all(args.seed)
    config = dict(latents=args.latents, channels=args.channels, modulated=not args.no_modulation)
    generator = Generator(**config).to(device, memory_format=torch.channels_last)
    discriminator = Discriminator(args.channels).to(device, memory_format=torch.channels_last)
    generator_parts = training.make_parts(generator, make_optimizers(generator, args), process, saved)
    discriminator_parts = training.make_parts(discriminator, make_optimizers(discriminator, args), process,
                                              saved and saved["discriminator"])
    discriminator_parts = discriminator_parts._replace(ema=discriminator)  # its average would serve nobody
    generate, discriminate = (training.distribute(network, process) for network in (generator, discriminator))
    discriminator_loss, generator_loss = LOSSES[args.loss]
    metrics, means = saved["metrics"] if saved else [], training.Means()
    training.announce(f"{len(images)} faces", process, total, generator, discriminator)

    for step in training.steps(args, process, saved, total, images):
        real = random_mirror(as_input(images[training.batch_indices(step, len(images), args, process)]))
        factor, decay = training.warmup_cosine(step, total, args.warmup), training.ema_decay(args.ema, step)
        with autocast(device, process.dtype):
            generated = generate(torch.randn(len(real), args.latents, device=device))
            on_real, on_generated = discriminate(torch.cat([real, generated.detach()])).chunk(2)
            loss = discriminator_loss(on_real, on_generated)
        training.update(discriminator_parts, loss, factor, 0.0, clip=None)
        right = torch.cat([on_real > 0, on_generated < 0]).float()
        means.add(real_logit=on_real, generated_logit=on_generated, accuracy=right, discriminator_loss=loss,
                  discriminator_gradient=gradient_norm(discriminator), augmented=discriminator.augment.share)
        if not args.no_augment:
            discriminator.augment.adapt(on_real.detach())

        discriminator.requires_grad_(False)
        with autocast(device, process.dtype):
            loss = generator_loss(discriminator(generated))
        training.update(generator_parts, loss, factor, decay, clip=None)
        discriminator.requires_grad_(True)
        means.add(generator_loss=loss, generator_gradient=gradient_norm(generator))
        if not training.due(args, step, total):
            continue
        training.log(metrics, means, step, per_epoch, args, generator_parts, process)
        if process.rank == 0:
            description = dict(kind="p5_gan", config=config, recipe=training.recipe(args), metrics=metrics)
            weights = discriminator.state_dict()
            state = dict(model=weights, ema=weights, scaler=discriminator_parts.scaler.state_dict(),
                         optimizer=[o.state_dict() for o in discriminator_parts.optimizers])
            training.save(args.output_dir, generator_parts, step, description,
                          sample_grid(generator_parts.ema, device), discriminator=state)


if __name__ == "__main__":
    run(main)
