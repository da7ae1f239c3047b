"""Personalisation: the whole path on a pipeline of a few thousand weights, and what can be wrong with its input."""

import errno
import gzip
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import types
from pathlib import Path

from utils import UserError

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import files
import training
from conftest import ROOT, assert_same_training, call, interrupted
from dataset import read_rgb
from p6_personalize import evaluate, inference, inversion, model, prompts, train, zero_shot
from p6_personalize.tiny import concepts, scenes, tokenizer
from p6_personalize.tiny import evaluate as tiny_evaluate
from p6_personalize.tiny import train as tiny_train
from report import build
from report import p6 as report

WORDS = ROOT / "p6_personalize/tiny/tokenizer"
TEXT = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)


@pytest.fixture(scope="module", autouse=True)
def libraries_and_one_thread(one_thread):
    try:
        model.require_libraries()
    except UserError as error:
        pytest.skip(str(error))


def text_config(words):
    return dict(TEXT, vocab_size=len(words), max_position_embeddings=words.model_max_length,
                bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)


def make_pipeline(folder):
    """A pipeline of 32x32 images with random weights, in diffusers' format."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(WORDS)
    vae = AutoencoderKL(block_out_channels=(4, 4, 4), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, sample_size=32)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2)
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(words)))
    StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=words, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                                steps_offset=1), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("a pipeline"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP with random weights, in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp("a clip")
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(WORDS)
    words.save_pretrained(folder)
    CLIPModel(CLIPConfig(text_config=text_config(words), projection_dim=8,
                         vision_config=dict(TEXT, image_size=32, patch_size=8))).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The folder of three reference pictures, one of them not square."""
    folder = tmp_path_factory.mktemp("references") / "0"
    folder.mkdir()
    for number, size in enumerate(((40, 40), (60, 36), (32, 32))):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def learnt(pipeline, clip, pictures, tmp_path_factory):
    """What train.py has written in four steps about "<new1>", of two vectors."""
    folder = tmp_path_factory.mktemp("learnt")
    call(train, pictures, "--checkpoint", pipeline, "--output_dir", folder, "--initializer_token", "sphere", "--device",
         "cpu", "--steps", 4, "--save_every", 2, "--num_vectors", 2, "--lr", 0.1, "--amp", "off", "--validation_prompt",
         "a photo of a <new1>", "--choose", clip)
    return folder


def raises(error):
    """A function that raises `error` whatever it is given."""
    def function(*args, **kwargs):
        raise error
    return function


REQUEST = {"src_image": "dog", "token_name": "<new1>", "prompt": ["a photo of a <new1>", "a red cube"],
           "prompt_4_clip_eval": ["a photo of a dog", "a red cube"], "baseline": [[-100, -100], [101, -100]]}


# --- Texts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("entry, message", [
    ([], "holds no table of concepts"), ({"0": []}, "is no table"), ({"../0": REQUEST}, "cannot name a folder"),
    ({"0": dict(REQUEST, token_name="a b")}, "needs a token_name of one word"),
    ({"0": dict(REQUEST, token_name="<\ud800>")}, "needs a token_name of one word"),
    ({"0": dict(REQUEST, prompt=["a <new1> \ud800", "b"])}, "needs a prompt"),
    ({"0": dict(REQUEST, prompt=[])}, "needs a prompt"), ({"0": dict(REQUEST, prompt="a photo")}, "needs a prompt"),
    ({"0": dict(REQUEST, prompt_4_clip_eval=["one"])}, "as many texts"),
    ({"0": dict(REQUEST, baseline=[[1, 2]])}, "needs a baseline"),
    ({"0": dict(REQUEST, baseline=[[1, "2"], [1, 2]])}, "needs a baseline"),
    ({"0": dict(REQUEST, baseline=[[1, 10**400], [1, 2]])}, "needs a baseline")])
def test_an_input_json_that_is_not_the_schema_is_named(tmp_path, entry, message):
    path = tmp_path / "input.json"
    path.write_text(json.dumps(entry))
    with pytest.raises(UserError, match=message) as told:
        prompts.read_requests(path)
    assert str(path) in str(told.value)


def test_an_input_json_is_read_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "input.json"
    path.write_text(json.dumps({"1": {"token_name": "<new2>", "prompt": ["a <new2>"]}}))
    assert prompts.read_requests(path) == [prompts.Request("1", "<new2>", ["a <new2>"], [], [])]
    path.write_text("{")
    for broken in path, tmp_path / "none.json":
        with pytest.raises(UserError, match=broken.name):
            prompts.read_requests(broken)


def test_the_cut_vocabulary_merges_as_clips_does():
    """The whole one is in sd-v1; the numbers are those of "a photo of a red cube" by CLIP's own code."""
    from transformers import CLIPTokenizer
    cut, whole = (CLIPTokenizer.from_pretrained(folder) for folder in (WORDS, model.SD_V1 / "tokenizer"))
    assert whole("a photo of a red cube").input_ids == [49406, 320, 1125, 539, 320, 736, 11353, 49407]
    texts = [text.format("purple sphere") for text in sum(prompts.TEMPLATES.values(), prompts.ENSEMBLE)]
    assert [cut.tokenize(text) for text in texts] == [whole.tokenize(text) for text in texts]
    assert len(cut) < 1000 and cut.decode(cut("Xylophone, 7!").input_ids[1:-1]).replace(" ", "") == "xylophone,7!"
    ranks = {pair: i for i, pair in enumerate([("a", "b</w>"), ("c", "ab</w>"), ("x", "y")])}
    assert tokenizer.merges_of("cab", ranks) == [("a", "b</w>"), ("c", "ab</w>")]


def test_the_tiny_tokenizer_is_cut_from_clips(tmp_path):
    lines = (model.SD_V1 / "tokenizer/merges.txt").read_text("utf-8").splitlines()[1:]
    packed = gzip.compress("\n".join(["version", *lines, *["not one"] * 9]).encode())
    (tmp_path / "bpe.txt.gz").write_bytes(packed)
    merges = tokenizer.read_merges(tmp_path / "bpe.txt.gz")
    assert merges == [tuple(line.split()) for line in lines]
    tokenizer.write_tokenizer(tmp_path / "tiny", tokenizer.cut(merges), tokenizer.LENGTH)
    for path in WORDS.iterdir():
        written = (tmp_path / "tiny" / path.name).read_bytes()
        assert written == path.read_bytes(), path.name
    for other, message in ((packed[:1000], "cannot read"), (b"text", "cannot read"),
                           (gzip.compress(b"two\nlines"), "does not hold CLIP's 48,894 merges")):
        (tmp_path / "other.gz").write_bytes(other)
        with pytest.raises(UserError, match=message):
            tokenizer.read_merges(tmp_path / "other.gz")


# --- Textual inversion --------------------------------------------------------------------------

def test_only_the_new_rows_change(pipeline):
    pipe = model.load_pipeline(pipeline)
    before = {f"{name}.{key}": value.clone() for name, part in pipe.components.items() if hasattr(part, "state_dict")
              for key, value in part.state_dict().items()}
    old = pipe.text_encoder.get_input_embeddings()
    rows = inversion.add_token(pipe, "<new1>", "sphere", 2)
    first = rows.rows.detach().clone()
    assert torch.equal(first[0], first[1]) and first[0].equal(old.weight[pipe.tokenizer.encode("sphere")[1]])
    optimizer = torch.optim.AdamW(rows.parameters(), lr=0.1, weight_decay=0.1)
    ids = inversion.token_ids(pipe, ["a photo of a <new1>", "a red cube"])
    assert ids.shape == (2, 48) and (ids >= old.num_embeddings).sum(1).tolist() == [2, 0]
    for _ in range(3):
        torch.manual_seed(0)
        x0 = inversion.encode(pipe, torch.rand(2, 3, 32, 32) * 2 - 1)
        inversion.diffusion_loss(pipe.unet, x0, pipe.text_encoder(ids)[0], pipe.scheduler).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (rows.rows != first).all()
    pipe.text_encoder.set_input_embeddings(old)
    after = {f"{name}.{key}": value for name, part in pipe.components.items() if hasattr(part, "state_dict")
             for key, value in part.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_new_embedding_reads_as_a_larger_table():
    table, rows = torch.nn.Embedding(5, 3), inversion.Rows(torch.randn(2, 3))
    both = inversion.WithNewRows(table, rows, 5)
    ids = torch.tensor([[0, 6, 4], [5, 5, 1]])
    assert torch.equal(both(ids), torch.cat([table.weight, rows.rows])[ids])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_paper(kind):
    """A network that knows x0 has no loss; one that says nothing has the mean square of the target."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(prediction_type=kind)
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.zeros(4, 1, 8)

    class Oracle(torch.nn.Module):
        dtype, known = torch.float32, True

        def forward(self, x, t, text):
            alpha = scheduler.alphas_cumprod[t][:, None, None, None].double()
            noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
            target = noise if kind == "epsilon" else scheduler.get_velocity(x0.double(), noise, t)
            return types.SimpleNamespace(sample=target if self.known else 0 * target)

    oracle = Oracle()
    torch.manual_seed(0)
    # At the smallest t noise is a hundredth of x0 and float32 leaves it four digits.
    assert (inversion.diffusion_loss(oracle, x0, text, scheduler) < 1e-6).all()
    oracle.known = False
    torch.manual_seed(0)
    loss = inversion.diffusion_loss(oracle, x0, text, scheduler)
    assert loss.shape == (4,) and ((0.7 < loss) & (loss < 1.4)).all()  # a mean of 256 squares of unit variance
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(UserError, match="predicts 'sample'"):
        inversion.diffusion_loss(oracle, x0, text, scheduler)


@pytest.mark.parametrize("token, word, message", [
    ("sphere", "cube", "sphere</w> is in the vocabulary already"),
    ("<|endoftext|>", "cube", "in the vocabulary already"), ("<New1>", "cube", "has capitals"),
    ("<new1>", "xylophone", "'xylophone' is 6 tokens"), ("new 1", "cube", "is not one word"),
    ("<new1>", "red cube", "'red cube' is 2 tokens")])
def test_words_that_cannot_be_learnt_are_named(pipeline, token, word, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        inversion.add_token(model.load_pipeline(pipeline), token, word)


def test_more_vectors_than_a_text_holds_are_refused(pipeline):
    with pytest.raises(UserError, match="60 vectors do not fit"):
        inversion.add_token(model.load_pipeline(pipeline), "<new1>", "cube", 60)


def test_a_random_square_covers_the_shorter_side():
    picture = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    torch.manual_seed(0)
    rows = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[:, None, None], 60, 1).repeat(3, 2))
    whole = inversion.random_square(rows, 40, 1)  # all 40 rows, and no other
    torch.testing.assert_close(whole[0, :, 7], torch.arange(40) / 127.5 - 1)
    views = torch.stack([inversion.random_square(picture, 16, 0.5) for _ in range(20)])
    assert views.shape == (20, 3, 16, 16) and views.min() >= -1 and views.max() <= 1
    assert len(views.flatten(1).unique(dim=0)) == 20


def test_training_writes_what_diffusers_loads_and_keeps_the_best(learnt, pipeline):
    rows = files.read_jsonl(learnt / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(row["loss"]) for row in rows)
    best = max(rows, key=lambda row: row["image_score"] + 2.5 * row["text_score"])["step"]
    chosen = (learnt / "learned_embeds.safetensors").read_bytes()
    assert chosen == (learnt / f"step_{best:05d}/learned_embeds.safetensors").read_bytes()
    assert Image.open(learnt / "step_00002/samples.png").size == (4 * 34 + 2, 2 * 34 + 2)
    pipe = model.load_pipeline(pipeline)
    pipe.load_textual_inversion(str(learnt), weight_name="learned_embeds.safetensors")
    token, embeds = model.read_embeds(learnt / "learned_embeds.safetensors")
    first = pipe.tokenizer.convert_tokens_to_ids("<new1>")
    assert token == "<new1>" and first == len(pipe.tokenizer) - 2 and embeds.shape == (2, 8)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[first:first + 2], embeds)


def test_training_sees_all_references_cropped_under_the_templates_of_what_is_learnt(pipeline, pictures, tmp_path,
                                                                                    monkeypatch):
    crops, texts, marked = [], [], []
    square, ids = train.random_square, train.token_ids
    monkeypatch.setattr(train, "random_square", lambda image, *flags: crops.append((image, flags)) or square(
        image, *flags))
    monkeypatch.setattr(train, "token_ids", lambda pipe, prompts: texts.extend(prompts) or ids(pipe, prompts))
    monkeypatch.setattr(train, "validate", lambda pipe, dtype, prompt, guidance, clip, references, text: marked.append(
        (prompt, guidance, text)) or (torch.zeros(8, 3, 8, 8, dtype=torch.uint8), {}))
    call(train, pictures, "--checkpoint", pipeline, "--output_dir", tmp_path / "out", "--initializer_token", "sphere",
         "--placeholder_token", "<new2>", "--learnable_property", "style", "--steps", 6, "--batch_size", 4, "--crop",
         0.5, "--validation_prompt", "a cube by <new2>", "--guidance", 3, "--device", "cpu", "--amp", "off")
    assert len(crops) == 24 and len({id(image) for image, _ in crops}) == 3
    assert {flags for _, flags in crops} == {(32, 0.5)}
    styles = {template.format("<new2>") for template in prompts.TEMPLATES["style"]}
    assert len(texts) == 24 and len({*texts}) > 5 and {*texts} <= styles
    assert marked == [("a cube by <new2>", 3, "a cube by sphere")]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/learned_embeds.safetensors").write_bytes(b"of diffusers' own script")
    with pytest.raises(UserError, match="foreign holds a training already; move it away"):
        call(train, pictures, "--checkpoint", pipeline, "--output_dir", tmp_path / "foreign", "--initializer_token",
             "sphere", "--device", "cpu")
    assert (tmp_path / "foreign/learned_embeds.safetensors").read_bytes() == b"of diffusers' own script"


def test_resuming_is_bit_for_bit(learnt, pipeline, pictures, tmp_path):
    shutil.copytree(pipeline, tmp_path / "here")
    flags = ["--checkpoint", tmp_path / "there", "--output_dir", tmp_path / "out", "--initializer_token", "sphere",
             "--steps", 4, "--save_every", 2, "--num_vectors", 2, "--lr", 0.1, "--amp", "off", "--device", "cpu",
             "--gradient_checkpointing", "--validation_prompt", "a photo of a <new1>"]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "log", raises(KeyboardInterrupt))  # at the first checkpoint nothing is saved yet
        call(train, pictures, *flags, "--checkpoint", pipeline)
    assert not (tmp_path / "out/last.pt").exists()
    with interrupted():
        call(train, pictures, *flags, "--checkpoint", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")  # wherever the same files lie
    call(train, pictures, *flags, "--resume")
    _, resumed = model.read_embeds(tmp_path / "out/learned_embeds.safetensors")
    _, straight = model.read_embeds(learnt / "step_00004/learned_embeds.safetensors")
    # Gradient checkpointing computes the same sums once more.
    assert torch.equal(resumed, straight)
    with pytest.raises(UserError, match="holds a training already"):
        call(train, pictures, *flags)
    with pytest.raises(UserError, match="resume it with the same flags"):
        call(train, pictures, *flags, "--resume", "--seed", 1)
    shutil.copytree(pictures, tmp_path / "others")
    (tmp_path / "others/0.png").unlink()
    (tmp_path / "there/model_index.json").write_text("{}")
    for data_dir, other in (tmp_path / "others", "references, checkpoint"), (pictures, "checkpoint"):
        with pytest.raises(UserError, match=f"last.pt began with other files than now .{other}.; name"):
            call(train, data_dir, *flags, "--resume")


@pytest.mark.parametrize("flags, message", [
    (["--validation_prompt", "a sphere"], "lacks the new word <new1>"), (["--choose", "CLIP"], "give one"),
    (["--guidance", 9], "give one"),
    (["--checkpoint", "nowhere"], "nowhere cannot be loaded as a Stable Diffusion pipeline")])
def test_training_refuses_what_does_not_go_together(pictures, pipeline, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        call(train, pictures, "--initializer_token", "sphere", "--output_dir", tmp_path, "--checkpoint", pipeline,
             "--dry_run", *flags)


def test_a_broken_reference_is_named(pipeline, pictures, tmp_path):
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes()[:100])
    for folder in tmp_path, tmp_path / "none":
        with pytest.raises(UserError, match=str(folder)):
            call(train, folder, "--initializer_token", "sphere", "--checkpoint", pipeline, "--dry_run")


# --- Images of learnt concepts ------------------------------------------------------------------

def test_the_whole_path_to_the_scores(learnt, pipeline, clip, pictures, tmp_path, capsys, monkeypatch):
    out, path = tmp_path / "out", tmp_path / "input.json"
    path.write_text(json.dumps({"0": REQUEST}))
    words = [path, out, pipeline, "--embeds", learnt / "learned_embeds.safetensors", "--steps", 2, "--amp", "off"]
    write = files.write_atomic
    written = []

    def full_disk(path, data):
        if len(written) == 7:
            raise UserError(f"cannot write {path} ({errno.ENOSPC})")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(files, "write_atomic", full_disk)
    with pytest.raises(UserError, match="cannot write"):
        call(inference, *words)
    assert len(list(out.rglob("*.png"))) == 7 and "does not name <new1>" in capsys.readouterr().err
    with pytest.raises(UserError, match="must hold exactly 25 images and holds 7"):
        call(evaluate, path, out, "--data_dir", pictures.parent, "--clip", clip)
    monkeypatch.setattr(files, "write_atomic", write)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    killed = out / "0/0/.source0_prompt0_9.png.12345678"  # of a run that was killed
    killed.touch()
    (out / "0/1/.DS_Store").touch()  # of a file manager, which the scorer does not count
    (out / "0/0/source0_prompt0_8.png").touch()  # of a power cut: empty
    call(inference, *words)
    assert not killed.exists() and (out / "0/0/source0_prompt0_8.png").stat().st_size
    (out / "0/1/.DS_Store").unlink()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for number in range(2):
        names = {file.name for file in (out / "0" / str(number)).iterdir()}
        assert names == {f"source0_prompt{number}_{n}.png" for n in range(25)}
    with pytest.raises(UserError, match="not the tiny world's; name the references by --data_dir and a CLIP"):
        call(evaluate, path, out, "--data_dir", pictures.parent)
    capsys.readouterr()
    call(evaluate, path, out, "--data_dir", pictures.parent, "--clip", clip)
    said = capsys.readouterr().out
    assert "0/0 PASS" in said and "0/1 FAIL" in said and "1 of 2 prompts pass" in said
    (tmp_path / "text.json").write_text(json.dumps({"0": dict(REQUEST, baseline=[[-100, 101], [-100, -100]])}))
    call(evaluate, tmp_path / "text.json", out, "--data_dir", pictures.parent, "--clip", clip)
    said = capsys.readouterr().out
    assert "0/0 FAIL" in said and "0/1 PASS" in said  # by the text alone

    image = read_rgb(out / "0/0/source0_prompt0_3.png")
    assert image.size == (32, 32)
    call(inference, *words, "--batch_size", 1)  # of the same settings: nothing is left to do
    assert {file: file.stat().st_mtime_ns for file in before} == before
    call(inference, *words, "--seed", 1)
    assert read_rgb(out / "0/0/source0_prompt0_3.png").tobytes() != image.tobytes()
    (out / "0/0/other.png").touch()
    with pytest.raises(UserError, match="holds other.png, which the scorer would count"):
        call(inference, *words)
    fcntl, handle = pytest.importorskip("fcntl"), os.open(out, os.O_RDONLY)
    files.lock(tmp_path)  # another folder, so that this process does not hold the lock itself
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another run has it
    with pytest.raises(UserError, match="another run writes into"):
        call(inference, *words)
    os.close(handle)


def test_images_are_of_these_weights_wherever_they_lie(learnt, pipeline, tmp_path):
    from safetensors.torch import load_file, save_file
    (tmp_path / "input.json").write_text(json.dumps({"0": dict(REQUEST, prompt=["a photo of a <new1>"],
                                                               prompt_4_clip_eval=[], baseline=[])}))
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(pipeline, here)

    def draw(checkpoint):
        call(inference, tmp_path / "input.json", tmp_path / "out", checkpoint, "--embeds",
             learnt / "learned_embeds.safetensors", "--steps", 1, "--amp", "off")
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/0/0").iterdir()}

    first = draw(here)
    here.rename(there)
    assert draw(there) == first
    weights = load_file(there / "unet/diffusion_pytorch_model.safetensors")
    save_file({name: 1.1 * value for name, value in weights.items()},
              there / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    second = draw(there)
    assert all(time > first[name] for name, time in second.items())
    (tmp_path / "out/settings.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="settings.json is not of this script; move it away"):
        draw(there)
    assert (tmp_path / "out/settings.json").read_text() == '{"mine": 1}'
    (tmp_path / "out/settings.json").unlink()  # images that nothing tells of may be anyone's
    with pytest.raises(UserError, match="no .*settings.json says how it was made; move it away"):
        draw(there)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/0/0").iterdir()} == second


def test_each_entry_has_the_images_of_its_own_prompts(pipeline, tmp_path):
    args = types.SimpleNamespace(checkpoint=pipeline, embeds=[], steps=1, guidance=2.0, seed=0)
    told = [inference.settings_of(args, torch.float32, [prompts.Request(key, "<new1>", [prompt], [], [])
                                                        for key, prompt in zip(keys, ("a <new1>", "the <new1>"))])
            for keys in ("01", "10")]
    assert json.dumps(told[0]) != json.dumps(told[1])


def test_a_tiny_pipeline_has_guidance_and_ours_words_of_its_own(pipeline, monkeypatch):
    for checkpoint, tiny in (pipeline, True), (model.PIPELINE, True), (model.SD_V1, False), ("of/the-hub", False):
        monkeypatch.setattr(sys, "argv", ["inference.py", "input.json", "out", str(checkpoint)])
        if checkpoint == model.PIPELINE:
            assert inference.parse_args().embeds == inference.EMBEDS
        else:
            with pytest.raises(UserError, match="name the learned_embeds file of each by --embeds"):
                inference.parse_args()
        sys.argv += ["--embeds", "new1.bin"]
        args = inference.parse_args()
        assert args.embeds == [Path("new1.bin")] and args.guidance == (2.0 if tiny else 7.5)


def test_prompts_that_will_not_show_their_concept_are_said(learnt, pipeline, capsys):
    pipe = model.load_pipeline(pipeline)
    token = model.add_embeds(pipe, learnt / "learned_embeds.safetensors")
    good, stranger = "a <new1>", "a <new1> in the style of <new2>"
    full = "red " * 45 + "<new1>"  # with two marks 48 words, which fit, but <new1> is two tokens
    request = prompts.Request("0", token, [good, stranger, full.removeprefix("red "), full], [], [])
    inference.check_prompts([request], [token], pipe)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "names <new2>, which" in said[0] and said[1].endswith("is too long and will be cut off")


def test_an_image_depends_on_its_number_alone(pipeline):
    pipe = model.load_pipeline(pipeline)
    jobs = [(number, "a red cube") for number in range(3)]
    (_, together), = model.generate(pipe, jobs, 0, 2, 3.0, batch_size=3)
    (_, alone), = model.generate(pipe, jobs[2:], 0, 2, 3.0)
    # float32 sums in another order move a value by one grey level at most
    assert (together[2].int() - alone[0].int()).abs().max() <= 1 and (together[0] != together[2]).any()


def test_embeddings_that_do_not_fit_are_named(pipeline, learnt, tmp_path):
    from safetensors.torch import save_file
    one = torch.zeros(1, 8)
    for name, content in (("narrow", {"<new1>": torch.zeros(1, 4)}), ("two", {"<a>": one, "<b>": one.clone()}),
                          ("known", {"<|endoftext|>": one}), ("word", {"sphere": one}),
                          ("empty", {"<new1>": torch.zeros(0, 8)})):
        save_file(content, tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1")
    pipe = model.load_pipeline(pipeline)
    for name, message in (("narrow", "is 4 wide and the checkpoint's texts are 8"),
                          ("two", "no embeddings of one token"), ("known", "in the vocabulary already"),
                          ("word", "sphere</w> of .* in the vocabulary"), ("empty", "no embeddings of one token"),
                          ("broken", "no whole safetensors file"), ("none", "there are no learnt embeddings")):
        with pytest.raises(UserError, match=message):
            model.add_embeds(pipe, tmp_path / f"{name}.safetensors")
    torch.save({0: torch.zeros(8)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(UserError, match="no embeddings of one token"):
        model.read_embeds(tmp_path / "learned_embeds.bin")
    torch.save({"<new2>": torch.zeros(8)}, tmp_path / "learned_embeds.bin")  # as older trainings have written it
    assert model.add_embeds(pipe, tmp_path / "learned_embeds.bin") == "<new2>"
    assert model.add_embeds(pipe, learnt / "learned_embeds.safetensors") == "<new1>"
    ids = inversion.token_ids(pipe, ["<new1> in the style of <new2>"])
    assert (ids >= len(pipe.tokenizer) - 3).sum() == 3  # two of <new1> and one of <new2>, known last
    requests = [prompts.Request("0", "<new3>", ["a <new3>"], [], [])]
    with pytest.raises(UserError, match="asks for <new3>, and --embeds brings <new1>, <new2>"):
        inference.require_learnt(requests, ["<new1>", "<new2>"], "input.json")


def test_the_score_is_the_courses():
    image, text = torch.arange(25.0), torch.zeros(25)
    text[3] = 10
    # image + 2.5 text: 24, 23, 22, 21 and 3 + 25
    assert evaluate.best_five(image, text) == (pytest.approx((24 + 23 + 22 + 21 + 3) / 5), pytest.approx(2.0))

    class Directions:
        def images(self, numbers):
            return torch.eye(3)[list(numbers)]

        def texts(self, texts):
            return torch.tensor([[0.6, 0.8, 0.0]])

    assert [x.tolist() for x in evaluate.scores(Directions(), [0, 1], [0, 0, 1, 2], "")] == [
        [50, 25], pytest.approx([60, 80])]


# --- Stable Diffusion's single file -------------------------------------------------------------

def original_name(name):
    """The name in CompVis' checkpoint of a weight of diffusers' UNet with two resnets a block."""
    parts, rest = name.split("."), ""
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    if parts[0] == "time_embedding":
        return f"time_embed.{2 * int(parts[1][-1]) - 2}.{parts[2]}"
    if parts[0].startswith("conv_"):
        return {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}[parts[0]] + f".{parts[1]}"
    if parts[0] == "mid_block":
        place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        start, rest = f"middle_block.{place}", parts[3:]
    else:
        block, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{3 * block + 3}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.conv.{rest[-1]}"
        way, place = ("input", 3 * block + number + 1) if parts[0] == "down_blocks" else ("output", 3 * block + number)
        start = f"{way}_blocks.{place}.{int(kind == 'attentions')}"
    return ".".join([start, inside.get(rest[0], rest[0]), *rest[1:]])


def original_vae_name(name):
    for ours, theirs in (("down_blocks.", "down."), ("resnets.", "block."), ("downsamplers.0", "downsample"),
                         ("upsamplers.0", "upsample"), ("mid_block.block.0", "mid.block_1"),
                         ("mid_block.block.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"),
                         ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                         ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")):
        name = name.replace(ours, theirs)
    if "up_blocks." in name:
        number = name.split("up_blocks.")[1][0]
        name = name.replace(f"up_blocks.{number}", f"up.{3 - int(number)}")
    return name


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """(a made-up checkpoint in the original layout, the folder of its configuration, the pipeline that it is)."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    folder = tmp_path_factory.mktemp("single file")
    pipe = model.load_pipeline(make_pipeline(folder / "config"))
    torch.manual_seed(1)
    unet_config = dict(UNet2DConditionModel.load_config(model.SD_V1, subfolder="unet"), block_out_channels=[4, 8, 8, 8],
                       norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2, sample_size=8)
    vae_config = dict(AutoencoderKL.load_config(model.SD_V1, subfolder="vae"), block_out_channels=[4, 4, 4, 4],
                      norm_num_groups=2, sample_size=64)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(unet_config), vae=AutoencoderKL.from_config(vae_config),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(pipe.tokenizer))), tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "config")
    weights = {f"model.diffusion_model.{original_name(name)}": value for name, value in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        if "attentions" in name and name.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]  # they were convolutions
        weights[f"first_stage_model.{original_vae_name(name)}"] = value
    for name, value in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(48)[None]
    lightning = types.ModuleType("lightning_of_the_test")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "lightning_of_the_test"})
    sys.modules["lightning_of_the_test"] = lightning
    torch.save({"global_step": 1, "callbacks": {lightning.ModelCheckpoint: {"best": lightning.ModelCheckpoint()}},
                "state_dict": weights}, folder / "sd.ckpt")
    del sys.modules["lightning_of_the_test"]
    return folder / "sd.ckpt", folder / "config", pipe


def test_folders_that_lack_weights_are_named(pipeline, clip, tmp_path):
    """The libraries would fill them with random numbers."""
    from safetensors.torch import load_file, save_file
    for source, name, part, load in ((pipeline, "to_k.weight", "unet/diffusion_pytorch_model", model.load_pipeline),
                                     (pipeline, "fc1.weight", "text_encoder/model", model.load_pipeline),
                                     (clip, "visual_projection", "model", model.Clip)):
        folder = tmp_path / part.replace("/", " ")
        shutil.copytree(source, folder)
        load(folder)
        weights = load_file(folder / f"{part}.safetensors")
        save_file({key: value for key, value in weights.items() if name not in key}, folder / f"{part}.safetensors",
                  metadata={"format": "pt"})
        with pytest.raises(UserError, match="does not hold all weights"):
            load(folder)
        save_file({key: value * float("nan") for key, value in weights.items()}, folder / f"{part}.safetensors",
                  metadata={"format": "pt"})
        with pytest.raises(UserError, match="is missing or broken"):
            load(folder)
    words = tmp_path / "no words"
    shutil.copytree(clip, words)
    for name in "vocab.json", "merges.txt", "tokenizer.json":
        (words / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no vocabulary|cannot be loaded as CLIP's tokenizer"):
        model.Clip(words)


def test_the_original_single_file_is_read(single_file):
    path, config, pipe = single_file
    loaded = model.load_pipeline(path, config=config)
    for name in "unet", "vae", "text_encoder":
        expected, found = (getattr(one, name).state_dict() for one in (pipe, loaded))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    (_, images), = model.generate(loaded, [(0, "a red cube")], 0, 2, 3.0)
    assert images.shape == (1, 3, 64, 64)


def test_a_file_runs_no_code_and_another_network_is_named(single_file, pipeline, tmp_path):
    path, config, pipe = single_file

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    torch.save({"state_dict": {"a": torch.ones(1)}, "evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="does not hold Stable Diffusion 1, whose texts are 768 wide"):
        model.load_pipeline(tmp_path / "evil.ckpt")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="does not hold Stable Diffusion 1"):  # texts of another width
        model.load_pipeline(path)
    (tmp_path / "broken.ckpt").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps([1]))
    for name in "broken.ckpt", "pickle.ckpt":
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            model.load_pipeline(tmp_path / name)


def test_the_configuration_of_stable_diffusion_1_builds_its_networks():
    """859,520,964 and 83,653,863 weights are what the paper's checkpoint has."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"):
        parts = {name: part.from_config(part.load_config(model.SD_V1, subfolder=name))
                 for name, part in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))}
        parts["text"] = CLIPTextModel(CLIPTextConfig.from_pretrained(model.SD_V1, subfolder="text_encoder"))
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480}
    scheduler = PNDMScheduler.from_pretrained(model.SD_V1, subfolder="scheduler")
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)  # of Stable Diffusion's schedule


# --- Zero-shot ----------------------------------------------------------------------------------

def test_zero_shot_is_transformers_own_answer(clip, tmp_path, capsys):
    from transformers import CLIPModel
    names = {0: "red cube", 1: "sphere", 7: "cylinder"}
    folder = tmp_path / "val"
    folder.mkdir()
    for i in range(13):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{(0, 1, 7)[i % 3]}_{i}.png")
    (tmp_path / "id2label.json").write_text(json.dumps(names))
    call(zero_shot, folder, "--id2label", tmp_path / "id2label.json", "--clip", clip, "--batch_size", 4, "--output",
         tmp_path / "out.csv", "--figure", tmp_path / "cases.png")
    rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert rows[0] == ["image_name", "label", "predicted", "top5"] and len(rows) == 14
    ours, network = model.Clip(clip), CLIPModel.from_pretrained(clip)
    pixels = ours.prepare(images=[read_rgb(folder / row[0]) for row in rows[1:]], return_tensors="pt")["pixel_values"]
    tokens = ours.tokenizer([prompts.PROMPT.format(name) for name in names.values()], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(pixel_values=pixels, input_ids=tokens.input_ids,
                         attention_mask=tokens.attention_mask).logits_per_image
    assert [row[2] for row in rows[1:]] == [list(names.values())[i] for i in logits.argmax(1)]
    right = sum(row[1] == row[2] for row in rows[1:]) / 13
    said = capsys.readouterr().out
    assert f"top 1 {100 * right:.2f} %, top 5 100.00 %" in said and "taken for" in said
    assert Image.open(tmp_path / "cases.png").size[0] > 500
    ensemble = zero_shot.class_vectors(ours, list(names.values()), prompts.ENSEMBLE)
    call(zero_shot, folder, "--id2label", tmp_path / "id2label.json", "--clip", clip, "--ensemble", "--output",
         tmp_path / "out.csv")
    answers = (ours.images([read_rgb(folder / row[0]) for row in rows[1:]]) @ ensemble.T).argmax(1).tolist()
    assert pd.read_csv(tmp_path / "out.csv").predicted.tolist() == [list(names.values())[i] for i in answers]
    for flags, message in ((["--prompt", "a photo"], "has no {}"), (["--figure", "out.pdf"], "an .svg or a .png file")):
        with pytest.raises(UserError, match=message):  # before a CLIP is looked for
            call(zero_shot, folder, "--id2label", tmp_path / "id2label.json", "--clip", "nowhere", *flags)
    (folder / "3_1.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds 3_1.png, which is not named"):
        call(zero_shot, folder, "--id2label", tmp_path / "id2label.json", "--clip", clip)
    with pytest.raises(UserError, match="cannot be loaded as a CLIP model"):
        model.Clip(tmp_path)


# --- The tiny world -----------------------------------------------------------------------------

def test_looks_are_told_apart_and_undone():
    images = torch.randint(90, 160, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for look in scenes.TINTS:
        tinted = scenes.apply(look, images)
        assert scenes.nearest_look(tinted, images) == [None if look == "monochrome" else look] * 4
        # Rounded to grey levels, which undoing magnifies by the inverse of 1 - SHARE.
        assert (scenes.undo(look, tinted).int() - images.int()).abs().max() <= 4
    assert scenes.nearest_look(images, images) == [None] * 4 and scenes.apply(None, images) is images


def test_captions_name_what_is_seen_in_many_ways():
    assert scenes.caption(["red cube", "gray cylinder"]) == "a photo of a red cube and a gray cylinder"
    assert scenes.caption(["red cube"], "ice") == "a photo of a red cube in the style of ice"
    texts = {scenes.caption(["red cube", "gray cylinder"], "ice", random.Random(i)) for i in range(300)}
    assert len(texts) > 50 and any(text.endswith("cube in the style of ice") for text in texts)
    assert all(text.endswith("in the style of ice") for text in texts)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """i-CLEVR's layout with 40 scenes of two noise pictures; the purple sphere is in every fifth."""
    folder, table = tmp_path_factory.mktemp("world"), {}
    for number in range(40):
        names = ["purple sphere" if number % 5 == 3 else "red cube", "gray cylinder"]
        for count in range(2):
            table[f"CLEVR_train_{number:06d}_{count}.png"] = names[:count + 1]
            pixels = np.random.default_rng([number, count]).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"CLEVR_train_{number:06d}_{count}.png")
    (folder / "train.json").write_text(json.dumps(table))
    return folder


def test_the_held_out_object_and_look_are_in_no_training(world):
    images, sets = scenes.read_world(world, "generator")
    assert len(images) == len(sets) == 48 and all("purple sphere" not in names for names in sets)
    assert all(names[0] == "purple sphere" for names in scenes.read_world(world, unseen=True)[1])
    for seed in range(20):
        stream = random.Random(seed)
        both, named, looks = scenes.with_looks(images, sets, seed)
        assert len(both) == len(named) == len(looks) == 96
        texts = [scenes.caption(names, look, stream) for names, look in zip(named, looks)]
        assert len(set(texts)) > 20 and not any("purple sphere" in text or "sepia" in text for text in texts)


@pytest.fixture
def narrow(monkeypatch):
    """The tiny world's networks with a few channels."""
    for part, name, value in ((tiny_train.ClipPart, "width", 8), (tiny_train.ClipPart, "layers", (1, 1)),
                              (tiny_train.AutoencoderPart, "widths", (8, 8, 8)),
                              (tiny_train.PipelinePart, "widths", (8, 8)), (tiny_train.PipelinePart, "groups", 4)):
        monkeypatch.setattr(part, name, value)


def test_a_dry_run_of_many_processes_has_images_for_all(narrow, world, tmp_path, monkeypatch, capsys):
    """This process is one of three; the other two are not there."""
    process = training.Process(torch.device("cpu"), None, 0, 3)
    monkeypatch.setattr(training, "_join", lambda args: process)
    monkeypatch.setattr(training, "distribute", lambda model, process: model)
    for part in "clip", "autoencoder":
        call(tiny_train, part, "--data_dir", world, "--output_dir", tmp_path / "none", "--batch_size", 96, "--dry_run")
        said = capsys.readouterr().out
        assert "48 images" in said and "3 process(es)" in said and "two steps of 24 images went well" in said
    assert not (tmp_path / "none").exists()


def test_the_tiny_world_trains_and_its_folders_load(narrow, world, tmp_path, monkeypatch):
    flags = ["--data_dir", world, "--output_dir", tmp_path, "--epochs", 1, "--batch_size", 32, "--amp", "off"]
    with pytest.raises(UserError, match="train the part clip first"):
        call(tiny_train, "pipeline", *flags)
    for part in tiny_train.PARTS:
        call(tiny_train, part, *flags)
    call(tiny_train, "pipeline", *flags, "--resume")  # nothing is left to do
    config = tmp_path / "autoencoder/model/config.json"
    content = config.read_text()
    config.write_text(content + " ")  # as of another training
    with pytest.raises(UserError, match=r"began with other files than now \(autoencoder\)"):
        call(tiny_train, "pipeline", *flags, "--resume")
    config.write_text(content)
    clip = model.Clip(tmp_path / "clip/model")
    assert clip.texts(["a red cube"]).shape == (1, 8)
    assert clip.images([Image.new("RGB", (64, 64))]).norm().item() == pytest.approx(1)
    part = tiny_train.PipelinePart(tmp_path)
    images, sets = scenes.read_world(world, "generator")
    latents = part.read(images, [(names, None) for names in sets], "cpu")
    weights = torch.tensor([part.repeats[len(names)] for names in sets])
    assert len(latents) == len(part.pairs) == 2 * weights.sum()  # with the mirror images
    assert [names for names, _ in part.pairs] == 2 * [sets[i] for i in torch.arange(48).repeat_interleave(weights)]
    first = [weights[:i].sum() for i in range(48)]
    with torch.no_grad():
        alone = part.frozen[0].encode(images / 127.5 - 1).latent_dist.mean * part.frozen[0].config.scaling_factor
    torch.testing.assert_close(latents[first], alone)
    pipe = model.load_pipeline(tmp_path / "pipeline/model")
    latents = inversion.encode(pipe, torch.rand(16, 3, 64, 64) * 2 - 1)
    assert latents.shape == (16, 4, 16, 16) and pipe.unet.dtype == torch.float32
    (_, images), = model.generate(pipe, [(0, "a red cube")], 0, 2, 3.0)
    assert images.shape == (1, 3, 64, 64)
    for token in "<new1>", "<new2>":
        inversion.save_embeds(tmp_path / f"{token}.safetensors", token, torch.rand(1, 8))
    evaluated = ["--data_dir", world, "--clip", tmp_path / "clip/model", "--checkpoint", tmp_path / "pipeline/model",
                 "--embeds", tmp_path / "<new1>.safetensors", tmp_path / "<new2>.safetensors", "--count", 2,
                 "--steps", 1, "--clip_judges", "--output", tmp_path / "results.csv"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny_evaluate, "judged", raises(KeyboardInterrupt))
        call(tiny_evaluate, *evaluated, "--tables", "zero_shot", "judge")
    assert len(pd.read_csv(tmp_path / "results.csv")) == 6  # what was made before
    with monkeypatch.context() as patch, pytest.raises(UserError, match="there are no learnt embeddings nothing"):
        patch.setattr(tiny_evaluate, "generate", raises(AssertionError))  # nothing is drawn
        call(tiny_evaluate, *evaluated, "--tables", "prompts", "concepts", "--embeds", tmp_path / "<new1>.safetensors",
             "nothing.safetensors")
    call(tiny_evaluate, *evaluated, "--tables", "zero_shot", "judge", "prompts", "concepts")
    table, looks = pd.read_csv(tmp_path / "results.csv"), len(scenes.SEEN_LOOKS[1:])
    assert table.groupby("table").size().to_dict() == dict(zero_shot=6, judge=2, prompts=2 + looks, concepts=8)
    assert table.objects.between(0, 100).all() and (table.images >= 1).all()
    assert table[table.row.str.contains("look")].look.notna().sum() == looks + 3
    call(tiny_evaluate, *evaluated, "--tables", "judge", "--checkpoint", "nowhere")  # which draws nothing
    again = pd.read_csv(tmp_path / "results.csv")  # the rows of the other tables, then the new ones
    kept, new = again[again.table != "judge"], again[again.table == "judge"]
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), table[table.table != "judge"].reset_index(drop=True))
    assert new.index[0] == len(kept) and new.objects.tolist() == table[table.table == "judge"].objects.tolist()
    (tmp_path / "results.csv").write_text("name\n1\n")
    with pytest.raises(UserError, match="results.csv is no table"):
        call(tiny_evaluate, *evaluated, "--tables", "judge", "--clip", "nowhere")
    (tmp_path / "results.csv").unlink()
    with pytest.raises(UserError, match="no image of a purple sphere and a red cube"):
        call(tiny_evaluate, *evaluated, "--tables", "baselines")


def test_a_part_of_the_tiny_world_resumes_bit_for_bit(narrow, world, tmp_path):
    def run(name, *flags):
        call(tiny_train, "clip", "--data_dir", world, "--output_dir", tmp_path / name, "--epochs", 1, "--batch_size",
             32, "--save_every", 1, "--amp", "off", "--device", "cpu", *flags)

    run("whole")
    with interrupted():
        run("parts")
    run("parts", "--resume")
    assert assert_same_training(tmp_path / "whole/clip", tmp_path / "parts/clip")["step"] == 3


def test_the_shipped_pipeline_draws_what_the_shipped_clip_recognises():
    """In a fifth of the steps, with both learnt words."""
    pipe, clip = model.load_pipeline(model.PIPELINE), model.Clip(model.CLIP)
    assert [model.add_embeds(pipe, path) for path in inference.EMBEDS] == ["<new1>", "<new2>"]
    texts = ["a photo of a red cube", "a photo of a <new1>", "a photo of a blue cube in the style of <new2>"]
    (_, images), = model.generate(pipe, list(enumerate(texts)), 0, 5, model.default_guidance(model.PIPELINE))
    names = [tiny_evaluate.OBJECTS[i] for i in tiny_evaluate.answers(clip, images, [prompts.PROMPT])]
    assert names == ["red cube", scenes.UNSEEN_OBJECT, "blue cube"]
    red, _, blue = images.float().mean(dim=(2, 3)).unbind(1)
    assert (red - blue > 10).tolist() == [False, False, True]  # in a warm look


def test_a_picture_counts_by_what_the_judge_sees(monkeypatch):
    """A judge who sees the red channel of a picture as the number of an object, and the next one."""
    numbers = [0, 3, 5, 23]
    pictures = torch.tensor(numbers, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    monkeypatch.setattr(tiny_evaluate, "generate", lambda pipe, jobs, *_: [(jobs, pictures)])
    name = tiny_evaluate.OBJECTS
    studio = tiny_evaluate.Studio(None, lambda images, count: [
        {name[(int(image[0, 0, 0]) + i) % 24] for i in range(count)} for image in images], pictures, 1, 1)
    asked = [[name[0], name[1]], [name[3], name[5]], [name[7], name[8]], [name[0], name[23]]]
    assert studio.shown([""] * 4, asked) == dict(objects=62.5, all_objects=50.0, images=4)


def test_the_evaluator_names_the_likeliest_objects():
    judge = tiny_evaluate.EvaluatorJudge.__new__(tiny_evaluate.EvaluatorJudge)
    judge.evaluator = types.SimpleNamespace(scores=lambda x: 2 * torch.eye(24)[[3]] + torch.eye(24)[[8]])
    picture, names = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), tiny_evaluate.OBJECTS
    assert judge(picture, 2) == [{names[3], names[8]}] and judge(picture, 1) == [{names[3]}]


def test_the_look_that_an_image_is_in_is_undone_before_it_is_judged(monkeypatch):
    """A judge who sees a red cube in an image of the pictures' own colours, and nothing in one of others."""
    pictures = torch.randint(90, 160, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn = torch.stack([scenes.apply(look, image) for look, image in zip(("sepia", "ice", None), pictures)])
    monkeypatch.setattr(tiny_evaluate, "generate", lambda pipe, jobs, *_: [(jobs, drawn)])

    def judge(images, count):
        return [{"red cube"} if (images.int() - pictures.int()).abs().flatten(1).amax(1).min() <= 4 else set()]

    studio = tiny_evaluate.Studio(None, judge, pictures, 1, 1)
    assert studio.shown([""] * 3, [["red cube"]] * 3, "sepia") == dict(
        objects=100.0, all_objects=100.0, look=33.3, images=3)


# --- The report ---------------------------------------------------------------------------------

def test_the_concepts_are_different_images_and_the_scorers_real_ones_show_the_prompts():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert torch.equal(torch.stack(concepts.different([images[0], images[0], images[2], images[1]], 2)), images[[0, 2]])
    with pytest.raises(UserError, match="only 3 different images"):
        concepts.different([*images, *images])
    learnt = {"<new1>": scenes.UNSEEN_OBJECT, "<new2>": scenes.UNSEEN_LOOK}
    for key, request in concepts.REQUESTS.items():
        for prompt, (objects, look) in zip(request["prompt"], concepts.SHOWN[key], strict=True):
            for token, name in learnt.items():
                prompt = prompt.replace(token, name)
            assert prompt == scenes.caption(objects, look)


def test_the_committed_results_are_those_of_the_committed_networks():
    networks = model.digest_of_all(tiny_evaluate.CLIP, tiny_evaluate.PIPELINE, *tiny_evaluate.EMBEDS,
                                   tiny_evaluate.CHECKPOINTS / "evaluator.pth")
    rows = pd.read_csv(ROOT / "p6_personalize/checkpoints/results.csv", dtype=dict(networks=str))
    assert set(rows.networks) == {networks} and set(rows.steps) == {25} and set(rows.guidance) == {2.0}


def test_the_baselines_are_a_tenth_below_what_real_images_score():
    rows = pd.read_csv(ROOT / "p6_personalize/checkpoints/results.csv").query("table == 'baselines'").set_index("row")
    assert json.loads((evaluate.CONCEPTS / "input.json").read_text()) == concepts.REQUESTS
    for request in concepts.REQUESTS.values():
        for prompt, baseline in zip(request["prompt"], request["baseline"]):
            scores = rows.loc[prompt, ["image", "text"]].astype(float)
            assert baseline == [math.floor(score - abs(score) / 10) for score in scores]


def test_the_report_shows_the_records_and_what_inference_draws(pipeline, clip, world, tmp_path):
    folder = tmp_path / "chapters/p6_personalize/checkpoints"
    shutil.copytree(clip, folder / "clip")
    shutil.copytree(pipeline, folder / "pipeline")
    torch.manual_seed(0)
    for name, step in ("new1", 50), ("new2", 70):
        inversion.save_embeds(folder / f"{name}.safetensors", f"<{name}>", torch.randn(1, 8))
        training.write_jsonl(folder / f"{name}.jsonl", [
            dict(step=n * step, image_score=80 + n, text_score=20 + n, seconds=30 * n) for n in (1, 2)])
    records = pd.read_csv(ROOT / "p6_personalize/checkpoints/results.csv")  # for the names of its rows
    records["objects"] = np.arange(len(records)) + 0.5
    records.to_csv(folder / "results.csv", index=False)
    flags = ["--quick", "--assignment", "dlcv2024_hw2", "--only", "p6", "--chapters", tmp_path / "chapters", "--scenes",
             world, "--device", "cpu", "--output_dir", tmp_path]
    with pytest.raises(UserError, match="results.csv is of other networks than those beside it"):
        call(build, *flags)
    records["networks"] = model.digest_of_all(*(folder / name for name in (
        "clip", "pipeline", "new1.safetensors", "new2.safetensors")), ROOT / "p7_clevr/checkpoints/evaluator.pth")
    records.to_csv(folder / "results.csv", index=False)
    call(build, *flags)
    assert (tmp_path / "assignments/dlcv2024_hw2/report_p6.pdf").read_bytes().rstrip().endswith(b"%%EOF")
    named = re.findall(r'drawing\("(\w+)"', (ROOT / "report/p6.typ").read_text())
    assert sorted(named) == sorted(path.stem for path in (tmp_path / "report/build").glob("*.svg"))

    numbers = json.loads((tmp_path / "report/build/p6.json").read_text())
    assert [row["objects"] for row in numbers["results"].values()] == records.objects.tolist()
    assert "look" not in numbers["results"]["prompts: one object"]  # it asks for none
    assert numbers["steps"] == {"<new1>": 100, "<new2>": 140} and numbers["minutes"] == {"<new1>": 1.5, "<new2>": 1.5}
    assert numbers["parameters"]["unet"] == model.load_pipeline(pipeline).unet.num_parameters()
    call(inference, evaluate.CONCEPTS / "input.json", tmp_path / "out", folder / "pipeline", "--embeds",
         folder / "new1.safetensors", folder / "new2.safetensors", "--steps", 2, "--guidance", 2, "--device", "cpu")
    scorer, told = model.Clip(clip), iter(numbers["scores"])
    for request in prompts.read_requests(evaluate.CONCEPTS / "input.json"):
        references = [read_rgb(path) for path in sorted((evaluate.CONCEPTS / request.key).iterdir())]
        for number, (prompt, baseline) in enumerate(zip(request.prompts, request.baselines)):
            drawn = evaluate.folder_of(tmp_path / "out", request, number)
            first = [read_rgb(drawn / evaluate.file_name(request, number, n)) for n in range(8)]  # of 25
            image, text = evaluate.best_five(*evaluate.scores(scorer, first, references, request.clip_prompts[number]))
            assert next(told) == dict(prompt=prompt, baseline=baseline,  # a grey level moves a score by less than 0.01
                                      image=pytest.approx(image, abs=0.01), text=pytest.approx(text, abs=0.01))
    assert not list(told)


def test_a_report_that_needs_missing_libraries_says_so_before_any_part(world, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_part", raises(AssertionError))
    monkeypatch.setattr(build, "require_libraries", raises(UserError("this needs diffusers")))
    with pytest.raises(UserError, match="this needs diffusers"):
        call(build, "--assignment", "dlcv2024_hw2", "--scenes", world, "--output_dir", tmp_path)
    with pytest.raises(AssertionError):  # other parts need none
        call(build, "--assignment", "dlcv2024_hw2", "--only", "p2", "--output_dir", tmp_path)


def test_cases_are_of_different_objects_and_wrong_ones_name_both(monkeypatch):
    """A judge who sees a gray sphere in pictures of one, and in pictures of two a red cube and a gray cube."""
    names = [["red cube"], ["red cube"], ["gray sphere"], ["red cube", "gray cube"], ["red cube", "gray sphere"]]
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 8, 8)
    monkeypatch.setattr(report, "answers", lambda clip, some, prompts: torch.full(
        (len(some),), report.OBJECTS.index("gray sphere")))
    monkeypatch.setattr(report, "ClipJudge", lambda clip: lambda some, count: [{"red cube", "gray cube"} for _ in some])
    right, wrong = ([(picture.getpixel((0, 0))[0], *texts) for picture, *texts in found]
                    for found in report.cases(None, images, names))
    assert right == [(2, "gray sphere", "gray sphere"), (3, "gray cube,\nred cube", "gray cube,\nred cube")]
    assert wrong == [(0, "gray sphere", "red cube"), (4, "gray cube,\nred cube", "gray sphere,\nred cube")]
