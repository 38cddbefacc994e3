"""What to ask about a leaf, and the likely answers."""

from optimorph._core.types import Shape
from optimorph.linalg import Axes


def question(path: str, shape: Shape, cause: str) -> str:
    """What is wrong, and what to type for each thing that the leaf may be."""
    named_weight = path.endswith("weight") or path.split("/")[-1].startswith("weight")
    likely = _LIKELY[named_weight].get(len(shape)) or {"b" * (len(shape) - 2) + "io": "a stack of stacks"}
    answers = {spec: what for spec, what in likely.items() if _fits(spec, shape)}
    none = {None: "not a matrix"}
    one_channel = len(shape) > 2 and shape[1 if named_weight else -2] == 1
    answers = {None: "depthwise: not a matrix"} | answers if one_channel else answers | none
    lines = [f"  axes={{{path!r}: {spec!r}}}  # {what}" for spec, what in answers.items()]
    return "\n".join([f"{path!r} has shape {shape}, and {cause}. Type one of", *lines])


def _fits(spec: str, shape: Shape) -> bool:
    return len(shape) > 1 and Axes(spec).misfit(shape) is None


_LIKELY = (
    {
        2: {
            "io": "inputs x outputs",
            "oi": "outputs x inputs",
            "i(3o)": "three projections side by side: query, key and value",
            "i(36o)": "the same, head by head, of 12 heads",
            "i(32+8+8 o)": "the same, where 32 heads of queries share 8 of keys and values",
            "i(4o)": "the gates of an LSTM",
        },
        3: {
            "bio": "stacked layers or experts, inputs x outputs",
            "ibo": "the same, counted by the second axis",
            "ioo": "attention's query, key or value: width, heads, size",
            "iio": "attention's output: heads, size, width; or a convolution over one axis",
        },
        4: {
            "iiio": "a convolution over two axes",
            "bbio": "stacked layers of experts",
            "bioo": "stacked layers of attention's query, key or value",
            "biio": "stacked layers of attention's output, or of convolutions over one axis",
            "iboo": "attention's query, key or value, its layers counted by the second axis; or all three",
            "ibio": "attention's output, of layers counted by the second axis",
        },
        5: {
            "iiiio": "a convolution over three axes",
            "biiio": "stacked convolutions over two axes",
            "biboo": "stacked layers of attention's query, key and value in one",
            "ibboo": "the same, of layers counted by the second axis",
        },
        6: {
            "biiiio": "stacked convolutions over three axes",
            "bbiiio": "stacks of stacked convolutions over two axes",
        },
    },
    {
        2: {
            "oi": "outputs x inputs",
            "io": "inputs x outputs",
            "(3o)i": "the gates of a GRU, or query, key and value",
            "(36o)i": "query, key and value, head by head, of 12 heads",
            "(4o)i": "the gates of an LSTM",
        },
        3: {
            "boi": "stacked layers or experts, outputs x inputs",
            "oii": "a convolution over one axis; or attention's output: width, heads, size",
            "ooi": "attention's query, key or value: heads, size, width",
        },
        4: {
            "oiii": "a convolution over two axes",
            "bboi": "stacked layers of experts",
            "booi": "stacked layers of attention's query, key or value; or all three in one",
            "boii": "stacked layers of attention's output, or of convolutions over one axis",
        },
        5: {
            "oiiii": "a convolution over three axes",
            "boiii": "stacked convolutions over two axes",
            "bbooi": "stacked layers of attention's query, key and value in one",
            "boooi": "stacked layers of attention's query: groups, heads, size, width",
        },
        6: {
            "boiiii": "stacked convolutions over three axes",
            "bboiii": "stacks of stacked convolutions over two axes",
        },
    },
)
"""Number of axes → spec → what the leaf would be, for kernels and for weights."""
