"""A small language model learns English, then Python: does it still know English?

Text A is the docstrings of Python's standard library, and text B is its code without docstrings, so
every machine has both. The model is a Llama with random weights that reads bytes. The Trainer of
transformers teaches it B without MAS and with MAS. Run: python examples/finetune_llm.py
"""

import argparse
import ast
import copy
import json
import math
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mas_ext.integrations.transformers import MASCallback

BLOCK = 64  # how many bytes the model sees at once
BUDGET = 0.08  # nats per byte: how far B may change what the model says about A
METHODS = {  # how B is learned: the mode of the penalty in training, and whether it is settled
    "without MAS": (None, False),
    "settled": (None, True),
    "with MAS, settled": ("gradient", True),
    "with MAS, proximal, settled": ("proximal", True),
}


def standard_library(size=400_000):
    """``size`` characters of docstrings, and of code without docstrings and comments."""
    prose, code = "", ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                text := ast.get_docstring(node)
            ):
                prose += text + "\n\n"
                node.body[0] = ast.Pass()
        code += ast.unparse(tree) + "\n\n" if len(code) < size else ""
        if len(prose) >= size:
            break
    return prose[:size], code[:size]


def blocks(text):
    """Training samples, and test samples (every tenth)."""
    tokens = torch.tensor(list(text.encode("ascii", "ignore")))
    samples = [{"input_ids": part, "labels": part} for part in tokens.split(BLOCK)[:-1]]
    return [s for k, s in enumerate(samples) if k % 10], samples[::10]


def language_model():
    """A Llama of half a million parameters."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
    )
    return LlamaForCausalLM(config)


def learn(model, samples, rate, options, callbacks=()):
    """Trains with an ordinary Trainer."""
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=samples, callbacks=list(callbacks)).train()


@torch.no_grad()
def perplexity(model, samples):
    """Perplexity per byte, given the bytes before it in its block."""
    model.eval()
    tokens = torch.stack([sample["input_ids"] for sample in samples])
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in tokens.split(64)]
    return math.exp(sum(losses) / len(tokens))


def learn_b(model, mas, method, samples, options):
    """Trains copies of the model and of its MAS, which have learned A, on B."""
    model, mas = copy.deepcopy((model, mas))
    mode, settles = method
    callbacks = [MASCallback(mas=mas, mode=mode, consolidate=False)] if mode else []
    learn(model, samples, 1e-3, options, callbacks)
    if settles:
        print(mas.settle())
    return model


def run(options):
    """Returns what was learned → perplexity on A and on B."""
    torch.manual_seed(options.seed)
    (train_a, test_a), (train_b, test_b) = map(blocks, standard_library())
    model = language_model()
    # It measures importance, and keeps references, when A is learned.
    callback = MASCallback(budget=BUDGET, max_samples=options.samples)
    learn(model, train_a, 2e-3, options, [callback])
    models = {"A": model}
    for name, method in METHODS.items():
        models[f"A, then B {name}"] = learn_b(model, callback.mas, method, train_b, options)
    return {
        name: {"A": perplexity(model, test_a), "B": perplexity(model, test_b)}
        for name, model in models.items()
    }


def main():
    """Prints the table and writes it to results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of training, for each text")
    parser.add_argument("--samples", type=int, default=500, help="to measure importance on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/finetune_llm")
    options = parser.parse_args()
    results = run(options)
    Path(options.out, "results.json").write_text(json.dumps(results, indent=2))
    print("\n| learned | perplexity on A, English | on B, Python |\n|---|---|---|")
    for name, of in results.items():
        print(f"| {name} | {of['A']:.1f} | {of['B']:.1f} |")


if __name__ == "__main__":
    main()
