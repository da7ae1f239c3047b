"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): a concept becomes a new word, all else stays as it is.

The word's embedding v* is what minimises the diffusion loss on a few images (equation 2), over prompts that name it
in neutral contexts.
"""

from utils import UserError, autocast

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from files import write_atomic
from p6_personalize.evaluate import best_five, scores
from p6_personalize.model import generate, require_new
from transforms import as_input


class Rows(nn.Module):
    """What is learnt: the embeddings (vectors, width) of a new word, in float32."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone().float())


class WithNewRows(nn.Module):
    """A token embedding with Rows appended to it, whose own weights never meet an optimiser."""

    def __init__(self, embedding, new, first):
        super().__init__()
        self.embedding, self.new, self.first = embedding, new, first

    def forward(self, ids):
        is_new = ids >= self.first
        old = self.embedding(ids.masked_fill(is_new, 0))
        new = self.new.rows[(ids - self.first).clamp(min=0)].to(old.dtype)
        return torch.where(is_new[..., None], new, old)


def add_token(pipe, token, word, vectors=1):
    """Teaches the pipeline the word `token`, at first `vectors` times what `word` means; returns its Rows.

    As in diffusers, several vectors are the tokens <new1>, <new1>_1, ... which stand for <new1> in every prompt.
    """
    tokenizer = pipe.tokenizer
    require_new(tokenizer, token, vectors)
    if vectors > tokenizer.model_max_length - 20:  # beside them a template and two marks
        raise UserError(f"{vectors} vectors do not fit into a text of {tokenizer.model_max_length} tokens; take fewer")
    names = [token] + [f"{token}_{number}" for number in range(1, vectors)]
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"the initial word {word!r} is {len(ids)} tokens ({' '.join(tokenizer.tokenize(word))}); "
                        "take a word of one token")
    embedding = pipe.text_encoder.get_input_embeddings()
    if tokenizer.add_tokens(names) != vectors:
        raise UserError(f"the tokenizer takes no token {token}; take another one")
    first = tokenizer.convert_tokens_to_ids(token)
    rows = Rows(embedding.weight[ids[0]].expand(vectors, -1)).to(embedding.weight.device)
    pipe.text_encoder.set_input_embeddings(WithNewRows(embedding, rows, first))
    return rows


def token_ids(pipe, prompts):
    """int64 (B, length): the prompts padded to the text encoder's length, on its device."""
    prompts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
    return pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                          max_length=pipe.tokenizer.model_max_length).input_ids.to(pipe.device)


def random_square(image, size, smallest):
    """A random square of a PIL image, its side from `smallest` to 1 of the shorter side, mirrored or not: float
    (3, size, size) in [-1, 1]."""
    side = round(min(image.size) * float(torch.empty(()).uniform_(smallest, 1)))
    left, top = (int(torch.randint(length - side + 1, ())) for length in image.size)
    square = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    x = as_input(pil_to_tensor(square))
    return x if torch.rand(()) < 0.5 else x.flip(2)


def encode(pipe, images):
    """Latents, scaled to a variance near 1, of images (B, 3, H, W) in [-1, 1], sampled from the encoder's posterior."""
    with torch.no_grad():
        posterior = pipe.vae.encode(images.to(pipe.vae.dtype)).latent_dist
        return posterior.sample().float() * pipe.vae.config.scaling_factor


def diffusion_loss(unet, x0, text, scheduler):
    """The loss of each image, float (B,), at a random timestep (Gal et al. 2022, equation 2).

    x0: latents (B, C, H, W); text: the text encoder's states (B, length, width); the network predicts what `scheduler`
    says, the noise or v (Salimans & Ho 2022).
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(x0.device)
    t = torch.randint(len(alphas_cumprod), (len(x0),), device=x0.device)
    signal, sigma = (part.sqrt()[:, None, None, None] for part in (alphas_cumprod[t], 1 - alphas_cumprod[t]))
    noise = torch.randn_like(x0)
    targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * x0}
    kind = scheduler.config.prediction_type
    if kind not in targets:
        raise UserError(f"the checkpoint predicts {kind!r}, which cannot be trained here; take one that predicts "
                        f"{' or '.join(targets)}")
    prediction = unet((signal * x0 + sigma * noise).to(unet.dtype), t, text.to(unet.dtype)).sample
    return (prediction.float() - targets[kind]).square().flatten(1).mean(1)


def validate(pipe, dtype, prompt, guidance, clip=None, references=(), text=""):
    """(eight images of `prompt` from fixed noise, drawn in the precision `dtype`: uint8 (8, 3, H, W); their scores).

    The scores, 0-d tensors, are evaluate.py's: {"image_score": with PIL `references`, "text_score": with a `text`}; {}
    without a `clip`.
    """
    with autocast(pipe.device, dtype):
        images = torch.cat([batch for _, batch in generate(pipe, [(n, prompt) for n in range(8)], 0, 25, guidance)])
    if not clip:
        return images, {}
    image, text = best_five(*scores(clip, [to_pil_image(x) for x in images], references, text))
    return images, dict(image_score=torch.tensor(image, device=pipe.device),
                        text_score=torch.tensor(text, device=pipe.device))


def save_embeds(path, token, rows):
    """Writes what pipe.load_textual_inversion takes: {token: (vectors, width)} in float32, whole or not at all."""
    from safetensors.torch import save
    write_atomic(path, save({token: rows.detach().float().cpu().contiguous()}))
