"""Trains the three networks of the tiny world, one after the other: CLIP, the autoencoder, the diffusion pipeline.

    python3 p6_personalize/tiny/train.py clip --data_dir DIR
    python3 p6_personalize/tiny/train.py autoencoder --data_dir DIR
    python3 p6_personalize/tiny/train.py pipeline --data_dir DIR      # needs what the other two have written

--resume, --dry_run and torchrun as in every train.py. DIR is that of p7_clevr. Writes into --output_dir, for each part
a folder of its name with last.pt and metrics.jsonl, and `model`, a folder in the format of transformers or diffusers in
half precision. p6_personalize/checkpoints holds clip/model and pipeline/model as clip and pipeline: the first two took
four and three minutes on an H200 (losses 0.28 and 0.018), how the third (0.118) was trained the README of 2024 says.
"""

import argparse
import copy
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import UserError, argument_parser, autocast, nonempty_path, run

import torch
from torch import nn
from tqdm import tqdm

import training
from p6_personalize.inversion import diffusion_loss
from p6_personalize.model import check_begun, digests_of, require_libraries
from p6_personalize.tiny.scenes import caption, read_world, with_looks
from transforms import as_input, random_affine

TOKENIZER = Path(__file__).resolve().parent / "tokenizer"


class Captions:
    """Token numbers of captions, said anew at every call, by the tiny world's tokenizer."""

    def __init__(self):
        from transformers import CLIPTokenizer
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)

    def __call__(self, pairs, drop=0.0):
        """int64 (B, length) for a list of (objects, look); the share `drop` of them says nothing."""
        stream = random.Random(int(torch.randint(2**31, ())))
        texts = ["" if stream.random() < drop else caption(*pair, stream) for pair in pairs]
        return self.tokenizer(texts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
                              return_tensors="pt").input_ids

    def full(self, pairs):
        """The same for captions that name all objects and the look."""
        texts = [caption(random.sample(names, len(names)), look) for names, look in pairs]
        return self.tokenizer(texts, padding="max_length", max_length=self.tokenizer.model_max_length,
                              return_tensors="pt").input_ids


class ClipPart(nn.Module):
    """CLIP: images and captions that belong together are near each other (Radford et al. 2021, figure 3)."""

    defaults = dict(epochs=40, batch_size=128, lr=1e-3, warmup=200, weight_decay=0.1, ema=0.998, save_every=140)
    optimizer, needs = "adamw", ()
    width, layers = 128, (3, 4)  # of text and image

    def __init__(self, folder):
        super().__init__()
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
        self.captions = Captions()
        tokenizer = self.captions.tokenizer
        size = dict(hidden_size=self.width, intermediate_size=4 * self.width, num_attention_heads=4,
                    projection_dim=self.width, hidden_act="quick_gelu")
        self.model = CLIPModel(CLIPConfig(
            text_config=dict(size, num_hidden_layers=self.layers[0], vocab_size=len(tokenizer),
                             max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
            vision_config=dict(size, num_hidden_layers=self.layers[1], image_size=64, patch_size=8),
            projection_dim=self.width))
        self.prepare = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64},
                                          image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def read(self, images, pairs, device):
        self.pairs = pairs
        return images.to(device)

    def forward(self, images, indices):
        """The loss of each image and caption, (B,). Pairs that say the same are right for each other."""
        x = as_input(images[indices])
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x, x.flip(3))
        x = random_affine(x, zoom=(0.87, 1.15), stretch=0.1, shift=0.12)
        pairs = [self.pairs[i] for i in indices.tolist()]
        logits = self.model(input_ids=self.captions.full(pairs).to(x.device), pixel_values=x).logits_per_image.float()
        names = [(frozenset(objects), look) for objects, look in pairs]
        same = torch.tensor([[one == other for other in names] for one in names], device=x.device).float()
        targets = same / same.sum(1, keepdim=True)
        return -(targets * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1) / 2

    def save(self, folder, inputs):
        copy.deepcopy(self.model).half().save_pretrained(folder)
        shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
        self.prepare.save_pretrained(folder)


class AutoencoderPart(nn.Module):
    """The KL autoencoder of Rombach et al. 2022, without its adversary: 64x64 pixels are 16x16 latents of 4 values."""

    defaults = dict(epochs=3, batch_size=32, lr=1e-3, warmup=100, weight_decay=0.01, ema=0.998, save_every=250)
    optimizer, needs = "muon", ()
    widths = 32, 32, 64  # at 64x64, 32x32 and 16x16

    def __init__(self, folder):
        super().__init__()
        from diffusers import AutoencoderKL
        self.model = AutoencoderKL(
            block_out_channels=self.widths, down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=8, sample_size=64)

    def read(self, images, pairs, device):
        return images.to(device)

    def forward(self, images, indices):
        """Absolute error and a little of the KL divergence from N(0, 1), per value: (B,)."""
        x = as_input(images[indices])
        x = random_affine(x, zoom=(0.95, 1.2), shift=0.1)
        posterior = self.model.encode(x).latent_dist
        error = (self.model.decode(posterior.sample()).sample.float() - x).abs().flatten(1).mean(1)
        return error + 1e-4 * posterior.kl().float() / posterior.mean[0].numel()

    @torch.no_grad()
    def save(self, folder, images):
        latents = self.model.encode(as_input(images[::len(images) // 256 + 1])).latent_dist.mean
        # A deviation of 2: the noise of a timestep hides less of the small objects than at 1.
        self.model.register_to_config(scaling_factor=round(2 / latents.std().item(), 4))
        copy.deepcopy(self.model).half().save_pretrained(folder)


class PipelinePart(nn.Module):
    """Latent diffusion; the UNet and CLIP's text tower train together (Rombach et al. 2022, section 3.3)."""

    defaults = dict(epochs=8, batch_size=64, lr=8e-4, warmup=300, weight_decay=0.01, ema=0.999, save_every=250)
    optimizer, needs = "muon", ("clip", "autoencoder")
    widths, groups = (64, 128), 32  # at 16x16 and 8x8; of the normalisation
    repeats = {1: 1, 2: 3}  # how often an epoch shows a scene of so many objects: two are harder to learn

    def __init__(self, folder):
        super().__init__()
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel
        for name in self.needs:
            if not (folder / name / "model/config.json").is_file():
                raise UserError(f"there is no {folder / name / 'model'}; train the part {name} first")
        self.captions, self.frozen = Captions(), [AutoencoderKL.from_pretrained(
            folder / "autoencoder/model", low_cpu_mem_usage=False).float().eval().requires_grad_(False)]
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "clip/model").float()
        self.unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=self.widths, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=self.groups,
            cross_attention_dim=self.text_encoder.config.hidden_size, attention_head_dim=4)  # which counts heads
        self.unet.set_attn_processor(AttnProcessor())  # plain products: on a CPU a fused kernel takes longer
        self.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                                       clip_sample=False, steps_offset=1, timestep_spacing="trailing")

    @torch.no_grad()
    def read(self, images, pairs, device):
        """The latents of all images and of their mirror images, which are needed many times."""
        vae, both = self.frozen[0].to(device), torch.cat([images, images.flip(-1)])
        latents = torch.cat([vae.encode(as_input(batch.to(device))).latent_dist.mean
                             for batch in tqdm(both.split(64), "latents", disable=None)]) * vae.config.scaling_factor
        pairs = 2 * pairs[:len(images)]
        shown = [i for i, (objects, _) in enumerate(pairs) for _ in range(self.repeats[len(objects)])]
        self.pairs = [pairs[i] for i in shown]
        return latents[shown]

    def forward(self, latents, indices):
        ids = self.captions([self.pairs[i] for i in indices.tolist()], drop=0.1).to(latents.device)
        return diffusion_loss(self.unet, latents[indices], self.text_encoder(ids)[0], self.scheduler)

    def save(self, folder, inputs):
        from diffusers import StableDiffusionPipeline
        self.frozen[0].register_to_config(_name_or_path="")  # not where it was read from here
        unet, text_encoder, vae = (copy.deepcopy(part).half()
                                   for part in (self.unet, self.text_encoder, self.frozen[0]))
        StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, unet=unet, tokenizer=self.captions.tokenizer,
                                scheduler=self.scheduler, safety_checker=None, feature_extractor=None,
                                requires_safety_checker=False).save_pretrained(folder)
        shutil.rmtree(folder / "tokenizer")  # in the format of this release of transformers alone
        shutil.copytree(TOKENIZER, folder / "tokenizer")


PARTS = {"clip": ClipPart, "autoencoder": AutoencoderPart, "pipeline": PipelinePart}


def parse_args():
    parser = argument_parser(__doc__)
    parts = parser.add_subparsers(dest="part", required=True, help="what to train")
    for name, part in PARTS.items():
        one = parts.add_parser(name, help=part.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--data_dir", type=nonempty_path, default=ROOT / "iclevr", help="train.json and the images")
        one.add_argument("--output_dir", type=nonempty_path, default=ROOT / "p6_personalize/output",
                         help="where the folders of the three parts go")
        training.add_arguments(one, **part.defaults)
        one.set_defaults(optimizer=part.optimizer)
    return parser.parse_args()


def main():
    args = parse_args()
    require_libraries()
    folder, args.output_dir = args.output_dir, args.output_dir / args.part
    training.seed_all(args.seed)
    model = PARTS[args.part](folder)
    process, saved = training.start(args, f"p6_personalize_{args.part}")
    config = {name: digests_of(folder / name / "model") for name in model.needs}
    check_begun(saved, config, args.output_dir / "last.pt")
    images, sets, looks = with_looks(*read_world(args.data_dir, "generator"))
    inputs = model.read(images[:16 * process.count if args.dry_run else None], list(zip(sets, looks)), process.device)
    per_epoch = training.steps_per_epoch(len(inputs), args.batch_size)
    total = args.epochs * per_epoch

    parts = training.make_parts(model.to(process.device), training.make_optimizers(model, args), process, saved)
    network = training.distribute(model, process)
    metrics, means = saved["metrics"] if saved else [], training.Means()
    training.announce(f"{len(inputs)} images", process, total, model)
    for step in training.steps(args, process, saved, total, images):
        batch = training.batch_indices(step, len(inputs), args, process)
        random.seed(int(torch.randint(2**31, ())))
        with autocast(process.device, process.dtype):
            loss = network(inputs, batch)
        training.update(parts, loss.mean(), training.warmup_cosine(step, total, args.warmup),
                        training.ema_decay(args.ema, step))
        means.add(loss=loss)
        if training.due(args, step, total):
            training.log(metrics, means, step, per_epoch, args, parts, process)
            if process.rank == 0:
                parts.ema.save(args.output_dir / "model", inputs)
                training.save_training(args.output_dir, parts, step, kind=f"p6_personalize_{args.part}", config=config,
                                       recipe=training.recipe(args), metrics=metrics)


if __name__ == "__main__":
    run(main)
