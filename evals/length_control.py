"""Length control: AlpacaEval 2's GLM (Dubois et al. 2024, arXiv 2404.04475), fitted by the package's own functions.

    P(answer wins) = sigmoid(w_length tanh((reference's length - answer's) / std) + w_difficulty difficulty + w_model)
    LC win rate    = 100 mean P at equal lengths

Lengths are characters, std that of their differences. Each game is fitted twice, as won with weight p and as lost with
1 - p; 1,610 games of a verbose and a concise gpt-4 (df_gamed.csv, weight 0.1 each) keep w_length from being gamed. L1
logistic regression, C by 5-fold cross-validation.

What differs from the package: difficulties go by the instruction, not by the row in a file that may miss some; files
may be local, and none is written; and the interval counts the fit. The package's standard error is that of the mean of
P, with the weights taken as certain; here they are fitted again, with the same C, to 200 resamples of the instructions,
and the interval is Student's with the standard deviation of what comes out. How often an instruction is in a resample
is a Poisson draw of its own (the Poisson bootstrap), so two turns are resampled alike, and their difference is paired.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evals import tables
from evals.statistics import Estimate

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

GLM = "length_controlled_v1"
DRAWS = 200
FEWEST = 20  # games: three weights fitted to fewer say more of the two gamed models than of the one that was judged
# Checksums of AlpacaEval's 805 instructions: {of the set: of the order that difficulties go by}.
ORDER = {"c77de283ddeccc6b": "e1a6579889d15896"}


class Unfitted(ValueError):
    """There is no length-controlled win rate; says why."""


@dataclass(frozen=True)
class Game:
    """One comparison of an answer with its reference, lengths in characters.

    preference: from 1 (the reference wins) to 2 (the answer does); None where nobody could say.
    position: of the instruction in the full set, which its difficulty goes by; None where it isn't known.
    first: the answer was shown first; None where that isn't known.
    """

    id: str
    preference: float | None
    length: int
    reference_length: int
    position: int | None
    first: bool | None = None


@dataclass(frozen=True)
class Control:
    """What the fit needs beside games: the gamed models' rows, and difficulties by position."""

    gamed: pd.DataFrame
    difficulty: Sequence[float]

    def cover(self, instructions: int) -> None:
        """Raises Unfitted unless the full set has as many instructions as there are difficulties."""
        if instructions != (size := len(self.difficulty)):
            raise Unfitted(
                f"{instructions} instructions, but {size} difficulties, which go by position in the full set"
            )


@dataclass(frozen=True)
class Controlled:
    """A fit. standard_error is the package's; wins are P at equal lengths by prompt; draws the refits' win rates."""

    estimate: Estimate
    standard_error: float
    c: float | None
    weights: Mapping[str, float]
    wins: Mapping[str, float]
    draws: np.ndarray


def positions(ids: Sequence[str]) -> list[int] | list[None]:
    """Instructions' positions by their ids: those in the file, unless it has AlpacaEval's set in another order."""

    def checksum(keys: Sequence[str]) -> str:
        return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]

    known = ORDER.get(checksum(sorted(ids)))
    return list(range(len(ids))) if known in (None, checksum(ids)) else [None] * len(ids)


def load(gamed: str | None = None, difficulty: str | None = None) -> Control:
    """From files in the form of the package's df_gamed.csv and instruction_difficulty.csv.

    Without `gamed` the hub is asked for it; without `difficulty`, df_gamed.csv has them, where the package looks, too.

    Raises:
        OSError, ValueError: a file is missing, or not in that form.
        Unfitted: the hub can't be reached.
    """
    import pandas as pd

    hardness = _difficulty(tables.rows(difficulty), difficulty) if difficulty else None
    path = gamed or _from_hub("df_gamed.csv")
    needed = ("preference", "index", "std_delta_len", "instruction_difficulty")
    found = [
        {key: tables.number(row, key, f"{path}, row {count}") for key in needed}
        for count, row in enumerate(tables.rows(path), 1)
    ]
    frame = pd.DataFrame(found)
    if (wrong := frame[~frame["preference"].between(0, 1)]).size:
        raise ValueError(
            f"{path}, row {wrong.index[0] + 1}: preference {wrong.iloc[0]['preference']:g} is not in [0, 1]"
        )
    if hardness is None:
        hardness = _difficulty(frame.drop_duplicates("index").to_dict("records"), path)
    return Control(frame, hardness)


def _difficulty(table: Sequence[Mapping[Any, Any]], path: str) -> list[float]:
    column = "index" if "index" in table[0] else ""  # the package's own file has no name for it
    found: dict[float, float] = {}
    for count, row in enumerate(table, 1):
        where = f"{path}, row {count}"
        found[tables.number(row, column, where)] = tables.number(row, "instruction_difficulty", where)
    if sorted(found) != list(range(len(table))):
        raise ValueError(f"{path}: {len(table)} rows, whose index is not 0 to {len(table) - 1}, each once")
    return [found[position] for position in range(len(found))]


def _from_hub(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download("tatsu-lab/alpaca_eval", name, repo_type="dataset"))
    except OSError as error:
        raise Unfitted(f"{name}: no file given, and the hub has not answered ({str(error).splitlines()[0]})") from None


def fit(games: Sequence[Game], control: Control, c: float | None = None) -> Controlled:
    """The length-controlled win rate, 0 to 100, of games that all have a preference. Two seconds for 805.

    Args:
        c: the inverse strength of regularisation (sklearn's C); None: by cross-validation.

    Raises:
        Unfitted: there are too few games, an instruction without a difficulty, or nothing to control for.
    """
    import numpy as np
    import pandas as pd
    from scipy import stats

    if len(games) < FEWEST:
        raise Unfitted(f"{len(games)} games; at least {FEWEST} are needed for the fit")
    table = pd.DataFrame([(one.id, one.preference, one.reference_length - one.length, one.position) for one in games])
    table.columns = pd.Index(["id", "preference", "delta", "position"])
    if table["position"].isna().any():
        raise Unfitted("the instructions are AlpacaEval's in another order, and difficulties go by that order")
    if (last := table["position"].max()) >= len(control.difficulty):
        raise Unfitted(f"instruction {last} has no difficulty: there are {len(control.difficulty)}")
    # In order, as cross-validation's folds are by order.
    table = table.astype({"position": int}).sort_values("position", ignore_index=True)
    table["preference"] -= 1
    table["instruction_difficulty"] = [control.difficulty[position] for position in table["position"]]
    ids, size = list(table["id"]), len(table)
    if (table["delta"] == 0).all() and (
        table["preference"] == 0.5
    ).all():  # a model against itself, as the package says
        even = Estimate(50.0, 50.0, 50.0, size)
        return Controlled(even, 0.0, None, {}, dict.fromkeys(ids, 0.5), np.full(DRAWS, 50.0))
    if table["delta"].std() == 0:
        raise Unfitted("all answers differ in length from their references by as much: there is nothing to control for")
    wins, c, weights = _fit(table, control.gamed, c)
    counts = np.array([np.random.default_rng(list(key.encode())).poisson(1, DRAWS) for key in ids])
    resamples = (table.loc[np.repeat(table.index, count)] for count in counts.T)
    draws = np.array([100 * _fit(resample, control.gamed, c)[0].mean() for resample in resamples])
    found = _estimate(float(100 * wins.mean()), draws, size, 0.0)
    by_prompt = dict(zip(ids, wins.tolist(), strict=True))
    return Controlled(found, float(100 * stats.sem(wins)), c, weights, by_prompt, draws)


def _fit(table: pd.DataFrame, gamed: pd.DataFrame, c: float | None) -> tuple[np.ndarray, float, dict[str, float]]:
    """P at equal lengths by row; C; weights. As get_length_controlled_winrate does it, which takes no local files."""
    import numpy as np
    import pandas as pd
    import sklearn
    from alpaca_eval.metrics import glm_winrate

    info: Any = glm_winrate.GLM_INFO[GLM]
    own = np.arange(len(gamed) + len(table)) >= len(gamed)
    columns = {  # in the order of GLM_INFO's formula
        "length": np.tanh(np.concatenate([gamed["std_delta_len"], table["delta"] / (table["delta"].std() or 1.0)])),
        "difficulty": np.concatenate([gamed["instruction_difficulty"], table["instruction_difficulty"]]),
        "model": own.astype(float),
        "preference": np.concatenate([gamed["preference"], table["preference"]]),
    }
    weight = np.where(own, 1.0, info["regularize_to_baseline_lambda"] / 2)  # halved: there are two gamed models
    how = info["kwargs"] if c is None else {"n_splits": 0, "C": c}
    with sklearn.config_context(), warnings.catch_warnings():  # the package changes sklearn's configuration
        warnings.filterwarnings("ignore", ".*penalty", UserWarning)  # the package's arguments, old to sklearn 1.9
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = glm_winrate.fit_LogisticRegressionCV(
            pd.DataFrame(columns), "preference", sample_weight=weight, **how
        )
    weights = dict(zip(columns, model.coef_[0].tolist(), strict=False))
    return at_equal_lengths(weights, table["instruction_difficulty"]), float(model.C_[0]) if c is None else c, weights


def at_equal_lengths(weights: Mapping[str, float], difficulty: Sequence[float] | pd.Series) -> np.ndarray:
    """P that the answer wins, by instruction."""
    import numpy as np
    from scipy.special import expit

    return expit(weights["difficulty"] * np.asarray(difficulty) + weights["model"])


def _estimate(value: float, draws: np.ndarray, size: int, lowest: float) -> Estimate:
    """Student's interval, within [lowest, 100], with the draws' standard deviation as standard error."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, size - 1) * draws.std(ddof=1)) if size > 1 else 100.0
    return Estimate(value, max(lowest, value - half), min(100.0, value + half), size)


def gain(after: Controlled, before: Controlled) -> Estimate:
    """The difference of two fits, paired by resample; n is the number of prompts that both have."""
    size = len(after.wins.keys() & before.wins.keys())
    return _estimate(after.estimate.value - before.estimate.value, after.draws - before.draws, size, -100.0)
