"""Toys: policies small enough to know exactly, and what an objective does to them.

A toy has prompts of one token, completions of C positions over S symbols, a small transformer that
has learned a random language, and a reward. It never writes EOS, so that all completions have the
same length. The transformer is read out once in every state that a prompt and a partial completion
can be in. Samplers, corruptions and losses then see the table of its logits instead of the
transformer, and a gradient with respect to the table becomes one with respect to the parameters by
the Jacobian of the table. All of them are the real code; only the model is looked up.

Letters of axes: `Q` prompts, the last of which is the masked one; `N` states, `X` completions, `C`
positions, `V` vocabulary, `E` = Q N C V entries of a table, `W` parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from spg_jax.diffusion import exact
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.transformer import TransformerConfig
from spg_jax.sharding import abstract_params

LENGTH = 4  # C
SYMBOLS = 3  # S
PROMPTS = 2  # besides the masked one
EOS, MASK = SYMBOLS, SYMBOLS + 1
VOCABULARY = SYMBOLS + 2
# What is added to the logits of EOS and MASK, so that they have no probability.
NEVER = -30.0
COUPLING = 1.0  # the standard deviation of the energies of a language
TRAINING_STEPS, TRAINING_RATE = 300, 1e-2
# Programs here are small and many, so that the compiler takes longer than they do.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


class Toy(NamedTuple):
    """A policy with everything that is known about it."""

    table: Array  # [Q, N, C, V] logits in every state
    jacobian: Array  # [E, W] of the table with respect to the parameters
    reward: Array  # [Q - 1, X] of each prompt and completion


class ToyPolicy(Policy):
    """A transformer that gives no probability to EOS and MASK."""

    def unembed(self, variables: Variables, hidden: Array) -> Array:
        """As in `Policy`."""
        special = np.where(self.allowed, 0.0, NEVER).astype(np.float32)
        logits = super().unembed(variables, hidden)
        return logits + special.reshape((1,) * (logits.ndim - 1) + special.shape)


class TablePolicy(Policy):
    """A policy whose parameters are its logits in every state, [Q, N, C, V]."""

    def completion_logits(
        self,
        variables: Variables,
        prompt: Array,
        valid: Array,
        completion: Array,
        dropout: Array | None = None,
        exists: Array | None = None,
    ) -> Array:
        """As in `Policy`. A toy has no EOS, hence no position that does not exist."""
        return lookup(variables['params'], prompt, completion)


def lookup(table: Array, prompt: Array, completion: Array) -> Array:
    """The logits [B, C, V] of prompts [B, 1] and partial completions [B, C] in a table."""
    digits = jnp.where(completion == MASK, SYMBOLS, completion)
    powers = (SYMBOLS + 1) ** np.arange(LENGTH)
    state = (digits * powers[None, :]).sum(-1)  # [B]
    which = jnp.where(prompt[:, 0] == MASK, PROMPTS, prompt[:, 0])  # [B]
    return table[which, state]


def completion_index(completion: Array | np.ndarray) -> Array | np.ndarray:
    """The places [...] of completions [..., C] in the order of `exact.every_completion`."""
    powers = SYMBOLS ** np.arange(LENGTH)
    return (completion * powers.reshape((1,) * (completion.ndim - 1) + powers.shape)).sum(-1)


def network() -> ToyPolicy:
    """The transformer of a toy."""
    config = TransformerConfig(
        VOCABULARY, width=8, layers=1, heads=2, kv_heads=2, mlp_width=16, rope_theta=100.0
    )
    return ToyPolicy(config, MASK, EOS, np.arange(VOCABULARY) < SYMBOLS)


def as_table(policy: Policy) -> TablePolicy:
    """The policy that looks its logits up."""
    return TablePolicy(policy.config, policy.mask_id, policy.eos_id, policy.allowed)


def make_toys(seeds: range, reward: str, steps: int = TRAINING_STEPS) -> list[Toy]:
    """Toys with random languages, each learned by a transformer of its own.

    Args:
      seeds: one for each toy.
      reward: 'answer' or 'cells', of `rewards`.
      steps: of the training of each transformer.
    """
    policy = network()

    def know(params: Any) -> tuple[Array, Array]:
        flat, unravel = ravel_pytree(params)
        table, push = jax.linearize(lambda flat: table_of_network(policy, unravel(flat)), flat)
        columns = jax.lax.map(lambda x: push(x).reshape(-1), jnp.eye(len(flat)), batch_size=64)
        return table, columns.T

    params = learn(seeds, steps)
    tables, jacobians = quick(lambda params: jax.lax.map(know, params), params)(params)
    return [
        Toy(table, jacobian, jnp.asarray(rewards(reward, seed)))
        for seed, table, jacobian in zip(seeds, tables, jacobians, strict=True)
    ]


def learn(seeds: range, steps: int = TRAINING_STEPS) -> Any:
    """The parameters of transformers that have learned random languages, each leaf [seeds, ...]."""
    policy = network()
    start = _initial_parameters(policy)
    weights = np.stack([training_weights(language(seed)) for seed in seeds])

    def learn_all(weights: Array) -> Any:
        return jax.lax.map(lambda weight: _learn(policy, start, weight, steps), weights)

    # Only a long training is worth an optimised program.
    compiled = jax.jit(learn_all) if steps == TRAINING_STEPS else quick(learn_all, weights)
    return compiled(weights)


def _initial_parameters(policy: Policy) -> Any:
    """The parameters that all transformers start from: scales of 1, and small random kernels."""
    rng = np.random.default_rng(0)

    def initial(path: Any, shape: jax.ShapeDtypeStruct) -> Array:
        if 'norm' in jax.tree_util.keystr(path):
            return jnp.ones(shape.shape)
        return jnp.asarray(rng.normal(size=shape.shape) / policy.config.width**0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(initial, abstract_params(policy.model))


def table_of_network(policy: Policy, params: Any) -> Array:
    """The logits [Q, N, C, V] of a transformer in every state."""
    states = exact.every_state(LENGTH, SYMBOLS, MASK)  # [N, C]
    prompts = np.array([*range(PROMPTS), MASK], np.int32)
    count = len(states) * len(prompts)
    logits = policy.completion_logits(
        {'params': params},
        jnp.asarray(np.repeat(prompts, len(states))[:, None]),
        jnp.ones((count, 1), bool),
        jnp.asarray(np.tile(states, (len(prompts), 1))),
    )
    return logits.reshape(len(prompts), len(states), LENGTH, VOCABULARY)


def language(seed: int) -> np.ndarray:
    """The probabilities [Q, X] of completions in a random language.

    Energies are random for each token, which depend on the prompt, and for each pair of tokens. The
    masked prompt stands for any of the prompts.
    """
    rng = np.random.default_rng(seed)
    completions = exact.every_completion(LENGTH, SYMBOLS)
    places = np.arange(LENGTH)
    single = rng.normal(size=(PROMPTS, LENGTH, SYMBOLS))[:, places, completions].sum(-1)
    pair = rng.normal(size=(LENGTH, LENGTH, SYMBOLS, SYMBOLS))
    pairs = sum(
        pair[i, j, completions[:, i], completions[:, j]] for i in places for j in places if i < j
    )
    weight = np.exp(COUPLING * (single + pairs[None]))
    law = weight / weight.sum(-1, keepdims=True)
    return np.concatenate([law, law.mean(0, keepdims=True)])


def rewards(name: str, seed: int) -> np.ndarray:
    """The reward [Q - 1, X] of each prompt and completion.

    'answer' gives 1 where the sum of the tokens, modulo S, is the prompt, and 0 elsewhere. 'cells'
    gives the share of positions that agree with a random solution of the prompt.
    """
    completions = exact.every_completion(LENGTH, SYMBOLS)
    if name == 'answer':
        prompts = np.arange(PROMPTS)[:, None]
        return (completions.sum(-1)[None] % SYMBOLS == prompts).astype(np.float32)
    solution = np.random.default_rng(1000 + seed).integers(SYMBOLS, size=(PROMPTS, 1, LENGTH))
    return (completions[None] == solution).mean(-1).astype(np.float32)


def training_weights(law: np.ndarray) -> np.ndarray:
    """The weight [Q, N, C, V] of log pi in the negative ELBO of a language, enumerated.

    Args:
      law: [Q, X].
    """
    states = exact.every_state(LENGTH, SYMBOLS, MASK)
    completions = exact.every_completion(LENGTH, SYMBOLS)
    masked, _, chance = exact.uniform_masks(LENGTH, LENGTH)
    rows = exact.masked_states(LENGTH, SYMBOLS)  # [X, 2**C]
    weight = np.zeros((len(law), len(states), LENGTH, VOCABULARY), np.float32)
    for mask, probability in zip(masked, np.asarray(chance), strict=True):
        state = rows[:, exact.bit_set(np.flatnonzero(mask))]  # [X]
        for place in np.flatnonzero(mask):
            share = law * probability * LENGTH / mask.sum()  # [Q, X]
            for prompt, values in enumerate(share):
                np.add.at(weight[prompt], (state, place, completions[:, place]), values)
    return weight


def _learn(policy: Policy, params: Any, weight: Array, steps: int) -> Any:
    """Trains a transformer by the exact gradient of the negative ELBO."""
    optimizer = optax.adam(optax.cosine_decay_schedule(TRAINING_RATE, steps))

    def loss(params: Any) -> Array:
        log_prob = jax.nn.log_softmax(table_of_network(policy, params), axis=-1)
        return -(weight * log_prob).sum()

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    return jax.lax.scan(step, start, None, length=steps)[0][0]


def quick(function: Callable, *arguments: Any) -> Callable:
    """The function compiled for these arguments, with little optimisation."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK)


# --- the true gradient ----------------------------------------------------------------------------


def laws(table: Array, decoding: SamplingConfig) -> Array:
    """The law of completions of each prompt under a decoder, [Q - 1, X]."""
    return jax.vmap(lambda logits: exact.completion_law(logits, decoding, SYMBOLS, MASK))(
        table[:PROMPTS]
    )


def law_gradients(table: Array, decoding: SamplingConfig) -> tuple[Array, Array]:
    """The law [Q - 1, X] and its derivative [Q - 1, X, N C V] with respect to the table."""

    def of_prompt(logits: Array) -> tuple[Array, Array]:
        law, pull = jax.vjp(
            lambda logits: exact.completion_law(logits, decoding, SYMBOLS, MASK), logits
        )
        rows = jax.lax.map(lambda x: pull(x)[0].reshape(-1), jnp.eye(len(law)), batch_size=27)
        return law, rows

    return jax.lax.map(of_prompt, table[:PROMPTS])


def through_jacobian(gradients: Array, toy: Toy) -> Array:
    """Derivatives [Q - 1, ..., N C V] of the logits of each prompt -> of the parameters, [..., W].

    The result has the same leading axes.
    """
    parts = toy.jacobian.reshape(PROMPTS + 1, -1, toy.jacobian.shape[-1])[:PROMPTS]
    return jnp.einsum('q...e,qew->q...w', gradients, parts)
