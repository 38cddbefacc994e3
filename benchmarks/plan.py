"""How long the plan of a large tree takes, from shapes alone: `python benchmarks/plan.py`."""

import statistics
import time

import jax
import jax.numpy as jnp

import optimorph


def main():
    one = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    params = {f"blocks_{k}": {f"layer_{j}": {"kernel": one} for j in range(10)} for k in range(1000)}
    seconds = []
    for round_ in range(6):
        renamed = {f"{round_}_{key}": value for key, value in params.items()}  # no path was seen before
        started = time.perf_counter()
        text = str(optimorph.plan(renamed))
        seconds.append(time.perf_counter() - started)
    print(text)
    print(f"\n{len(optimorph.plan(params)):,} leaves: median {statistics.median(seconds[1:]):.2f} s")


if __name__ == "__main__":
    main()
