"""python -m benchmarks.scoring: what batches by length gain when a reward model scores answers, against batches of one.

Both sides are evolve.scorers.RewardModel, in one process; they take turns over the same groups of answers.

    ultrafeedback   SmolLM2-135M with a random head, bfloat16, over the data set's chosen answers (needs --data and
                    `python -m evolve.smollm2`)
    embedded        the embedded base with a random head, float32, over its teacher's answers

    --data FILE     preference pairs as JSONL (UltraFeedback)
    --answers N     how many of them (96)
    --batch N       answers in a batch, at most (16: what reward_model.micro_batch=4 gives)

Kept in benchmarks/results/scoring.json: answers and tokens (without padding) per CPU-second of each side, and
`batched_over_one`, their ratio; at the top the one of ultrafeedback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evolve import data, templates, world
from evolve.config import ROOT
from evolve.scorers import Item, RewardModel
from evolve.stages import ModelSettings

FILE = ROOT / "benchmarks" / "results" / "scoring.json"
GROUPS = 3


def classifier(base: Path, out: Path) -> Path:
    """The base with a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).save_pretrained(out)
    templates.load_tokenizer(base, None, False).save_pretrained(out)
    return out


def compare(model: Path, dtype: str, items: list[Item], batch: int) -> dict[str, Any]:
    read = ModelSettings(dtype=dtype, chat_template=None, trust_remote_code=False)
    sides = {
        name: RewardModel(model, read, max_length=8192, batch_size=size, device="cpu")
        for name, size in (("one", 1), ("batched", batch))
    }
    seconds = dict.fromkeys(sides, 0.0)
    values: dict[str, dict[Item, float]] = {name: {} for name in sides}
    for scorer in sides.values():
        dict(scorer(items[:2]))  # the first call's own cost
    for group in range(GROUPS):
        mine = items[group::GROUPS]
        for name in sorted(sides, reverse=bool(group % 2)):
            started = time.process_time()
            scores = dict(sides[name](mine))
            seconds[name] += time.process_time() - started
            values[name] |= {mine[index]: score.value or 0.0 for index, score in scores.items()}
    tokenizer = sides["one"].read.tokenizer
    lengths = sorted(len(templates.conversation(tokenizer, item.prompt, item.answer)) for item in items)
    return {
        "answers": len(items),
        "tokens": {"least": lengths[0], "median": lengths[len(lengths) // 2], "most": lengths[-1], "all": sum(lengths)},
        "batch": batch,
        **{
            name: {
                "answers_per_cpu_second": len(items) / spent,
                "tokens_per_cpu_second": sum(lengths) / spent,
                "cpu_seconds": spent,
            }
            for name, spent in seconds.items()
        },
        "batched_over_one": seconds["one"] / seconds["batched"],
        "largest_difference": max(abs(values["one"][item] - values["batched"][item]) for item in items),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--answers", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch

    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    with TemporaryDirectory() as scratch:
        rows = world.rows(8 * arguments.answers, 0)
        items = [Item(row["prompt"], row["chosen"]) for row in rows]
        small = classifier(ROOT / "evolve" / "embedded", Path(scratch) / "embedded")
        results["embedded"] = compare(small, "float32", items, arguments.batch)
        if arguments.data:
            rows = data.ordered(data.read(arguments.data, "train"), 0, None)[0][: arguments.answers]
            items = [Item(row["prompt"], row["chosen"]) for row in rows]
            large = classifier(ROOT / "weights" / "smollm2_135m", Path(scratch) / "smollm2")
            results["ultrafeedback"] = compare(large, "bfloat16", items, arguments.batch)
            results = {"batched_over_one": results["ultrafeedback"]["batched_over_one"], **results}
    FILE.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
