"""diffusers' whole `WanImageToVideoPipeline` on a small random model, and ours beside it, stage by stage.

Nothing in theirs is patched: a hook on the transformer sees what it is given, a callback the latents of every step.
"""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import nano
import numpy as np
import test_clip
import test_dit
import test_umt5
import torch
import transformers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from reference import randomize
from tokenizers import Tokenizer, processors

from samplers import pipeline
from samplers.plan import Plan
from samplers.programs import Programs
from wanjax.checkpoint import Model
from wanjax.config import CLIPConfig, DiTConfig, UMT5Config

CLIP = CLIPConfig(num_layers=1, dim=32, num_heads=2, ffn_dim=64, image_size=16, patch_size=8)
UMT5 = UMT5Config(num_layers=1, dim=32, num_heads=2, head_dim=16, ffn_dim=64, vocab_size=64)
# diffusers has the text's length in its code.
DIT = DiTConfig(
    num_layers=2, dim=48, num_heads=2, ffn_dim=96, text_dim=32, text_length=512, freq_dim=32,
    image_dim=32, image_tokens=CLIP.num_tokens,
)  # fmt: skip
FRAMES, SIZE, STEPS, SHIFT = 9, (32, 48), 4, 3.0
WORDS = nano.WORDS[3:]


@dataclass
class Stages:
    """What one run computes, channels last, without the batch axis.

    Attributes:
      text, negative: embeddings [512, 32]; negative None without guidance.
      images: tokens [2, K, 32].
      condition: mask and latent [F, h, w, 20].
      timesteps: [steps], as the transformer was given them.
      latents: of every step, [F, h, w, 16] each.
      video: [T, H, W, 3] in -1..1, not rounded.
      pixels: the same in 0..255, rounded.
    """

    text: np.ndarray
    negative: np.ndarray | None
    images: np.ndarray
    condition: np.ndarray
    timesteps: np.ndarray
    latents: list[np.ndarray]
    video: np.ndarray
    pixels: np.ndarray


def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Word by word, closing with `</s>` as T5's does."""
    own = Tokenizer.from_file(str(nano.write_tokenizer(folder / "words.json")))
    close = own.token_to_id("</s>")
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", close)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **special)


def image_processor() -> transformers.CLIPImageProcessor:
    """CLIP's own settings at the small tower's size."""
    # transformers 5 renamed the Pillow processor, and gave the old name to one that needs torchvision.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(size={"shortest_edge": CLIP.image_size}, crop_size=CLIP.image_size)


def build(folder: Path) -> WanImageToVideoPipeline:
    """A first-and-last-frame pipeline with random weights and UniPC as its scheduler."""
    autoencoder = randomize(AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), 2)
    with torch.no_grad():  # latents and pixels in the range of the trained model's
        autoencoder.quant_conv.weight.mul_(4)
        autoencoder.decoder.conv_out.weight.mul_(0.5)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(folder), text_encoder=test_umt5.reference(UMT5, 1), vae=autoencoder,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        image_processor=image_processor(), image_encoder=test_clip.reference(CLIP, 3),
        transformer=test_dit.reference_model(DIT, 4),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def keyframe(seed: int, height: int, width: int) -> Image.Image:
    """Smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height))
    grain = rng.normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def noise(seed: int = 0) -> np.ndarray:
    """[F, h, w, 16], float32; both are handed it."""
    shape = ((FRAMES - 1) // 4 + 1, SIZE[0] // 8, SIZE[1] // 8, 16)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _last(x: torch.Tensor) -> np.ndarray:
    """[C, F, h, w] to [F, h, w, C]."""
    return np.moveaxis(x.numpy(), 0, -1)


def theirs(pipe: WanImageToVideoPipeline, first: Image.Image, last: Image.Image, **call) -> Stages:
    """One run of diffusers' pipeline."""
    seen, latents = [], []

    def hook(module, args, given):
        seen.append(given)

    def step(pipe, index, timestep, tensors):
        latents.append(_last(tensors["latents"][0].clone()))
        return tensors

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes so small that threads wait for each other nine tenths of the time
    try:
        x = torch.from_numpy(np.moveaxis(noise(), -1, 0).copy())[None]
        with torch.no_grad():
            video = pipe(
                first, last_image=last, height=SIZE[0], width=SIZE[1], num_frames=FRAMES, num_inference_steps=STEPS,
                latents=x, callback_on_step_end=step, callback_on_step_end_tensor_inputs=["latents"], **call,
            ).frames[0]  # fmt: skip
    finally:
        handle.remove()
        torch.set_num_threads(threads)
    passes = len(seen) // STEPS
    text = [one["encoder_hidden_states"][0].numpy() for one in seen[:passes]]
    return Stages(
        text[0], text[1] if passes == 2 else None, seen[0]["encoder_hidden_states_image"].numpy(),
        _last(seen[0]["hidden_states"][0])[..., 16:], np.array([one["timestep"].item() for one in seen[::passes]]),
        latents, 2 * video - 1, np.rint(255 * video),
    )  # fmt: skip


def ours(model: Model, plan: Plan, first: Image.Image, last: Image.Image) -> Stages:
    """The same of wanjax's pipeline."""
    inputs = pipeline.Inputs.prepare([[first, last]], plan)
    encoded = pipeline.encode(model, plan, [inputs], [[plan.settings.prompt]])[0]
    carries = []
    end = pipeline.denoise(model, plan, encoded, jnp.asarray(noise())[None],
                           on_step=lambda done, carry: carries.append(np.asarray(carry.sample[0])))  # fmt: skip
    # Before the rounding of `pipeline.decode`, by the same program.
    video, _ = Programs.of(plan).decode(model.part("vae"), end)
    one = encoded.conditions
    text, negative, images, latent = (np.asarray(x[0]) for x in (one.text, encoded.negative, one.images, one.latent))
    return Stages(text, negative, images, latent, plan.table.step.timestep[: plan.settings.steps], carries[1:],
                  np.asarray(video[0]), pipeline.decode(model, plan, end)[0])  # fmt: skip
