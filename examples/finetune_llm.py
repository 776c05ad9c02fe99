"""Fine-tune a language model on a text file, and keep what it could do before.

    python examples/finetune_llm.py MODEL TEXT --keep self

MODEL is a name on the Hugging Face hub or a folder, TEXT a file to learn. The model first writes
some text of its own (--keep self), or reads files that you name, and remembers what it predicts
there. Then it learns TEXT with a Trainer, freely or with the drift from these predictions as a term
of the loss (--drift-loss). Finally it is moved back towards what it was, until its predictions
differ from the remembered ones by no more than a budget (mas.settle()).

Without MODEL and TEXT, a very small Llama is made first, which knows English, and learns code.
docs/finetune_llm.md explains everything.
"""

import argparse
import json
import math
import re
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import mas_ext

RATES = {"full": 3e-4, "lora": 1e-3}  # learning rates
SELF = "self"  # in place of a file to keep: text that the model writes
RANK = 16  # of LoRA adapters
SHOWN = ("before", "settled")  # stages at which the report shows what the model writes
HELD_OUT = 0.1  # of every text, at its end: nothing is learned from it and no reference taken


# -- the model and the texts -----------------------------------------------------------------------
def load(options):
    """The model, on the device that it will be trained on, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.lora:
        from peft import LoraConfig, TaskType, get_peft_model

        kind = TaskType.CAUSAL_LM
        config = LoraConfig(kind, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = get_peft_model(model, config)
    return model.to(training_arguments(options).device), tokenizer


def read(path, tokenizer, length):
    """A text as blocks of ``length`` tokens [N, length]: to use, and held out."""
    text = Path(path).read_text(encoding="utf-8")
    end = int(len(text) * (1 - HELD_OUT))
    used, held_out = (blocks(part, tokenizer, length) for part in (text[:end], text[end:]))
    if not len(held_out):
        raise SystemExit(f"{path} is too short: it needs {math.ceil(length / HELD_OUT)} tokens")
    return used, held_out


def blocks(text, tokenizer, length):
    """A text as rows of ``length`` tokens, without what is left over."""
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    start = tokenizer.encode("")  # for many models the BOS token, without which they do badly
    step = length - len(start)
    ends = range(step, len(tokens) + 1, step)
    rows = [start + tokens[end - step : end] for end in ends]
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def spread(rows, count):
    """At most ``count`` of the rows, evenly spread."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


# -- what is to be kept ----------------------------------------------------------------------------
def own_text(model, tokenizer, options):
    """What the model writes of its own accord [N, length]: to use, and held out."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SystemExit("the model has no token to begin with: name files to --keep")
    from_all = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return [
        write(model, torch.full((count, 1), first), options.length - 1, **from_all)
        for count in (options.references, math.ceil(options.evaluate / 2))
    ]


def write(model, tokens, more, **how):
    """``tokens`` [N, T], and what the model writes after them."""
    model.eval()
    tokens = tokens.to(model.device)
    return model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=more,
        eos_token_id=None,  # it goes on where a text ends, so that all are of one length
        **how,
    ).cpu()


def remember(model, texts, options):
    """A regularizer that remembers the weights, and the predictions for the reference text."""
    share = math.ceil(options.references / len(options.keep))
    kept = torch.cat([spread(texts[source][0], share) for source in options.keep])
    kept = kept[torch.randperm(len(kept))]  # each batch has some of all files
    reference = [{"input_ids": part} for part in kept.split(16)]
    budget = mas_ext.DriftBudget(options.budget, reference=reference, samples=len(kept))
    mas = mas_ext.L2SP(model, budget=budget, adapters="merged" if options.lora else "separate")
    mas.consolidate()
    return mas


# -- training --------------------------------------------------------------------------------------
def training_arguments(options):
    """Those of an ordinary Trainer."""
    return TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.rate or RATES["lora" if options.lora else "full"],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(options.steps / 20),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


class HoldingTrainer(Trainer):
    """Adds the drift to the loss, with a factor."""

    def __init__(self, mas, factor, *arguments, **options):
        super().__init__(*arguments, **options)
        self.mas, self.factor = mas, factor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in every Trainer, and the drift on half as many references as there are samples."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            drift = self.mas.drift_loss(max(1, len(inputs["input_ids"]) // 2))
            # A loss that is normalized over all accumulated batches is added up by the Trainer.
            is_part = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            parts = self.current_gradient_accumulation_steps if is_part else 1
            loss = loss + self.factor / parts * drift
        return (loss, outputs) if return_outputs else loss


class Trace(TrainerCallback):
    """Measures the drift a few times in training."""

    def __init__(self, mas, steps):
        self.mas, self.every, self.found = mas, max(1, steps // 5), []

    def on_step_end(self, args, state, control, **_):
        """Notes (step, drift)."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.found.append((state.global_step, self.mas.drift_measured()))


def learn(model, rows, mas, options):
    """Trains on the rows; returns the drift on the way."""
    samples = [{"input_ids": row, "labels": row} for row in rows]
    trace, arguments = Trace(mas, options.steps), training_arguments(options)
    given = {"train_dataset": samples, "callbacks": [trace]}
    if options.drift_loss:
        trainer = HoldingTrainer(mas, options.drift_loss, model, arguments, **given)
    else:
        trainer = Trainer(model, arguments, **given)
    trainer.train()
    return trace.found


# -- what has become of the model ------------------------------------------------------------------
@torch.no_grad()
def perplexity(model, rows, options):
    """Perplexity per token, given the tokens before it in its block."""
    model.eval()
    losses = [
        float(model(input_ids=part, labels=part).loss) * len(part)
        for part in rows.to(model.device).split(options.batch)
    ]
    return math.exp(sum(losses) / len(rows))


def examine(model, tokenizer, texts, options):
    """Perplexity on what is held out of each text, and how the model would continue it."""
    found = {}
    for path, (_, held_out) in texts.items():
        start = held_out[:1, : options.length // 4]
        written = write(model, start, 40, do_sample=False)[0, start.shape[1] :]
        found[path] = {
            "perplexity": perplexity(model, spread(held_out, options.evaluate), options),
            "start": tokenizer.decode(start[0]),
            "written": tokenizer.decode(written),
        }
    return found


@torch.no_grad()
def movement(model, mas):
    """How far each layer has moved: ‖θ − θ*‖ / ‖θ*‖. Layers are told by the number in the name."""
    squares = defaultdict(lambda: [0.0, 0.0])
    for name, weight, change in changes(model, mas):
        number = re.search(r"\.(\d+)\.", name)
        sums = squares[f"layer {number[1]}" if number else name]
        sums[0] += float(change.square().sum())
        sums[1] += float(weight.square().sum())
    return {name: math.sqrt(moved / size) for name, (moved, size) in squares.items() if size}


def changes(model, mas):
    """Of every weight: its name, what it was, and what has been added since."""
    adapted = [(n, m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight")]
    for name, layer in adapted:
        yield name, layer.get_base_layer().weight, layer.get_delta_weight("default")
    for name, weight in () if adapted else model.named_parameters():
        yield name, mas.anchor[name], weight - mas.anchor[name]


# -- the report ------------------------------------------------------------------------------------
def table(results):
    """Perplexities, as Markdown."""
    lines = ["| text | before | trained | settled | against before | against trained |"]
    lines += ["|---|---|---|---|---|---|"]
    for path, of in results["perplexity"].items():
        before, trained, settled = (of[stage] for stage in ("before", "trained", "settled"))
        ratios = " | ".join(f"{100 * (settled / x - 1):+.1f} %" for x in (before, trained))
        roles = {**dict.fromkeys(results["keep"], "kept"), results["text"]: "learned"}
        role = roles.get(path, "watched")
        numbers = f"{before:.2f} | {trained:.2f} | {settled:.2f}"
        lines.append(f"| {path} ({role}) | {numbers} | {ratios} |")
    return "\n".join(lines)


def summary(results):
    """What settling did, in words."""
    drift, budget, kept = results["drift"], results["budget"], results["kept"]
    moved = sorted(results["movement"].items(), key=lambda item: -item[1])
    most = ", ".join(f"{name} by {share:.2%}" for name, share in moved[:3])
    return (
        f"Training moved the predictions on the reference text by {drift['trained']:.3f} nats per "
        f"token. The budget is {budget:g}: settling kept {kept:.0%} of the change of the weights, "
        f"which leaves {drift['settled']:.3f} nats. What has moved most is {most}."
    )


def report(results):
    """Everything, as Markdown."""
    parts = ["# " + results["title"], table(results), summary(results), "![](drift.png)"]
    for path, of in results["written"].items():
        start = results["start"][path]["before"]
        parts.append(f"## {path}\n\nThe held-out part begins:" + quoted(start))
        parts += [f"The model goes on, {stage}:" + quoted(of[stage]) for stage in SHOWN]
    return "\n\n".join(parts) + "\n"


def quoted(text):
    """A block of text in Markdown, whatever is in it."""
    return "\n\n" + "\n".join("    " + line for line in text.splitlines())


def plot(results, path):
    """The drift over training, and how far each layer has moved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    steps, drifts = zip(*results["trace"], strict=True)
    end = results["drift"]
    left.plot(steps, drifts, "o-", label="in training")
    left.annotate(
        "", (steps[-1], end["settled"]), (steps[-1], drifts[-1]), arrowprops={"arrowstyle": "->"}
    )
    left.plot(steps[-1], end["settled"], "o", color="C2", label="settled")
    left.axhline(results["budget"], color="grey", linestyle="--", label="budget")
    left.set(xlabel="step", ylabel="drift, nats per token", ylim=(0, None))
    left.legend()
    names, shares = zip(*results["movement"].items(), strict=True)
    right.barh(names, [100 * share for share in shares])
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=6)
    right.set(xlabel="change of the weights after settling, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# -- all of it -------------------------------------------------------------------------------------
def run(options):
    """Learns the text, and writes and returns what there is to report."""
    began = time.monotonic()

    def say(what):
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    torch.manual_seed(options.seed)
    say(f"loading {options.model}")
    model, tokenizer = load(options)
    texts = {}
    for source in dict.fromkeys([options.text, *options.keep, *options.watch]):
        if source == SELF:
            say("letting the model write")
            texts[source] = own_text(model, tokenizer, options)
        else:
            texts[source] = read(source, tokenizer, options.length)
    say("remembering what it predicts for the reference text")
    mas = remember(model, texts, options)
    say("perplexities before training")
    stages = {"before": examine(model, tokenizer, texts, options)}
    say(f"learning {options.text}")
    trace = learn(model, texts[options.text][0], mas, options)
    say("perplexities after training")
    stages["trained"] = examine(model, tokenizer, texts, options)
    say("settling: the drift is measured about ten times")
    settled = mas.settle(weights="uniform")
    say("perplexities after settling")
    stages["settled"] = examine(model, tokenizer, texts, options)
    results = gathered(options, stages, settled, trace, movement(model, mas))
    save(model, tokenizer, results, options.out)
    say("done")
    return results


def gathered(options, stages, settled, trace, moved):
    """What there is to report, as it is written to results.json."""
    found = {
        what: {
            path: {name: of[path][what] for name, of in stages.items()} for path in stages["before"]
        }
        for what in ("perplexity", "start", "written")
    }
    return {
        "title": f"{options.model} has learned {options.text}",
        "text": options.text,
        "keep": options.keep,
        "budget": options.budget,
        "drift": {"trained": settled.before, "settled": settled.after},
        "kept": 1 / (1 + settled.c),  # of the change of every weight
        "trace": [(0, 0.0), *trace, (options.steps, settled.before)],
        "movement": moved,
        **found,
    }


def save(model, tokenizer, results, folder):
    """Writes the model (of LoRA, the adapter) and the report."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    (folder / "report.md").write_text(report(results), encoding="utf-8")
    plot(results, folder / "drift.png")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the text above, and shows the defaults."""


def parse(arguments=None):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("model", nargs="?", help="name on the hub, or folder")
    add("text", nargs="?", help="text file to learn")
    add(
        "--keep",
        nargs="+",
        default=[SELF],
        help="text files on which the model should stay as it is, or self: text that it writes",
    )
    add("--watch", nargs="+", default=[], help="more text files to report the perplexity of")
    add(
        "--budget",
        type=float,
        default=0.15,
        help="how far the predictions on the reference text may move, in nats per token",
    )
    add(
        "--drift-loss",
        type=float,
        default=0.0,
        metavar="FACTOR",
        help="factor of the drift in the loss: 1 keeps more, and takes half as long again",
    )
    add(
        "--lora",
        action="store_true",
        help=f"train LoRA adapters of rank {RANK}, not the weights themselves",
    )
    add("--steps", type=int, default=60, help="optimizer steps")
    add("--batch", type=int, default=8, help="blocks of text per step")
    add("--length", type=int, default=96, help="tokens per block")
    add(
        "--rate",
        type=float,
        help=f"learning rate; None: {RATES['full']}, with --lora {RATES['lora']}",
    )
    add("--references", type=int, default=32, help="blocks of reference text, over all of --keep")
    add(
        "--evaluate",
        type=int,
        default=32,
        help="held-out blocks of each text to measure the perplexity on",
    )
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/finetune_llm"), help="folder for model and report")
    options = parser.parse_args(arguments)
    if options.model is None:
        use_small_llama(options)
    elif options.text is None:
        parser.error("TEXT is missing: the file to learn")
    return options


def use_small_llama(options):
    """Instead of a model of your own."""
    from small_llama import prepare

    folder = prepare(options.out / "small")
    options.model, options.text = str(folder / "model"), str(folder / "code.txt")
    english = str(folder / "english.txt")
    options.keep = [english] if options.keep == [SELF] else options.keep
    options.watch = [*options.watch, english]


def main():
    """Prints the table; everything else is in the folder."""
    options = parse()
    results = run(options)
    print("", table(results), summary(results), sep="\n\n")
    print(f"\nThe model is in {options.out / 'model'}, the report in {options.out / 'report.md'}.")


if __name__ == "__main__":
    main()
