"""Floor 1: how real numbers are stored in fewer bytes; arrays only, no trees, no state.

    codec = Signed8()
    encoded = codec.encode(x)           # Encoded(codes, scales)
    x = codec.decode(encoded)           # float32

`Float32`, `BFloat16`; of one byte, with a scale for every block of the last axis: `Signed8` for momentum,
`Nonneg8` for second moments, `Float8`; `Split8` and `Split16` for weights. Each is a small description that
can be compared and hashed. Codes have the shape of the array and scales that of its blocks, so that they lie
over a mesh as it does, and a mesh that does not cut blocks has nothing to send.
"""

from optimorph.codecs.bfloat16 import BFloat16
from optimorph.codecs.codec import Codec, Encoded
from optimorph.codecs.float8 import Float8
from optimorph.codecs.float32 import Float32
from optimorph.codecs.nonneg8 import Nonneg8
from optimorph.codecs.signed8 import Signed8
from optimorph.codecs.split8 import Split8
from optimorph.codecs.split16 import Split16

__all__ = ["BFloat16", "Codec", "Encoded", "Float8", "Float32", "Nonneg8", "Signed8", "Split8", "Split16"]
