"""Recipes: strict keys and types, flags on top, every shipped recipe readable."""

import pytest
import yaml

from ekgfx.base.units import budget_of, bytes_of
from ekgfx.errors import RecipeError
from ekgfx.settings import recipe
from ekgfx.settings.recipe import Recipe


def written(tmp_path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path):
    loaded = recipe.load(written(tmp_path, "model: timm:resnet18\nsearch: {flops: 0.5, ignore: [fc*]}\nseed: 3\n"))
    assert (loaded.model, loaded.search.flops, loaded.search.ignore, loaded.seed) == ("timm:resnet18", 0.5, ("fc*",), 3)
    assert loaded.search.params is None
    assert loaded.finetune == Recipe().finetune


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_load_and_survive_json(name):
    loaded = recipe.load(name)
    assert loaded.model
    assert loaded.description
    assert loaded.measured
    assert Recipe.from_json(loaded.to_json()) == loaded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("serach: {flops: 0.5}", "unknown key serach in .*; did you mean search?"),
        ("search: {flop: 0.5}", "unknown key search.flop in .*; did you mean flops?"),
        ("search: {cache: lots}", "'lots' is no size of memory; write it as 2GiB"),
        ("finetune: {epochs: ten}", "finetune.epochs in .* must be a whole number; got 'ten'"),
        ("finetune: {epochs: 1.5}", "finetune.epochs in .* must be a whole number; got 1.5"),
        ("finetune: {epochs: true}", "finetune.epochs in .* must be a whole number; got True"),
        ("finetune: {lr: 1e-2}", "finetune.lr in .* must be a number; got '1e-2'"),
        ("search: {strategy: greedy}", "search.strategy in .* must be one of ekg, global, uniform; got 'greedy'"),
        ("search: {ignore: fc}", "search.ignore in .* must be a list; got 'fc'"),
        ("search: 3", "search of .* must be keys with values, got 3"),
        ("- model", "must be keys with values, got"),
        ("model: [", "is not YAML"),
        ("model: !!python/object/apply:os.system [ls]", "is not YAML: could not determine a constructor"),
        ("search: {flops: 55}", "flops is the fraction to keep, between 0 and 1 .*; got 55"),
        (
            "search: {flops: half}",
            "flops: 'half' is no fraction and no amount; .* 0.55 or 55%, or .* such as 2.0G",
        ),
        ("search: {params: 5ms}", "params: '5ms' is no fraction and no amount; .* such as 5M"),
        ("search: {latency: 0ms}", "latency: '0ms' is no fraction"),
        ("search: {flops: true}", "search.flops in .* must be text; got True"),
        ("a: &a [*a]", "unknown key a in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.load(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_unknown_recipe():
    with pytest.raises(RecipeError, match=r"no recipe 'quikstart'; did you mean quickstart\?"):
        recipe.load("quikstart")
    with pytest.raises(RecipeError, match=r"cannot read the recipe nowhere\.yaml"):
        recipe.load("nowhere.yaml")


def test_flags_win_over_the_recipe():
    base = Recipe.from_json({"search": {"flops": 0.5, "align": 8}})
    changed = recipe.override(base, {"search.flops": 0.7, "seed": 1})
    assert (changed.search.flops, changed.search.align, changed.seed) == (0.7, 8, 1)
    with pytest.raises(RecipeError, match="must be one of"):
        recipe.override(base, {"search.strategy": "best"})


@pytest.mark.parametrize(
    ("kind", "asked", "meant"),
    [
        ("flops", 0.55, (0.55, False)),
        ("flops", "0.55", (0.55, False)),
        ("flops", "2.0G", (2e9, True)),
        ("flops", ".5 T", (5e11, True)),
        ("params", "5M", (5e6, True)),
        ("params", "1B", (1e9, True)),
        ("latency", "8ms", (8.0, True)),
        ("latency", "500us", (0.5, True)),
        ("latency", "1.5 s", (1500.0, True)),
    ],
)
def test_budgets_are_fractions_or_amounts(kind, asked, meant):
    assert budget_of(kind, asked) == pytest.approx(meant)
    assert Recipe.from_json({"search": {kind: asked}}).search.budgets == {kind: asked}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("search.step", 0, "a part of the widths, above 0 and up to 1"),
        ("search.min_width", 1.0, "a part of the widths, from 0 and below 1"),
        ("search.align", 0, "at least 1"),
        ("search.accept", -1, "at least 1"),
        ("search.images", 0, "at least 1"),
        ("repair.images", 0, "at least 1"),
        ("pretrain.epochs", -1, "at least 0"),
        ("pretrain.views", 0, "at least 1"),
        ("finetune.lr", 0.0, "a learning rate above 0"),
        ("finetune.momentum", 1.0, "between 0 and below 1"),
        ("finetune.ema", 1.0, "a decay between 0 and 1, such as 0.999"),
        ("finetune.temperature", 0.0, "a temperature above 0"),
        ("finetune.top_k", 0, "at least 1"),
        ("export.batches", [8, 0], "batch sizes of at least 1"),
    ],
)
def test_a_number_out_of_its_range_is_said_by_its_key(key, value, allowed):
    with pytest.raises(RecipeError, match=rf"^{key} .*: use {allowed}$"):
        recipe.override(Recipe(), {key: value})


def test_several_budgets_may_be_given():
    assert Recipe.from_json({"search": {"flops": 0.5, "params": "5M"}}).search.budgets == {
        "flops": 0.5,
        "params": "5M",
    }


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10kb", 10_000), ("0", 0), (7, 7), ("12", 12)]
)
def test_sizes_of_memory(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["much", "2 parsecs", "-1", 5000 * "a", 5000 * "9", 400 * "9" + "GiB"])
def test_no_sizes_of_memory(text):
    with pytest.raises(RecipeError, match="is no size of memory") as error:
        bytes_of(text)
    assert len(str(error.value)) < 200


def test_a_file_that_names_itself_a_billion_times_is_refused_at_once(tmp_path):
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 40)]
    for rest in ("", "description: *x39"):
        with pytest.raises(RecipeError) as caught:
            recipe.load(written(tmp_path, "\n".join([*lines, rest])))
        assert len(str(caught.value)) < 500
    with pytest.raises(RecipeError, match="description in .* must be text; got"):
        Recipe.from_json({"description": yaml.safe_load("\n".join(lines))["x39"]})
