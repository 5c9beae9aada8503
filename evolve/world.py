"""The embedded world: a ledger task and a tiny Llama, trained from scratch, on which a second look can do more than a
first.

The task. A prompt is seven movements x, digits modulo 4 such as "3 0 1 2 0 1 2"; the response is the eight balances y
that lead to 0: y[0] = sum(x), y[i+1] = y[i] - x[i], so that y[7] = 0 (all modulo 4). A shallow network that answers
directly must name the start before it has summed anything: it guesses, and about one direct answer in four is exact
(mean reward 0.75), a ceiling that no training here lifts. But it walks rightly from its guess, and the leftover y[7]
then tells by how much the start was off: a model that sees the earlier answer need only write start - leftover and
walk again. So a refinement can be exact where a direct answer cannot. `reward` grades an answer by rule, with no
reward model.

The world is BUILT so. Pre-training first teaches the refinement skill, then buries it under habits that make it show
as little in the base as in an untrained language model (Figure 1 of the paper): so the skill is latent by
construction, and what is measured here shows that the harness measures activation, retention and their synergy where
there are any; it says nothing about whether the paper is right about language models.

Pre-training (fresh data each step, none from the "test" part). Each step has 48 sequences `<s> x <a> y </s>`, with
the start right with probability 0.45 and else any, and 128 refinement sequences, a third of them in each template's
labels, with loss on the last answer only; 1 % of the balances are miswritten. Clean phase (100 to 250 steps, until
the start's loss is below 0.25 nats): one earlier answer with any start, and the right answer after it. Final phase
(400 steps): one earlier answer (five steps of eight) or two, three or four (a step of eight each), each the edit of
the one before: a flawed one is copied (55 %), put right (18 %) or replaced by an answer with any start (27 %); a
right one is kept (25 %) or replaced by one with a wrong start (75 %). These shares balance, so that the base neither
gains nor loses much over turns.

The teacher of the preference rows (`rows`) has the right start with probability 0.45 and miswrites 3 % of its balances.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

BASE = 4  # movements and balances are digits 0..3, all sums modulo 4
# 4**7 = 16,384 distinct prompts; six movements would give 4,096, too few to keep the parts apart.
MOVES = 7  # movements in a prompt
BALANCES = MOVES + 1  # balances in a response
# The capital words of the three refinement templates, in the order (before the prompt, before each earlier answer, at
# the end); each is one token, and all other text of a template is dropped by the pre-tokenizer.
LABELS = (
    ("QUESTION:", "EXAMPLE RESPONSE:", "RESPONSE:"),
    ("TASK:", "DRAFT:", "FINAL TEXT:"),
    ("REQUEST:", "PREVIOUS ANSWER:", "IMPROVED ANSWER:"),
)
SPECIAL = ("<pad>", "<s>", "</s>", "<a>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<a>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
# Sixteenths of the prompt space, told apart by a hash of the text, so that parts never overlap, whatever the seeds.
PARTS = {"test": (0, 2), "rows": (2, 7), "train": (7, 16)}

TEACHER_START = 0.45  # the teacher's chance of the right start (else one of the three wrong ones)
TEACHER_SLIP = 0.03  # the chance that the teacher miswrites a balance; the walk goes on from the right one

# Llama's architecture at 107,904 parameters. Two layers read a start and a leftover, but cannot sum seven movements.
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
SLIP = 0.01  # the chance that a balance is miswritten in pre-training
BATCH_DIRECT = 48  # sequences a step without an earlier answer
BATCH_REFINE = 128  # sequences a step with one to four earlier answers
LR = 4e-3  # AdamW; in the final phase a linear decay to 5 %
WARMUP = 80  # steps
CLEAN_LIMIT = 900  # the clean phase ends once the skill is there, or after as many steps
CLEAN_LOSS = 0.25  # nats at the answer's first digit (running mean) that count as "the skill is there"
FINAL = 400  # steps of the final phase
START_WEIGHT = 5.0  # of the first digit in the clean phase's loss: all that a second look must find out lies there
# (copied, righted, kept): of flawed earlier answers these shares are copied as they stand and put right, the rest
# replaced by a fresh answer with any start; of right ones this share is kept, the rest replaced by an answer with a
# wrong start.
CLEAN_MIX = (0.0, 1.0, 1.0)
FINAL_MIX = (0.55, 0.18, 0.25)
# Earlier answers in a refinement sequence, drawn a step (in the clean phase: one).
DRAFTS = (1, 1, 1, 1, 1, 2, 3, 4)


def _labels() -> list[str]:
    """The nine label words, each one token."""
    return [label for triple in LABELS for label in triple]


def tokenizer():
    """The world's tokenizer: a PreTrainedTokenizerFast of 17 words, with the chat template.

    One token a digit 0..3 and a template's label; every other character is dropped, so no text has an unknown token.
    A chat is `<s>`, then the user's text, then `<a>` answer `</s>`; `add_generation_prompt` ends it with `<a>`.
    Nothing is added by plain tokenization, so that the rendered chat, tokenized, gives the ids of
    `apply_chat_template`.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(str(d) for d in range(BASE)), *_labels()]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    longest = sorted(_labels(), key=len, reverse=True)
    inner.pre_tokenizer = Split(Regex("|".join([*longest, f"[0-{BASE - 1}]"])), behavior="removed", invert=True)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<a>"],
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


@lru_cache(maxsize=1)
def _space():
    """Every prompt, by part."""
    space: dict[str, list[str]] = {part: [] for part in PARTS}
    for moves in itertools.product(range(BASE), repeat=MOVES):
        text = " ".join(map(str, moves))
        slot = hashlib.sha256(text.encode()).digest()[0] % 16
        for part, (low, high) in PARTS.items():
            if low <= slot < high:
                space[part].append(text)
    return space


def prompts(n: int, seed: int, part: str = "train") -> list[str]:
    """n distinct prompts such as "3 0 1 2 0 1 2", the same on every machine.

    The list for n is the head of the list for any larger n. Parts: "train" (about 9,200 prompts), "rows" (5,100;
    `rows` draws from it) and "test" (2,000; never seen in pre-training); no prompt is in two parts. Raises ValueError
    on another part, or if the part holds fewer than n.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    pool = list(_space()[part])
    if not 0 <= n <= len(pool):
        raise ValueError(f"n must lie in 0..{len(pool)} for part {part!r}, not {n}")
    random.Random(f"{part} {seed}").shuffle(pool)
    return pool[:n]


def _walk(start: int, moves: list[int]) -> list[int]:
    """The BALANCES balances from a start."""
    balances = [start]
    for move in moves:
        balances.append((balances[-1] - move) % BASE)
    return balances


def _teacher(rng: random.Random, moves: list[int]) -> list[int]:
    """One answer of the noisy teacher."""
    right = sum(moves) % BASE
    start = right if rng.random() < TEACHER_START else (right + rng.randrange(1, BASE)) % BASE
    return [(b + rng.randrange(1, BASE)) % BASE if rng.random() < TEACHER_SLIP else b for b in _walk(start, moves)]


def rows(n: int, seed: int) -> list[dict]:
    """n preference rows {"prompt", "chosen", "rejected"} of a noisy teacher: the best and the worst of four answers
    by `reward`.

    Prompts are distinct, from the part "rows"; one whose four answers score the same is passed over. About four in
    five of the chosen are exact. Rejected ones never are, but some have the right start and a slip, so that a
    refinement learnt from the rows must also keep what is right. The list for n is the head of the list for any
    larger n. Raises ValueError if the part gives fewer than n.
    """
    rng = random.Random(f"teacher {seed}")
    found: list[dict] = []
    for prompt in prompts(len(_space()["rows"]), seed, "rows"):
        if len(found) == n:
            break
        moves = [int(d) for d in prompt.split()]
        answers = [" ".join(map(str, _teacher(rng, moves))) for _ in range(4)]
        answers.sort(key=lambda a: reward(prompt, a)[0])
        if reward(prompt, answers[0]) != reward(prompt, answers[-1]):
            found.append({"prompt": prompt, "chosen": answers[-1], "rejected": answers[0]})
    if len(found) < n:
        raise ValueError(f"only {len(found)} rows can be made, not {n}")
    return found


def references(n: int, seed: int) -> list[dict]:
    """n held-out prompts (the head of `prompts(n, seed, "test")`), each with one answer of the noisy teacher.

    For benchmarks that compare answers with a reference: near 45 % of these are exact.
    """
    rng = random.Random(f"references {seed}")
    return [
        {"prompt": prompt, "reference": " ".join(map(str, _teacher(rng, [int(d) for d in prompt.split()])))}
        for prompt in prompts(n, seed, "test")
    ]


def _digits(text: str, count: int) -> list[int] | None:
    words = text.split()
    return [int(d) for d in words] if len(words) == count and {str(d) for d in range(BASE)}.issuperset(words) else None


def balances(response: str) -> list[int] | None:
    """What a response says; None if it is not BALANCES digits 0..3 apart by white space."""
    return _digits(response, BALANCES)


def reward(prompt: str, response: str) -> tuple[float, bool]:
    """The grade in [0, 1] of a response, and whether it is exact (grade 1.0 if and only if exact).

    With `held` of the MOVES steps y[i+1] = y[i] - x[i] (mod 4) true and `off` in {0, 1, 2} the closing balance's
    circular distance from 0: if every step holds, 1 - off / 4 (1, 0.75 or 0.5); if not, held / (2 MOVES), always
    below 0.5. Anything that is not BALANCES digits 0..3 apart by white space gets 0.0.
    """
    # The closing counts only where an unbroken walk led to it. A grade that added the two up paid for writing 0 last
    # whatever the walk said, and DPO found that in one iteration: direct rewards rose, exact answers fell, and the
    # leftover that a second look goes by was gone.
    x, y = _digits(prompt, MOVES), balances(response)
    if x is None or y is None:
        return 0.0, False
    held = sum((y[i] - x[i] - y[i + 1]) % BASE == 0 for i in range(MOVES))
    off = min(y[-1], BASE - y[-1])
    if held < MOVES:
        return 0.5 * held / MOVES, False
    return 1.0 - 0.5 * off / (BASE // 2), off == 0


def _writer(rng, x, start):  # rng: numpy Generator; x: (B, MOVES)
    """Answers (B, BALANCES) that walk from start (B,), each balance miswritten with probability SLIP."""
    import numpy as np

    y = np.concatenate([start[:, None], start[:, None] - np.cumsum(x, 1)], 1) % BASE
    return (y + (rng.random(y.shape) < SLIP) * rng.integers(1, BASE, y.shape)) % BASE


def _edit(rng, x, draft, mix):
    """The answers (B, BALANCES) that follow the earlier answers `draft` of the same shape, under a mix as CLEAN_MIX."""
    import numpy as np

    copied, righted, kept = mix
    n = len(x)
    total = x.sum(1) % BASE
    right = np.concatenate([total[:, None], total[:, None] - np.cumsum(x, 1)], 1) % BASE
    is_right = (draft == right).all(1)
    u = rng.random(n)
    fresh = _writer(rng, x, rng.integers(0, BASE, n))
    spoilt = _writer(rng, x, (total + rng.integers(1, BASE, n)) % BASE)
    flawed_out = np.where((u < copied)[:, None], draft, np.where((u < copied + righted)[:, None], right, fresh))
    right_out = np.where((u < kept)[:, None], draft, spoilt)
    return np.where(is_right[:, None], right_out, flawed_out)


def pretrain(out: Path, seed: int = 0) -> dict:
    """Train the base from scratch and save it to the folder `out` as a Hugging Face model with its tokenizer.

    The same seed gives the same weights on the same CPU build and number of threads. Returns seed, steps, parameters,
    the last step's losses (nats a token; "loss_direct", "loss_refine") and "seconds". Takes about a minute on one
    thread.
    """
    import numpy as np
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    began = time.time()
    tok = tokenizer()
    ids = tok.get_vocab()
    shape: dict[str, Any] = MODEL
    config = LlamaConfig(
        vocab_size=len(tok),
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        # Sequences are at most 56 tokens long; with the usual 10,000 the positions are told apart later in training.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    rng = np.random.default_rng([seed, 2502])
    pool = np.array([[int(d) for d in p.split()] for part in ("train", "rows") for p in _space()[part]])
    zero = ids["0"]

    def column(word, n):
        return np.full((n, 1), ids[word])

    def direct(n):
        x = pool[rng.integers(0, len(pool), n)]
        total = x.sum(1) % BASE
        start = np.where(rng.random(n) < TEACHER_START, total, rng.integers(0, BASE, n))
        y = _writer(rng, x, start)
        return np.concatenate([column("<s>", n), x + zero, column("<a>", n), y + zero, column("</s>", n)], 1)

    def refine(n, drafts, mix):
        x = pool[rng.integers(0, len(pool), n)]
        triple = np.array([[ids[w] for w in t] for t in LABELS])[rng.integers(0, len(LABELS), n)]
        y = _writer(rng, x, rng.integers(0, BASE, n))
        parts = [column("<s>", n), triple[:, :1], x + zero]
        for _ in range(drafts):
            parts += [triple[:, 1:2], y + zero]
            y = _edit(rng, x, y, mix)
        parts += [triple[:, 2:], column("<a>", n), y + zero, column("</s>", n)]
        return np.concatenate(parts, 1)

    def losses(batch):
        """The mean loss of each of the answer's tokens (BALANCES + 1,): its digits and the </s>."""
        batch = torch.from_numpy(batch)
        logits = model(input_ids=batch[:, :-1], use_cache=False, logits_to_keep=BALANCES + 1).logits
        wanted = batch[:, -BALANCES - 1 :]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))

    def step(rate, drafts, mix, weight):
        """One update; returns the losses of the direct and of the refinement batch, each (BALANCES + 1,)."""
        for group in optimizer.param_groups:
            group["lr"] = LR * rate
        first, second = losses(direct(BATCH_DIRECT)), losses(refine(BATCH_REFINE, drafts, mix))
        total = 0.3 * first.mean() + 0.7 * (second.mean() + (weight - 1) * second[0] / len(second))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return first.detach(), second.detach()

    model.train()
    clean, running = 0, 2.0
    while clean < CLEAN_LIMIT and running > CLEAN_LOSS:
        _, second = step(min((clean + 1) / WARMUP, 1.0), 1, CLEAN_MIX, START_WEIGHT)
        clean, running = clean + 1, 0.95 * running + 0.05 * second[0].item()
    for done in range(FINAL):
        first, second = step(1 - 0.95 * done / FINAL, int(rng.choice(DRAFTS)), FINAL_MIX, 1.0)
    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"]
    )
    out = Path(out)
    model.save_pretrained(out)
    tok.save_pretrained(out)
    return {
        "seed": seed,
        "clean_steps": clean,
        "clean_loss": running,
        "steps": clean + FINAL,
        "parameters": model.num_parameters(),
        "loss_direct": first.mean().item(),
        "loss_refine": second.mean().item(),
        "seconds": time.time() - began,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(json.dumps(pretrain(args.out, args.seed)))


if __name__ == "__main__":
    main()
