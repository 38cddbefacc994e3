"""Codecs store real numbers in fewer bytes.

    codec = Signed8()
    encoded = codec.encode(x)           # Encoded(codes, scales)
    x = codec.decode(encoded)           # float32

`BFloat16` takes two bytes for each number. `Signed8` (for momentum), `Nonneg8` (for second moments) and
`Float8` take one byte for each number, and have a scale for each block of the last axis. `Split8` and
`Split16` are for weights. A codec is a hashable description without arrays. Codes have the shape of the
array, and there is one scale for each block, so both can have the array's sharding. If shards hold whole
blocks, encoding needs no communication.

Floor 1 (see CONTRIBUTING.md): arrays only, no trees and no state.
"""

from optimorph.codecs._bfloat16 import BFloat16
from optimorph.codecs._blocks import Nonneg8, Signed8
from optimorph.codecs._codec import Codec, Encoded
from optimorph.codecs._float8 import Float8
from optimorph.codecs._split import Split8, Split16

__all__ = ["BFloat16", "Codec", "Encoded", "Float8", "Nonneg8", "Signed8", "Split8", "Split16"]
__dir__ = __all__.copy  # dir() shows the public names alone
