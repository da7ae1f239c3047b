"""Networks that others designed: CLIP (Radford et al. 2021) and Stable Diffusion (Rombach et al. 2022).

Networks, tokenizer and schedulers are those of transformers and diffusers, loaded from disk and never from the network.
The libraries are imported where they are used: a script's --help needs none of them.
"""

import hashlib
import importlib.util
import os
import pickle
import types
from pathlib import Path

from utils import UserError, image_generators, in_batches, randn, require_finite

import torch

from files import digest_of, load_torch, load_weights, read_json
from transforms import to_uint8

HERE = Path(__file__).resolve().parent
SD_V1 = HERE / "sd-v1"  # the configuration and the tokenizer of Stable Diffusion 1, which its .ckpt file lacks
PIPELINE, CLIP = HERE / "checkpoints/pipeline", HERE / "checkpoints/clip"  # tiny/train.py's


def require_libraries():
    """UserError when a library is missing, or does not go with the others; else they keep quiet from here on."""
    install = f"python3 -m pip install -r '{HERE / 'requirements.txt'}'"
    missing = [name for name in ("diffusers", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {' and '.join(missing)}; install them: {install}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import diffusers
        import transformers
        from diffusers import StableDiffusionPipeline  # noqa: F401  imports what diffusers takes from transformers
    except (ImportError, RuntimeError) as error:
        raise UserError(f"diffusers and transformers do not go together ({str(error).strip().splitlines()[-1]}); "
                        f"install releases of one time: {install} --upgrade")
    for library in diffusers, transformers:
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def digests_of(path):
    """The digests of the weights and settings of a pipeline or a CLIP, wherever it lies; of one by name, its name."""
    files = [path] if path.is_file() else sorted(
        file for ending in ("safetensors", "bin", "json") for file in path.rglob(f"*.{ending}"))
    return [digest_of(file) for file in files] or str(path)


def digest_of_all(*paths):
    """One short digest of all that digests_of finds behind several paths."""
    return hashlib.sha256(repr([digests_of(path) for path in paths]).encode()).hexdigest()[:8]


def check_begun(saved, now, last):
    """UserError unless the training `saved`, None for a new one, in the file `last` began with the files whose digests
    the dict `now` holds; what it did not record is passed over."""
    begun = saved["config"] if saved else {}
    others = [name for name, digests in now.items() if begun.get(name, digests) != digests]
    if others:
        raise UserError(f"{last} began with other files than now ({', '.join(others)}); name or bring back those, or "
                        "start anew in another --output_dir")


def _loaded(function, path, what, **arguments):
    """function(path) of a library; UserError where it fails, as it does in many ways, on what is not on this disk."""
    if path in (PIPELINE, CLIP) and not path.exists():
        raise UserError(f"there is no {path}; 'bash hw2_download.sh' tells where it comes from, or name another folder")
    try:
        return function(str(path), local_files_only=True, **arguments)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded as {what} ({_reason(error)}); name a folder that holds one, or the "
                        "name of one that huggingface_hub has downloaded to this computer")


def _reason(error):
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _whole(part, path, what, **arguments):
    """part.from_pretrained(path); UserError when weights are missing, which the libraries make up, or are NaN."""
    network, report = _loaded(part.from_pretrained, path, what, output_loading_info=True, **arguments)
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    wrong += [name for name, weight in network.named_parameters() if not weight.isfinite().all()]
    if wrong:
        raise UserError(f"{path} does not hold all weights of {what}: {wrong[0]} is missing or broken; fetch it again")
    return network


def _tokenizer(path, **arguments):
    """CLIP's tokenizer; UserError without a vocabulary, where transformers 5 makes an empty one."""
    from transformers import CLIPTokenizer
    tokenizer = _loaded(CLIPTokenizer.from_pretrained, path, "CLIP's tokenizer", **arguments)
    if len(tokenizer) < 512:  # the single bytes alone
        raise UserError(f"{path} has no vocabulary of CLIP's tokenizer; fetch it again")
    return tokenizer


# --- CLIP ---------------------------------------------------------------------------------------

class Clip:
    """CLIP from a folder in transformers' format, or by the name of one downloaded before."""

    def __init__(self, path, device="cpu"):
        require_libraries()
        from transformers import CLIPImageProcessor, CLIPModel
        self.device = torch.device(device)
        self.model = _whole(CLIPModel, path, "a CLIP model").float().to(device).eval()
        self.tokenizer = _tokenizer(path)
        self.prepare = _loaded(CLIPImageProcessor.from_pretrained, path, "CLIP's image processor")

    @torch.no_grad()
    def images(self, images, batch_size=64):
        """Unit vectors (N, D) on the CPU of a list of PIL images in RGB."""
        def embed(batch):
            pixels = self.prepare(images=batch, return_tensors="pt")["pixel_values"].to(self.device)
            return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        return _unit([vectors for _, vectors in in_batches(embed, images, batch_size)])

    @torch.no_grad()
    def texts(self, texts, batch_size=256):
        """Unit vectors (N, D) on the CPU of a list of texts; what exceeds CLIP's 77 tokens is cut off."""
        def embed(batch):
            tokens = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt",
                                    max_length=self.model.config.text_config.max_position_embeddings)
            tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            return self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return _unit([vectors for _, vectors in in_batches(embed, list(texts), batch_size)])


def _unit(batches):
    vectors = torch.cat(batches).cpu()
    return vectors / vectors.norm(dim=1, keepdim=True)


# --- Stable Diffusion ---------------------------------------------------------------------------

def load_pipeline(path, device="cpu", dtype=None, config=SD_V1):
    """A StableDiffusionPipeline on `device`, its weights in `dtype` (float32 when None), from a folder in diffusers'
    format, the name of one downloaded before, or a single file such as sd-v1-4.ckpt, which `config` explains.
    """
    require_libraries()
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel
    path, what = Path(path), "a Stable Diffusion pipeline"
    if path.is_file():
        pipe = _from_single_file(path, config)
    else:
        pipe = _loaded(
            StableDiffusionPipeline.from_pretrained, path, what,
            text_encoder=_whole(CLIPTextModel, path, what, subfolder="text_encoder"),
            tokenizer=_tokenizer(path, subfolder="tokenizer"),
            **{name: _whole(part, path, what, subfolder=name, low_cpu_mem_usage=False)
               for name, part in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))},
            safety_checker=None, requires_safety_checker=False)
    for part in pipe.unet, pipe.vae, pipe.text_encoder:
        part.to(device, dtype or torch.float32).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_single_file(path, config):
    """The pipeline in one file with the original names of the weights (CompVis): .ckpt or .safetensors."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    weights = _read_single_file(path)
    width = UNet2DConditionModel.load_config(config, subfolder="unet")["cross_attention_dim"]
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    if name not in weights or weights[name].shape[1] != width:
        raise UserError(f"{path} does not hold Stable Diffusion 1, whose texts are {width} wide; name its file, or the "
                        "folder of another pipeline in diffusers' format")
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(config, subfolder="text_encoder"))
    prefix = "cond_stage_model.transformer."
    if not hasattr(text_encoder, "text_model"):  # transformers 5.6 took a layer of names away
        prefix += "text_model."
    load_weights(text_encoder, {name[len(prefix):]: value.float() for name, value in weights.items()
                                if name.startswith(prefix) and not name.endswith("position_ids")}, path)
    try:
        unet, vae = (part.from_single_file(dict(weights), config=str(config), subfolder=name, local_files_only=True)
                     for part, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")))
    except Exception as error:
        raise UserError(f"the weights in {path} are not those of Stable Diffusion 1 ({_reason(error)}); "
                        "fetch the file again")
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, unet=unet, safety_checker=None, feature_extractor=None,
        tokenizer=CLIPTokenizer.from_pretrained(config, subfolder="tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(config, subfolder="scheduler"), requires_safety_checker=False)


def _read_single_file(path):
    """{name: tensor}. The training's remains in a .ckpt file, PyTorch Lightning's objects, are passed over."""
    from safetensors.torch import load_file
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        module = types.SimpleNamespace(Unpickler=TensorUnpickler, __name__="tensors",
                                       load=lambda file, **options: TensorUnpickler(file, **options).load())
        content = torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
        weights = content.get("state_dict", content)
        return {name: value for name, value in weights.items() if torch.is_tensor(value)}
    except PermissionError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); fetch it again")


class TensorUnpickler(pickle.Unpickler):
    """Reads tensors and dicts. Any other object becomes an empty shell, so no code of the file's choice runs."""

    ALLOWED = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"),
               ("torch._utils", "_rebuild_parameter"), ("torch", "Size")}

    def find_class(self, module, name):
        storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        return super().find_class(module, name) if storage or (module, name) in self.ALLOWED else Shell


class Shell:
    """Stands for an object that is not read."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    append = extend = __setstate__


# --- Learnt embeddings --------------------------------------------------------------------------

def require_new(tokenizer, token, vectors, where=""):
    """UserError unless `token` is one word, in small letters, that the tokenizer does not know yet."""
    if token.split() != [token]:
        raise UserError(f"the token {token!r}{where} is not one word; take one such as <new1>")
    if token != token.lower():
        raise UserError(f"the token {token}{where} has capitals, which not every release of the tokenizer tells apart; "
                        f"take {token.lower()}")
    vocabulary = tokenizer.get_vocab()
    for name in token, token + "</w>", *(f"{token}_{number}" for number in range(1, vectors)):
        if name in vocabulary:
            raise UserError(f"the token {name}{where} is in the vocabulary already; take one that no text uses, such "
                            "as <new1>")


def read_embeds(path):
    """(token, rows (vectors, width)) of a learned_embeds file: .safetensors, or what torch.save has written."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"there are no learnt embeddings {path}; train them with p6_personalize/train.py")
        require_libraries()
        from safetensors.torch import load_file
        try:
            content = load_file(path)
        except Exception as error:
            raise UserError(f"{path} is no whole safetensors file ({type(error).__name__}); train it anew")
    else:
        content = load_torch(path, "file of embeddings")
    token, rows = next(iter(content.items())) if isinstance(content, dict) and len(content) == 1 else (None, None)
    if not isinstance(token, str) or not torch.is_tensor(rows) or rows.ndim not in (1, 2) or not rows.numel():
        raise UserError(f"{path} holds no embeddings of one token, {{\"<new1>\": rows}}; name a learned_embeds file")
    return token, torch.atleast_2d(rows.float())


def add_embeds(pipe, path):
    """Adds the token of a learned_embeds file to the pipeline and returns it; UserError when it does not fit."""
    token, rows = read_embeds(Path(path))
    width = pipe.text_encoder.config.hidden_size
    if rows.shape[1] != width:
        raise UserError(f"the embedding of {token} in {path} is {rows.shape[1]} wide and the checkpoint's texts are "
                        f"{width}: it was learnt with another network; train it with this one")
    require_new(pipe.tokenizer, token, len(rows), f" of {path}")
    pipe.load_textual_inversion({token: rows})
    return token


# --- Sampling -----------------------------------------------------------------------------------

def is_tiny(checkpoint):
    """Whether a pipeline is one of tiny/train.py, whose texts are narrower than the 768 of Stable Diffusion 1."""
    path = checkpoint / "unet/config.json"
    config = read_json(path) if path.is_file() else None
    width = config.get("cross_attention_dim") if isinstance(config, dict) else None
    return checkpoint == PIPELINE or (isinstance(width, int) and width < 768)  # the former also where it is missing


def default_guidance(checkpoint):
    """The strength of guidance for a pipeline: that of Stable Diffusion, or what suits a tiny one."""
    return 2.0 if is_tiny(checkpoint) else 7.5


@torch.no_grad()
def generate(pipe, jobs, seed, steps, guidance, batch_size=8):
    """Yields (jobs, images) batch by batch for a list of (number, prompt); images: uint8 (B, 3, H, W) on the CPU.

    DPM-Solver++ of second order (Lu et al. 2022) with the pipeline's noise schedule. guidance: as Stable Diffusion
    counts it, 1 is none. The noise of an image is keyed by (seed, number). UserError when one comes out as NaN.
    """
    from diffusers import DPMSolverMultistepScheduler
    if not isinstance(pipe.scheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)

    def images_of(batch):
        numbers, prompts = zip(*batch)
        latents = randn(image_generators(seed, numbers), shape, pipe.device).to(pipe.unet.dtype)
        images = pipe(list(prompts), latents=latents, num_inference_steps=steps, guidance_scale=guidance,
                      output_type="pt").images
        return to_uint8(require_finite(images.float().cpu(), [f"an image of {prompt!r}" for prompt in prompts]))

    yield from in_batches(images_of, jobs, batch_size)
