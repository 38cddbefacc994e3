"""Numbers in the right precision: arithmetic in float32 or wider, hyperparameters, counts."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import ShapedArray
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optimorph._core.shown import shown
from optimorph._core.types import DTypeLike, Numeric, PyTree, ScalarOrSchedule, Schedule
from optimorph._core.warn import quietly

_PYTHON = (bool, int, float, complex, np.ndarray, np.generic)


class NotScalarError(ValueError):
    """A schedule returned an array, or no number; `transform` says of which transform."""

    def __init__(self, value: Any):
        if is_array(value) and np.ndim(value):
            found = f"an array of shape {np.shape(value)}. For a sweep, jax.vmap a function of one number."
        else:
            made = "a schedule and not the function that makes it: constant_schedule(1e-3)"
            found = f"{shown(value)}. Type {made}."
        super().__init__(f"a schedule must return one number, but returned {found}")


@functools.cache
def upcast_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 or `dtype`, whichever is wider; complex stays complex."""
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def upcast(x: Any) -> jax.Array:
    """`x` in float32 or wider, the precision of all arithmetic here."""
    if isinstance(x, jax.Array) and x.dtype == upcast_dtype(x.dtype):
        return x  # asarray takes ten times as long to trace
    return jnp.asarray(x, upcast_dtype(jnp.result_type(x)))


def with_type_of(x: jax.Array, like: Any) -> jax.Array:
    """`x` with the sharding of another array's type, over `Explicit` mesh axes; unchanged over other axes."""
    own, other = jax.typeof(x).sharding, getattr(like, "sharding", None)
    other = jax.typeof(like).sharding if isinstance(like, jax.Array) else other
    if not isinstance(other, NamedSharding) or own.spec == other.spec:
        return x
    if other.mesh.empty:  # as that of an array on one device
        other = NamedSharding(own.mesh, other.spec)
    return jax.sharding.reshard(x, other) if AxisType.Explicit in other.mesh.axis_types else x


def types_of(f: Callable[..., Any], *args: Any) -> Any:
    """The types of the results; `jax.eval_shape` knows no shardings over `Explicit` beside `Auto` axes."""
    program, made = jax.make_jaxpr(f, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(made), program.out_avals)


def varying(x: jax.Array, *likes: Any) -> jax.Array:
    """`x`, varying over the manual mesh axes over which other arrays vary, where types say so."""
    return varying_over(x, frozenset().union(*map(varies_over, likes)))


def varying_over(x: jax.Array, names: Iterable[str]) -> jax.Array:
    """`x`, varying over these manual mesh axes, as a reduction over all of them needs it."""
    more = {*names} - varies_over(x)
    return jax.lax.pcast(x, tuple(more), to="varying") if more else x


def varies_over(x: Any) -> frozenset[str]:
    """The manual mesh axes over which an array may have different values, where types say so."""
    kind: Any = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def cast_like(x: jax.Array, like: Any) -> jax.Array:
    """`x` in the precision of `like`; a real `x` stays real beside a complex `like`, as a square does."""
    dtype = jnp.result_type(like)
    if x.dtype == dtype:
        return x
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(x):
        dtype = jnp.finfo(dtype).dtype
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)


def in_dtype_of(x: Any, like: Any) -> Any:
    """A part of a state in the dtype of the same part after an update; random keys stay as they are."""
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def as_scalar(value: Numeric, like: jax.Array) -> Any:
    """A hyperparameter that can be combined with the array `like` without a loss of precision.

    Raises:
      NotScalarError: an array, as a schedule may return.
    """
    if type(value) in (int, float):
        return float(value)  # already a weak type; the integer may be too large for int32
    if np.ndim(value):
        raise NotScalarError(value)
    x = jnp.asarray(value)
    own = jax.typeof(x).sharding.mesh.axis_types
    return (_in_context(x, own) if AxisType.Explicit in own else x).astype(like.dtype)


def _in_context(x: jax.Array, own: tuple[AxisType, ...]) -> jax.Array:
    """A scalar over `Explicit` mesh axes, for `jax.sharding.auto_axes` too: inside it they are `Auto`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_types == own:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def increment(count: Any) -> jax.Array:
    """The count plus one, int32. At the largest integer it stays there instead of overflowing."""
    return jnp.asarray(optax.safe_increment(jnp.asarray(count, jnp.int32)))


def is_schedule(value: Any) -> bool:
    """Whether it is a function and no array; a variable of Flax, which may be called, is one."""
    return callable(value) and not hasattr(value, "__jax_array__")


def as_schedule(value: ScalarOrSchedule) -> Schedule:
    """A number or schedule as a schedule: a function of the step count.

    In x64 mode the function gets the count as int64, because quotients of int32 are float32.

    Raises:
      NotScalarError: when the schedule is called, if it returns an array or something that is not a number.
    """
    if not (callable(value) and is_schedule(value)):
        number = jnp.asarray(value) if hasattr(value, "__jax_array__") else value
        return lambda count: number

    def schedule(count):
        now = value(count.astype(int))
        key = is_array(now) and jnp.issubdtype(jnp.result_type(now), jax.dtypes.extended)
        if kind(now) not in ("real", "integer") or np.ndim(now) or key:
            raise NotScalarError(now)
        return now

    return schedule


def as_float32(value: Numeric) -> jax.Array:
    """A number as a float32 array, the form in which states keep it for `probes.read`."""
    return jnp.array(value, jnp.float32, copy=True)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a tree is an array, a number, or the shape and dtype of an array."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return True
    if isinstance(leaf, str) or not (isinstance(leaf, _PYTHON) or hasattr(leaf, "__jax_array__")):
        return False  # jax would take the names of dtypes for dtypes
    try:
        return jnp.result_type(leaf) is not None
    except (TypeError, ValueError):
        return False


def kind(leaf: Any) -> str:
    """What numbers a leaf holds: "real", "complex", "integer" (all others), or "none" if it is no array."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _kind_of(leaf.dtype)
    return _kind_of(jnp.result_type(leaf)) if is_array(leaf) else "none"


@functools.cache
def _kind_of(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    return "real" if jnp.issubdtype(dtype, jnp.floating) else "integer"


def is_trainable(leaf: Any) -> bool:
    return kind(leaf) in ("real", "complex")


ABSENT = (type(None), optax.MaskedNode)
"""What stands in the place of a leaf that is missing or masked."""


def is_absent(leaf: Any) -> bool:
    return isinstance(leaf, ABSENT)


def is_missing(gradient: Any) -> bool:
    """Whether there is no gradient: None, or the float0 that jax uses for what is not differentiable."""
    return gradient is None or getattr(gradient, "dtype", None) == jax.dtypes.float0


def stored_dtype(dtype: DTypeLike | None, own: DTypeLike) -> jnp.dtype:
    """The dtype of a stored moment: `dtype`, or float32 or wider without it; complex for complex numbers."""
    stored = jnp.dtype(upcast_dtype(own) if dtype is None else dtype)
    if jnp.issubdtype(own, jnp.complexfloating) and not jnp.issubdtype(stored, jnp.complexfloating):
        return jnp.dtype(jnp.complex64 if jnp.finfo(stored).bits <= 32 else jnp.complex128)
    return stored


def as_stored(moment: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """A moment in the dtype in which it is stored."""
    return moment.astype(stored_dtype(dtype, moment.dtype))


def restored(x: Any) -> Any:
    """A part of a state as an array of JAX, if JSON or NumPy has restored it as another; unchanged if not."""
    if not isinstance(x, int | float | np.ndarray | np.generic) and not getattr(x, "weak_type", False):
        return x
    if isinstance(x, int) and not isinstance(x, bool):
        return jnp.asarray(x, jnp.int32 if x < 1 << 31 else jnp.uint32)  # a count, or a seed
    return jnp.asarray(x, jnp.result_type(x))


def copied(x: Any) -> Any:
    """An array of JAX in a buffer of its own, so that donating one does not delete the other."""
    return jnp.copy(x) if isinstance(x, jax.Array) else x


_MADE: ContextVar[dict[Any, Any] | None] = ContextVar("made", default=None)


@contextlib.contextmanager
def made_once() -> Iterator[None]:
    """Inside, equal moments of one parameter are one array: only the shapes of a state are wanted."""
    token = _MADE.set({})
    try:
        yield
    finally:
        _MADE.reset(token)


def full_like(w: Any, value: Numeric = 0.0, dtype: DTypeLike | None = None) -> jax.Array:
    """A new moment for the parameter `w`, with its shape and sharding. By default it is float32 or wider."""
    made = _MADE.get()
    if made is None or not isinstance(value, int | float):
        return _full_like(w, value, dtype)
    key = id(w), value, dtype
    if key not in made:
        made[key] = w, _full_like(w, value, dtype)  # with `w`, whose id is not used again
    return made[key][1]


def _full_like(w: Any, value: Numeric, dtype: DTypeLike | None) -> jax.Array:
    return jnp.full_like(w, value, dtype=stored_dtype(dtype, jnp.result_type(w)))


def common(x: jax.Array, moment: Any) -> tuple[Any, Any]:
    """A gradient in float32 or wider and a stored moment, both in the wider dtype of the two."""
    if x.dtype == moment.dtype:
        return x, jnp.asarray(moment)
    moment = upcast(moment)
    dtype = np.promote_types(x.dtype, moment.dtype)
    return x.astype(dtype), moment.astype(dtype)


def as_kind_of(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` without its imaginary part if `like` is real."""
    return x.real if jnp.iscomplexobj(x) and not jnp.iscomplexobj(like) else x


_REALS = {np.dtype(x) for x in (jnp.bfloat16, "float16", "float32", "float64", "complex64", "complex128")}
_INTEGERS = {np.dtype(name) for name in ("int32", "uint32", "int64", "uint64")}
_NUMBERS = _REALS | _INTEGERS
_NOT_32 = _NUMBERS - {np.dtype(name) for name in ("float32", "complex64", "int32", "uint32")}


def as_made(init: Callable[[PyTree], PyTree], state: PyTree, params: PyTree | None) -> PyTree:
    """A state in the dtypes that `init` gives it; unchanged without parameters, which `init` needs.

    What is in 32 bits is not narrowed: transformations do so when they store it. Codes in one byte are
    unchanged, because no other numbers can stand for them. So is a state of other parameters or of another
    optimizer, which `update` refuses.
    """
    leaves, structure = jax.tree.flatten(state)
    others = _NOT_32 & {getattr(x, "dtype", None) for x in leaves}
    if params is None or not (others or jnp.result_type(float).itemsize == 8):
        return state
    made = jax.tree.leaves(traced(init, jax.tree.map(lambda x: x if is_array(x) else None, params)))
    fit = [*map(np.shape, leaves)] == [x.shape for x in made]
    return structure.unflatten(map(_cast, leaves, made)) if fit else state


def evaluated(f: Callable[..., Any], *arguments: Any) -> Any:
    """What a user's function of paths and shapes returns, as concrete numbers.

    The function may use `jax.numpy`, whose numbers would be tracers inside `jax.jit`.
    """
    with jax.ensure_compile_time_eval():
        return f(*arguments)


def traced(f: Callable[..., Any], *trees: PyTree) -> Any:
    """The shapes of what a function returns; None if it cannot be traced.

    A function of another library may raise anything. Warnings of this library are given when it runs, and not
    here.
    """
    with quietly():
        try:
            return jax.eval_shape(lambda *given: f(*given), *trees)
        except Exception:
            return None


def _cast(x: Any, made: Any) -> Any:
    own = getattr(x, "dtype", None)
    return recast(x, made) if own in _NOT_32 or made.dtype.itemsize > 4 else x


def recast(x: Any, made: Any) -> Any:
    """An array in another's dtype, if both hold real numbers in at least two bytes, or integers in four.

    Counts and seeds may have become real numbers with the rest of a state.
    """
    own, other = getattr(x, "dtype", None), made.dtype
    alike = own in _REALS if other in _REALS else own in _NUMBERS and other in _INTEGERS
    if own == other or not alike:
        return x
    return x.update(dtype=other) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(other)
