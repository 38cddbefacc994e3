"""Floor 1: how real numbers are stored in fewer bytes; arrays only, no trees, no state.

    codec = Signed8()
    encoded = codec.encode(x)           # Encoded(codes, scales)
    x = codec.decode(encoded)           # float32

`BFloat16`; with one byte per number and a scale per block of the last axis: `Signed8` for momentum, `Nonneg8`
for second moments, `Float8`; `Split8` and `Split16` for weights. A codec is a hashable description. Codes
have the array's shape and scales that of its blocks, so that they can have its sharding: encoding needs no
communication where shards hold whole blocks.
"""

from optimorph.codecs._bfloat16 import BFloat16
from optimorph.codecs._blocks import Nonneg8, Signed8
from optimorph.codecs._codec import Codec, Encoded
from optimorph.codecs._float8 import Float8
from optimorph.codecs._split import Split8, Split16

__all__ = ["BFloat16", "Codec", "Encoded", "Float8", "Nonneg8", "Signed8", "Split8", "Split16"]
