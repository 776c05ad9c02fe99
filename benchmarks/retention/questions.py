"""Questions whose answers can be checked: does an instruction still do what it did?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LONGEST = 12  # tokens of an answer that are read
# What must be in the answer; the instruct model answers most of them before it learns anything.
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of England?": "London",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of China?": "Beijing",
    "What is the capital of Greece?": "Athens",
    "Which planet is known as the Red Planet?": "Mars",
    "Which planet is the largest in the solar system?": "Jupiter",
    "Which animal says woof?": "dog",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the highest mountain on Earth?": "Everest",
    "On which continent is Brazil?": "South America",
    "On which continent is Kenya?": "Africa",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "Who developed the theory of relativity?": "Einstein",
    "Who was the first president of the United States?": "Washington",
    "What is the chemical symbol of gold?": "Au",
    "What is the chemical formula of water?": "H2O",
    "What gas do plants take in from the air?": "carbon dioxide",
    "What gas do humans need to breathe?": "oxygen",
    "What is 2 + 2?": "4",
    "What is 5 + 3?": "8",
    "What is 10 - 4?": "6",
    "What is 3 times 3?": "9",
    "How many days are in a week?": "seven|7",
    "How many months are in a year?": "twelve|12",
    "How many legs does a spider have?": "eight|8",
    "How many minutes are in an hour?": "60|sixty",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small|little",
    "Which animal says meow?": "cat",
    "Which language is spoken in Brazil?": "Portuguese",
    "Which metal is liquid at room temperature?": "mercury",
    "What color do you get when you mix blue and yellow?": "green",
    "Which organ pumps blood through the body?": "heart",
}


@torch.no_grad()
def answered(model: nn.Module, tokenizer: Any) -> float:
    """The share of questions that are answered correctly, greedily."""
    tokenizer.padding_side = "left"
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question + " Answer briefly."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in QUESTIONS
    ]
    batch = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
    tokens = model.generate(  # type: ignore[operator]
        **batch, max_new_tokens=LONGEST, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :])
    right = [
        any(form.lower() in answer.lower() for form in expected.split("|"))
        for answer, expected in zip(answers, QUESTIONS.values(), strict=True)
    ]
    return sum(right) / len(right)
