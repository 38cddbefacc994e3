"""Programs that depend on what they are compiled for: that is known when a program is lowered, not before."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh

PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu", "rocm": "gpu"}
"""A name of a compiler's platform → the kind of device."""


class Target(NamedTuple):
    """What a program is compiled for.

    Args:
      platform: "cpu", "gpu" or "tpu"; "" if it is another one, or not known.
      devices: the number of devices.
      mesh: of those devices; None if the shardings of the program name none.
      exported: whether the program is lowered by `jax.export`, which cannot save functions of Python.
    """

    platform: str = ""
    devices: int = 1
    mesh: AbstractMesh | None = None
    exported: bool = False


UNKNOWN = Target()


Program = Callable[..., Sequence[jax.Array]]
"""(about, target, *arrays) → arrays."""


def for_target(f: Program, about: Hashable, *operands: jax.Array, results: int) -> list[jax.Array]:
    """`f(about, target, *operands)`, traced when the program is lowered.

    So the same call gives the right program when a CPU compiles for a TPU, ahead of time or by `jax.export`.
    Derivatives are those of the program for an unknown target. `about` says what to compute. The results have
    the shapes and dtypes of as many first operands.
    """
    params = {"x64": jax.numpy.result_type(float) == "float64", "told": _told()}
    return target_p.bind(*operands, f=f, about=about, results=results, **params)


@functools.cache
def _told() -> ClosedJaxpr:
    """JAX tells the lowering of a program its devices and mesh if `custom_partitioning` is in its jaxpr."""
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(partition=None, sharding_rule="i -> i")
    return jax.make_jaxpr(identity)(jax.numpy.zeros(1, "int32"))


target_p = Primitive("for_target")
target_p.multiple_results = True


@functools.partial(jax.jit, static_argnames=("f", "about", "results", "x64", "told"))
def _compiled(*operands, **params):
    return target_p.bind(*operands, **params)


def _eagerly(*operands, f, about, **params):
    """Under `jax.disable_jit` the program runs as it is written, for the devices of its operands."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        device, *_ = jax.numpy.asarray(operands[0]).devices()
        return [*f(about, Target(device.platform), *operands)]
    return _compiled(*operands, f=f, about=about, **params)


def _shapes(*operands, results, **params):
    return operands[:results]


def _jvp(primals, tangents, *, f, about, **params):
    program = functools.partial(f, about, UNKNOWN)
    _, out = jax.jvp(program, tuple(primals), tuple(ad.instantiate_zeros(t) for t in tangents))
    return target_p.bind(*primals, f=f, about=about, **params), [*out]


def _batch(operands, axes, *, f, results, **params):
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    operands = [batching.bdim_at_front(x, axis, size) for x, axis in zip(operands, axes, strict=True)]
    return target_p.bind(*operands, f=_Mapped(f), results=results, **params), [0] * results


class _Mapped(NamedTuple):
    """A program mapped over a first axis of all arrays."""

    f: Program

    def __call__(self, about: Hashable, target: Target, *operands: jax.Array) -> Sequence[jax.Array]:
        return jax.vmap(functools.partial(self.f, about, target))(*operands)


def _lowering(platform: str) -> Any:
    def lower(ctx, *operands, f, about, results, x64, told):
        target = _target(platform, ctx.module_context)

        def program(*operands):
            return [*f(about, target, *operands)]

        with jax.enable_x64(x64):  # a program may be lowered outside the context in which it was traced
            return mlir.lower_fun(program)(ctx, *operands)

    return lower


def _target(platform: str, module: Any) -> Target:
    """Inside `jax.shard_map` a program is that of one device: its context has no number of devices."""
    context, exported = module.axis_context, module.lowering_parameters.for_export
    devices, mesh = getattr(context, "num_devices", 1), getattr(context, "abstract_mesh", None)
    return Target(platform, devices, mesh, exported)


target_p.def_impl(_eagerly)
target_p.def_abstract_eval(_shapes)
ad.primitive_jvps[target_p] = _jvp
batching.primitive_batchers[target_p] = _batch
mlir.register_lowering(target_p, _lowering(""))
for _name, _platform in PLATFORMS.items():
    mlir.register_lowering(target_p, _lowering(_platform), platform=_name)
