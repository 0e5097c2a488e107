"""The step of `benchmarks.private_step` in JAX with jax_privacy: an LSTM by scan, per-patient gradients by vmap.

It runs in a process and an environment of its own, because jax_privacy wants older packages than ours. Each line on
standard input asks for one step and is answered with its milliseconds of processor time.

    python -m benchmarks.jax_step [--memory] WINDOWS HIDDEN LAYERS K
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.step_shape import CLIP, FEATURES, NOISE, OUTPUTS, STEPS, Shape, extra_megabytes


def jax_privacy_step(shape: Shape) -> Callable[[], object]:
    """Gradient of each patient's k windows, clipped and summed by jax_privacy, noise and Adam; compiled once."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax_privacy import clipped_grad

    draw = np.random.default_rng(0)

    def uniform(*size: int) -> Any:
        return jnp.asarray(draw.uniform(-1, 1, size) * shape.hidden**-0.5, jnp.float32)

    def normal(*size: int) -> Any:
        return jnp.asarray(draw.standard_normal(size), jnp.float32)

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
    x, y = normal(shape.patients, shape.k, STEPS, FEATURES), normal(shape.patients, shape.k, OUTPUTS)
    state = [params, zeros, zeros, jax.random.key(0)]

    def run() -> None:
        state[:] = step(*state, x, y)
        jax.block_until_ready(state)

    return run


def main(arguments: list[str]) -> None:
    """Answer lines with the time of a step, or print the extra memory of a few."""
    shape = Shape.of(arguments[-4:])
    if "--memory" in arguments:
        print(f"{extra_megabytes(jax_privacy_step, shape):.0f}")
        return
    step = jax_privacy_step(shape)
    for _ in sys.stdin:
        started = time.process_time()
        step()
        print(1e3 * (time.process_time() - started), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
