"""A very small Llama that has learned English, in a folder as Hugging Face's: for a quick try.

It has half a million parameters, reads bytes, and is trained on the docstrings of Python's standard
library. The folder also gets these and the library's code as texts. Needs no download.
Run: python examples/small_llama.py out/small
"""

import argparse
import ast
import sysconfig
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

LENGTH = 64  # bytes that it is trained on at once


def standard_library(size=300_000):
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
    return {"english": prose[:size], "code": code[:size]}


def language_model(tokenizer):
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=4 * LENGTH,
        bos_token_id=tokenizer.encode("\n", add_special_tokens=False)[0],
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model, tokens, steps):
    """AdamW, with a learning rate that falls to 0."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (8,))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()


def prepare(folder, steps=300, seed=0):
    """Writes ``model/``, ``english.txt`` and ``code.txt`` into the folder, and returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    texts = standard_library()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    tokenizer = ByT5Tokenizer(extra_ids=0, bos_token="\n")
    model = language_model(tokenizer)
    known = texts["english"][: len(texts["english"]) * 9 // 10]  # the rest is held out
    train(model, torch.tensor(tokenizer.encode(known, add_special_tokens=False)), steps)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)
