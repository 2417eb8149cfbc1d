# SPDX-License-Identifier: Apache-2.0
"""Where the host puts a model and its optimizer, and under which mesh.

The host places by the axes that a parameter names: it fails where a mesh lacks one or one does not
divide, and cuts heads. Here `sharding.param_shardings` decides, as for every other door.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from tunix.rl import utils
from tunix.rl.rl_cluster import Role

from ..model.gemma4 import Gemma4Model
from ..sharding import param_shardings, shard_model
from .hooks import around
from .train_step import gradient_sums


@around
def wrap_cluster_init(original, self, *args: Any, **kwargs: Any) -> None:
    """jax.set_mesh with another mesh than a role's is refused by name."""
    around_all = jax.sharding.get_mesh()
    if isinstance(kwargs.get("actor"), Gemma4Model) and not around_all.empty:
        for role, mesh in kwargs["cluster_config"].role_to_mesh.items():
            if mesh != around_all:
                raise ValueError(
                    f"jax.set_mesh: {around_all} is set, and role {role.value!r} is on {mesh}; JAX "
                    "would refuse its arrays. Leave jax.set_mesh out: Tunix enters each role's "
                    "mesh itself"
                )
    original(self, *args, **kwargs)


@around
def wrap_backbone_sharing_map(original, self, actor: Any, reference: Any = None) -> None:
    """A plain reference beside a quantised policy is a model of its own.

    The host takes every reference of an adapted actor for its backbone, compares the two array by
    array and moves them as one.
    """
    original(self, actor, reference)
    if not (isinstance(actor, Gemma4Model) and isinstance(reference, Gemma4Model)):
        return
    backbones = [nnx.state(model, nnx.Not(nnx.LoRAParam)) for model in (actor, reference)]
    if jax.tree.structure(backbones[0]) == jax.tree.structure(backbones[1]):
        return
    sharing = self._backbone_sharing_map
    for role, others in sharing.items():
        sharing[role] = [other for other in others if Role.REFERENCE not in (role, other)]
    logging.warning(
        "reference: its kernels are not those of the quantised policy, so it takes memory of "
        "its own and the two differ from the start. tunix_gemma4.lora.reference_model(policy) "
        "is the base that the policy starts from, and shares its arrays"
    )


@around
def wrap_load_model(original, self, model_or_path: Any, mesh: Any, data_type: Any = None) -> Any:
    """Models go onto any mesh by our rules: heads are never cut, missing axes are dropped."""
    if isinstance(model_or_path, Gemma4Model) and not mesh.empty:
        state = nnx.state(model_or_path)
        if utils.get_pytree_mesh_info(state) != mesh:
            model_or_path = nnx.clone(model_or_path)
            if data_type is not None:
                state = jax.tree.map(
                    lambda x: x.astype(data_type) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                    state,
                )
            nnx.update(model_or_path, state)
            shard_model(model_or_path, mesh)
    return original(self, model_or_path, mesh, data_type)


@around
def wrap_shard_optimizer(original, self, mesh: Any) -> None:
    """The optimizer's state lies where its parameters lie."""
    if not isinstance(self.model, Gemma4Model) or mesh.empty:
        return original(self, mesh)
    return place_optimizer(self, mesh)


def place_optimizer(trainer: Any, mesh: Any) -> None:
    """Puts the state of a trainer's optimizer, and its sums of gradients, where parameters lie."""
    sums = gradient_sums(trainer)
    states = [(trainer.optimizer, nnx.state(trainer.optimizer, nnx.optimizer.OptState))]
    states += [] if sums is None else [(sums, nnx.state(sums))]
    for holder, state in states:
        nnx.update(holder, jax.device_put(state, param_shardings(state, mesh)))
