# SPDX-License-Identifier: Apache-2.0
"""Every number that a user may set has a domain, and NaN is in none."""

import math

import jax
import numpy as np
import optax
import pytest

from tunix_gemma4 import LoraConfig
from tunix_gemma4.config.domains import DOMAINS, Domain, domain, numeric_fields
from tunix_gemma4.plugin.optimizer import make_optimizer, make_schedule
from tunix_gemma4.plugin.rl.cluster import cluster_config, make_algorithm
from tunix_gemma4.plugin.sft.trainer import Gemma4Trainer, TrainingConfig
from tunix_gemma4.plugin.training_config import make_training_config
from tunix_gemma4.sampling import generate
from tunix_gemma4.settings.grpo import GrpoRunConfig, load_grpo_config
from tunix_gemma4.settings.load_config import sections
from tunix_gemma4.settings.sft import RunConfig, load_run_config

RECIPES = {RunConfig: load_run_config, GrpoRunConfig: load_grpo_config}
MINIMAL = "{model: m, output_dir: out, data: {path: train.jsonl}%s}\n"
REWARDS = ", reward_functions: [numeric_answer], rollout_mesh: {tp: 1}"


def keys(kind, prefix=""):
    """Every number among the settings of `kind`: its key, and the dataclass it is of."""
    for name, _ in numeric_fields(kind):
        yield prefix + name, kind
    for name, section in sections(kind).items():
        yield from keys(section, f"{prefix}{name}.")


LISTS = ("image_buckets", "bucket_lengths", "reward_weights")
OTHERS = [(kind, name) for kind in (LoraConfig, TrainingConfig) for name, _ in numeric_fields(kind)]


def test_every_number_has_a_domain_in_the_table():
    names = {key.split(".")[-1] for recipe in RECIPES for key, _ in keys(recipe)}
    names |= {name for _, name in OTHERS}
    assert {"learning_rate", "alpha", "image_buckets", "reward_weights", "tile_size"} <= names
    assert names <= DOMAINS.keys()


def outside(allowed):
    """What YAML may hold that is not in a domain."""
    found = [".nan"] + [f"{allowed.low - 1:g}"] * (allowed.low > -math.inf)
    found += [f"{allowed.low:g}"] * allowed.low_open + [f"{allowed.high:g}"] * allowed.high_open
    return found + ["1e39"] * (not allowed.whole)  # Infinite as float32.


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_setting_of_a_recipe_takes_what_is_outside(tmp_path, recipe):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL % (REWARDS if recipe is GrpoRunConfig else ""))
    lora = [f"lora.{field}={value}" for field, value in vars(LoraConfig()).items() if value]
    RECIPES[recipe](path, lora)
    for key, kind in keys(recipe):
        name = key.split(".")[-1]
        for value in outside(domain(name, kind.__name__)):
            value = f"[{value}]" if name in LISTS else value
            with pytest.raises(ValueError, match=rf"{name}\b"):
                RECIPES[recipe](path, [*lora, f"{key}={value}"])


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_no_field_takes_what_is_outside(kind, name):
    least = {TrainingConfig: {"eval_every_n_steps": 1}}
    for value in (math.nan, math.inf, DOMAINS[name].low - 1, True, "1"):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, found "):
            made = kind(**least.get(kind, {}) | {name: value})
            Gemma4Trainer(None, optax.sgd(1.0), made)


def test_no_function_takes_what_is_outside(tmp_path):
    schedule = optax.constant_schedule(1.0)
    calls = {
        "learning_rate": lambda x: make_schedule(
            "linear", learning_rate=x, warmup_steps=0, total_steps=1
        ),
        "warmup_steps": lambda x: make_schedule(
            "linear", learning_rate=1.0, warmup_steps=x, total_steps=1
        ),
        "eps": lambda x: make_optimizer(schedule, eps=x),
        "max_grad_norm": lambda x: make_optimizer(schedule, max_grad_norm=x),
        "temperature": lambda x: generate(*model_and_batch(), max_new_tokens=1, temperature=x),
        "max_new_tokens": lambda x: generate(*model_and_batch(), max_new_tokens=x),
        "save_steps": lambda x: make_training_config(RunConfig(save_steps=x)),
        "beta": lambda x: make_algorithm(
            GrpoRunConfig(loss_type="grpo", num_generations=2, beta=x)
        ),
        "top_p": lambda x: cluster_config(GrpoRunConfig(top_p=x), optimizer=None, mesh=None),
    }

    class Config:
        config = None

    def model_and_batch():
        return Config, None

    for name, call in calls.items():
        for value in (math.nan, math.inf, -1):
            with pytest.raises(ValueError, match=rf"^{name}: expected .*, found {value}"):
                call(value)
    with pytest.raises(ValueError, match=r"^b2: expected at least 0 and below 1, found 1\.0"):
        make_optimizer(schedule, b2=1.0)
    with pytest.raises(ValueError, match="^b1: .*, found 0.99999999"):
        make_optimizer(schedule, b1=0.99999999)  # 1 as float32: it would never forget.


def test_domains_take_numbers_of_any_kind():
    assert Domain(low=1, whole=True).holds(np.int32(2)) and not Domain(whole=True).holds(2.0)
    assert Domain(low=0).holds(np.float32(0.5)) and Domain(low=0).holds(3)


def test_a_greatest_norm_of_0_is_none():
    gradients = {"kernel": np.full((2, 2), 100.0, np.float32)}
    found, states = [], set()
    for norm in (0, None, 1.0):
        optimizer = make_optimizer(optax.constant_schedule(0.1), max_grad_norm=norm, eps=1.0)
        updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
        found.append(np.asarray(jax.tree.leaves(updates)[0]))
        states.add(str(jax.tree.structure(optimizer.init(gradients))))
    # A run that clips may go on without, and one that does not with it.
    assert len(states) == 1
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0]).min() > 2 * np.abs(found[2]).max()
