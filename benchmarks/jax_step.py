"""The step of `benchmarks.private_step` in JAX with jax_privacy: an LSTM by scan, per-patient gradients by vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.private_step import Shape


def jax_privacy_step(shape: Shape) -> Callable[[], object]:
    """Gradient of each patient's k windows, clipped and summed by jax_privacy, noise and Adam; compiled once."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax_privacy import clipped_grad

    from benchmarks.private_step import CLIP, FEATURES, NOISE, OUTPUTS, data

    draw = np.random.default_rng(0)

    def uniform(*size: int) -> Any:
        return jnp.asarray(draw.uniform(-1, 1, size) * shape.hidden**-0.5, jnp.float32)

    below = [FEATURES] + [shape.hidden] * (shape.layers - 1)
    layers = [(uniform(4 * shape.hidden, n + shape.hidden), uniform(4 * shape.hidden)) for n in below]
    params = (layers, (uniform(OUTPUTS, shape.hidden), uniform(OUTPUTS)))

    def loss(params: Any, x: Any, y: Any) -> Any:
        seen = jnp.swapaxes(x, 0, 1)
        for weight, bias in params[0]:

            def cell(state: Any, now: Any, weight: Any = weight, bias: Any = bias) -> Any:
                hidden, held = state
                i, f, g, o = jnp.split(jnp.concatenate([now, hidden], -1) @ weight.T + bias, 4, -1)
                held = jax.nn.sigmoid(f) * held + jax.nn.sigmoid(i) * jnp.tanh(g)
                hidden = jax.nn.sigmoid(o) * jnp.tanh(held)
                return (hidden, held), hidden

            start = jnp.zeros((shape.k, shape.hidden))
            _, seen = jax.lax.scan(cell, (start, start), seen)
        return jnp.mean((seen[-1] @ params[1][0].T + params[1][1] - y) ** 2)

    clipped = clipped_grad(loss, l2_clip_norm=CLIP, batch_argnums=(1, 2), keep_batch_dim=False)

    @jax.jit
    def step(params: Any, first: Any, second: Any, key: Any, x: Any, y: Any) -> Any:
        leaves, tree = jax.tree.flatten(clipped(params, x, y))
        keys = jax.random.split(key, len(leaves) + 1)
        pairs = zip(leaves, keys[1:], strict=True)
        noised = [(g + CLIP * NOISE * jax.random.normal(k, g.shape)) / shape.patients for g, k in pairs]
        grads = jax.tree.unflatten(tree, noised)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
        params = jax.tree.map(lambda p, m, v: p - 1e-3 * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return params, first, second, keys[0]

    zeros = jax.tree.map(jnp.zeros_like, params)
    x, y = (jnp.asarray(part.transpose(0, 1).contiguous().cpu().numpy()) for part in data(shape))
    state = [params, zeros, zeros, jax.random.key(0)]

    def run() -> None:
        state[:] = step(*state, x, y)
        jax.block_until_ready(state)

    return run
