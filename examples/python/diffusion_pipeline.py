"""Text to image with four models that load together, in the background, as in Stable Diffusion.

The models are small and their weights are random, so the image is noise: this is about how a
pipeline is traced, placed and loaded. Nothing is downloaded.

    python examples/python/diffusion_pipeline.py --out demo_output
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging

import neuron_ext

Models = Mapping[str, Callable[..., torch.Tensor]]
Traced = dict[str, torch.jit.ScriptModule]

VOCABULARY, TOKENS, WIDTH = 1000, 77, 256
STEPS, GUIDANCE = 4, 3.0
TOLERANCE = 1e-3


def build_models() -> Models:
    text_config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    )
    text_encoder = CLIPTextModel(text_config)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    for model in (text_encoder, unet, vae):
        model.eval().requires_grad_(False)

    def encode_text(ids: torch.Tensor) -> torch.Tensor:
        return text_encoder(ids).last_hidden_state

    def predict_noise(
        latents: torch.Tensor, step: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        return unet(latents, step, text).sample

    return {
        "text_encoder": encode_text,
        "unet": predict_noise,
        "post_quant_conv": vae.post_quant_conv,
        "decoder": vae.decoder,
    }


def generate(models: Models, prompts: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The image for the second of two prompts, and away from the first: guidance."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    texts = [models["text_encoder"](prompt) for prompt in prompts.split(1)]
    latents = noise
    with ThreadPoolExecutor(2) as pool:
        for step in scheduler.timesteps:
            # Two requests at the same time: two cores work on them side by side.
            requests = [pool.submit(models["unet"], latents, step, text) for text in texts]
            away, towards = (request.result() for request in requests)
            prediction = away + GUIDANCE * (towards - away)
            latents = scheduler.step(prediction, step, latents).prev_sample
    return models["decoder"](models["post_quant_conv"](latents))


def trace_and_save(models: Models, folder: Path, compiler: str | None) -> None:
    latents, text = torch.randn(1, 4, 32, 32), torch.randn(1, TOKENS, WIDTH)
    examples = {
        "text_encoder": torch.zeros(1, TOKENS, dtype=torch.long),
        "unet": (latents, torch.tensor(1), text),
        "post_quant_conv": latents,
        "decoder": latents,
    }
    for name, model in models.items():
        start = time.perf_counter()
        traced = neuron_ext.trace(model, examples[name], compiler=compiler)
        neuron_ext.async_load(traced)  # torch.jit.load starts a load in the background
        if name == "unet":
            neuron_ext.lazy_load(traced)  # ... but not this one: load() first says on which cores
        torch.jit.save(traced, folder / f"{name}.pt")
        print(f"  {name:15} {time.perf_counter() - start:5.1f} s")


def load(folder: Path, names: list[str], together: bool) -> tuple[Traced, float, float]:
    """The models; the seconds until all could be called, and until all were loaded."""
    models: Traced = {}
    start = time.perf_counter()
    for name in names:
        models[name] = torch.jit.load(folder / f"{name}.pt")
        if name == "unet":
            neuron_ext.set_multicore(models[name])  # starts its load: one replica on every core
        if not together:
            neuron_ext.wait(models[name])
    callable_after = time.perf_counter() - start
    for model in models.values():
        neuron_ext.wait(model)  # a call would wait as well
    return models, callable_after, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder to write to")
    parser.add_argument(
        "--compiler",
        choices=["inductor", "torchscript"],
        help="native code or a portable graph; default: native code where a C++ compiler works",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    cores = neuron_ext.visible_core_count()
    torch.manual_seed(0)
    eager = build_models()

    print("1. Tracing and saving")
    trace_and_save(eager, options.out, options.compiler)

    print(f"2. Loading onto {cores} cores; best of 3")
    for how, together in {"one after another": False, "all together": True}.items():
        times = []
        for _ in range(3):
            traced, *seconds = load(options.out, list(eager), together)
            times.append(seconds)
        ready, loaded = (1e3 * min(column) for column in zip(*times, strict=True))
        print(f"  {how:18} {ready:4.0f} ms until they can be called, {loaded:4.0f} until loaded")
    for name, model in traced.items():
        (status,) = neuron_ext.status(model)
        print(f"  {name:18} {status.state} on cores {status.cores}")

    print(f"3. An image in {STEPS} steps")
    prompts, noise = torch.randint(VOCABULARY, (2, TOKENS)), torch.randn(1, 4, 32, 32)
    expected = generate(eager, prompts, noise)
    image = generate(traced, prompts, noise)
    (status,) = neuron_ext.status(traced["unet"])
    runs = [f"core {c}: {n}" for c, n in zip(status.cores, status.executions, strict=True)]
    print(f"  unet executions    {', '.join(runs)}")
    difference = (image - expected).abs().max().item()
    print(f"  largest difference {difference:.1e} from eager PyTorch (allowed: {TOLERANCE})")
    if not difference <= TOLERANCE:
        sys.exit("the image differs from that of eager PyTorch")


if __name__ == "__main__":
    main()
