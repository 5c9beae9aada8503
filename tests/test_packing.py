"""The layout: a forest's invariants, and that a model run over it gives what padded rows give, gradients too."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from evolve import packing, pairs
from evolve.packing import Layout, plant
from evolve.templates import Encoded

# Three letters, so that beginnings are shared, sequences repeat and one is often the beginning of another.
sequences = st.lists(st.integers(0, 2), min_size=1, max_size=7)
groups = st.lists(st.lists(sequences, min_size=1, max_size=6), min_size=1, max_size=4)

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # takes a view of what attends
    "gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0},
}
ON_CPU = [kind for kind in KINDS if kind != "gemma2"]
ATTENTION = {"branches": 0, "trees": 10**9}  # packing.SMALL_TREE: which way of the two is taken


def build(kind, **changed):
    """A random model of a kind, its weights large, so that every answer's probabilities are far from equal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {}), **changed})
        )


@pytest.fixture(scope="module")
def models():
    """Each kind twice, the same weights in both: prepared for padded rows and for what shares."""
    return {kind: [pairs.prepare(build(kind), how) for how in ("padded", "shared")] for kind in KINDS}


def draw_pairs(seed, count=3):
    """Groups as pairs make them: some contexts, two answers after each; with some, one is cut short or repeated."""
    draw = random.Random(seed)

    def ids(low, high):
        return draw.choices(range(3, 16), k=draw.randint(low, high))

    found = []
    for _ in range(count):
        start, answer = [1, *ids(1, 5)], ids(2, 9)
        contexts = [start + ids(0, 9) for _ in range(draw.randint(1, 3))]
        other = draw.choice([answer[: draw.randint(0, len(answer))] + ids(0, 6), answer, [], answer[:1]])
        found.append([Encoded(context + end, len(context)) for context in contexts for end in ([*answer, 2], other)])
    return found


def run(model, batch, weights=None):
    """Log-probabilities; with weights, also the gradients of their weighted sum by parameter."""
    model.zero_grad()
    found = pairs.log_probabilities(model, batch)
    if weights is None:
        return found.detach()
    (found * weights).sum().backward()
    return found.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


def compare(models, groups, batch):
    """Groups as padded rows through one of the two models, and as `batch` through the other: equal, or it raises."""
    weights = torch.randn(batch.sequences, generator=torch.Generator().manual_seed(1))
    expected, slopes = run(models[0], pairs.batch(groups, "padded", 0), weights)
    found, laid_slopes = run(models[1], batch, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert slopes.keys() == laid_slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(laid_slopes[name], slope, rtol=1e-5, atol=1e-5 * max(1.0, slope.abs().max().item()))


# The layout


@given(groups)
def test_a_path_spells_its_sequence_and_counts_its_depth(groups):
    forest = plant(groups)
    given_ = [sequence for group in groups for sequence in group]
    assert len(forest.paths) == len(given_)
    for path, sequence in zip(forest.paths, given_, strict=True):
        assert forest.input_ids[list(path)].tolist() == sequence
        assert forest.positions[list(path)].tolist() == list(range(len(sequence)))


@given(groups)
def test_a_token_sees_its_ancestors_and_itself_alone(groups):
    forest = plant(groups)
    seen = {}
    for path in forest.paths:
        for depth, place in enumerate(path):
            assert seen.setdefault(place, path[: depth + 1]) == path[: depth + 1]
    tokens = len(forest.input_ids)
    assert sorted(seen) == list(range(tokens))
    end = forest.end.tolist()
    for i in range(tokens):
        assert [j for j in range(tokens) if j <= i < end[j]] == list(seen[i])
    for window in (None, 1, 3):
        mask = packing.visible(forest, window)
        assert [row.nonzero().flatten().tolist() for row in mask] == [
            list(seen[i][-(window or 0) :]) for i in range(tokens)
        ]


@given(groups)
def test_each_beginning_stands_once_and_groups_share_nothing(groups):
    forest = plant(groups)
    paths, first = iter(forest.paths), 0
    for group in groups:
        beginnings = {tuple(sequence[:length]) for sequence in group for length in range(1, len(sequence) + 1)}
        places = {place for _ in group for place in next(paths)}
        assert places == set(range(first, first + len(beginnings)))
        first += len(beginnings)
    assert len(forest.input_ids) == len(forest.positions) == len(forest.end) == first


@given(groups)
def test_trees_cut_the_row_where_something_starts(groups):
    forest = plant(groups)
    starts = (forest.positions == 0).nonzero().flatten().tolist()
    assert forest.trees == tuple(zip(starts, [*starts[1:], len(forest.end)], strict=True))
    assert len(forest.trees) == sum(len({sequence[0] for sequence in group}) for group in groups)


@given(groups)
def test_branches_cover_the_row_and_name_what_is_visible(groups):
    forest = plant(groups)
    found = packing.branches(forest)
    assert [place for branch in found for place in range(branch.start, branch.stop)] == list(range(len(forest.end)))
    mask = packing.visible(forest)
    for branch in found:
        above = [place for start, stop in branch.ancestors for place in range(start, stop)]
        for place in range(branch.start, branch.stop):
            assert above + list(range(branch.start, place + 1)) == mask[place].nonzero().flatten().tolist()


@given(groups)
def test_the_order_of_a_group_does_not_matter_to_its_row(groups):
    turned = [group[::-1] for group in groups]
    one, other = plant(groups), plant(turned)
    for name in ("input_ids", "positions", "end"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.trees == other.trees


# The layout as a model runs it


@pytest.mark.parametrize("way", ATTENTION)
@pytest.mark.parametrize("how", ["shared", "packed"])
@pytest.mark.parametrize("kind", ON_CPU)
def test_log_probabilities_and_gradients_are_those_of_padded_rows(models, monkeypatch, kind, how, way):
    monkeypatch.setattr(packing, "SMALL_TREE", ATTENTION[way])
    for seed in range(3):
        given_ = draw_pairs(seed)
        compare(models[kind], given_, pairs.batch(given_, how, 0))


def encode(group):
    return [Encoded([1, *context, *answer], 1 + len(context)) for context, answer in group]


letters = st.lists(st.integers(3, 5), max_size=6)


@settings(max_examples=25)
@given(st.lists(st.lists(st.tuples(letters, letters), min_size=1, max_size=5), min_size=1, max_size=3))
@pytest.mark.parametrize("way", ATTENTION)
def test_any_group_gives_what_padded_rows_give(models, way, given_):
    """Answers that repeat, begin each other, are empty, or start inside what is another's context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALL_TREE", ATTENTION[way])
        groups = [encode(group) for group in given_]
        compare(models["mistral"], groups, pairs.batch(groups, "shared", 0))


@pytest.mark.parametrize("way", ATTENTION)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # 5.2 has no other name
def test_gradient_checkpointing_changes_no_gradient(models, monkeypatch, kind, way):
    monkeypatch.setattr(packing, "SMALL_TREE", ATTENTION[way])
    given_ = draw_pairs(0)
    batch = pairs.batch(given_, "shared", 0)
    weights = torch.arange(1.0, batch.sequences + 1)
    plain, again = models[kind][1], pairs.prepare(build(kind), "shared").train()
    calls = []
    again.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again.gradient_checkpointing_enable({"use_reentrant": False})
    expected, slopes = run(plain, batch, weights)
    found, again_slopes = run(again, batch, weights)
    assert len(calls) == 2  # forward, and once more on the way back
    assert torch.equal(found, expected)
    for name, slope in slopes.items():
        torch.testing.assert_close(again_slopes[name], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_the_windows_here_bite(models, kind):
    """Or the tests above would not see one that is left out."""
    batch = pairs.batch(draw_pairs(0), "padded", 0)
    wide = pairs.prepare(build(kind, sliding_window=64), "padded")
    found = [run(model, batch) for model in (models[kind][0], wide)]
    assert (found[0] - found[1]).abs().max() > 0.1


def wrong_end(forest):
    """The first token that has a brother is seen by its whole tree from there on."""
    end = forest.end.clone()
    for start, stop in forest.trees:
        for place in range(start, stop):
            if end[place] < stop:
                end[place] = stop
                return replace(forest, end=end)
    raise AssertionError("no fork in this forest")


def one_long_row(forest):
    return replace(forest, end=torch.full_like(forest.end, len(forest.end)))


@pytest.mark.parametrize("way", ATTENTION)
@pytest.mark.parametrize("wrong", [wrong_end, one_long_row], ids=lambda wrong: wrong.__name__)
def test_a_wrong_mask_is_seen(models, monkeypatch, wrong, way):
    monkeypatch.setattr(packing, "SMALL_TREE", ATTENTION[way])
    given_ = draw_pairs(0)
    batch = pairs.batch(given_, "shared", 0)
    compare(models["llama"], given_, batch)
    moved = replace(batch, layout=Layout(wrong(batch.layout.forest), batch.layout.device))
    with pytest.raises(AssertionError, match="not close"):
        compare(models["llama"], given_, moved)


def test_positions_that_are_not_depths_are_seen(models):
    given_ = draw_pairs(0)
    batch = pairs.batch(given_, "shared", 0)
    moved = replace(batch, positions=torch.arange(batch.input_ids.numel())[None])
    with pytest.raises(AssertionError, match="not close"):
        compare(models["llama"], given_, moved)


@pytest.mark.parametrize("how", ["shared", "packed"])
def test_capped_scores_are_refused_without_a_gpu(models, how):
    model = models["gemma2"][1]
    with pytest.raises(ValueError, match=r"^this model caps its attention scores.*set trainer\.layout=padded$"):
        pairs.log_probabilities(model, pairs.batch(draw_pairs(0), how, 0))


# What a GPU runs: FlexAttention, here uncompiled and without gradients, which is all a CPU has of it


@pytest.fixture
def flex(monkeypatch):
    monkeypatch.setattr(packing, "FLEX", ("cpu",))
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_gives_what_padded_rows_give(models, flex, kind):
    given_, (plain, laid_out) = draw_pairs(0), models[kind]
    expected = run(plain, pairs.batch(given_, "padded", 0))
    batch = pairs.batch(given_, "shared", 0)
    torch.testing.assert_close(run(laid_out, batch), expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in batch.layout._parts} == {"flex"}


# Attention alone


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=25)
@given(groups, st.sampled_from([None, *range(1, 9)]))
@pytest.mark.parametrize("way", [*ATTENTION, "flex"])
def test_each_way_is_attention_under_the_whole_mask(request, way, groups, window):
    if way == "flex":
        request.getfixturevalue("flex")
    forest = plant(groups)
    tokens, generator = len(forest.end), torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, tokens, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, tokens, 8, generator=generator)
    layout = Layout(forest, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALL_TREE", ATTENTION.get(way))
        found = layout.attend(torch.nn.Module(), query, key, value, scale=0.7, dropout=0.0, window=window, softcap=None)
    assert {name for name, _ in layout._parts} == {way}
    mask = packing.visible(forest, window)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
