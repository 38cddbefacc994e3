"""Regular expressions of the names of modules and parameters, of which the default rules are made."""

NEOX_QKV = r"query_key_value(/\w+)?"
WEIGHT = "(kernel|weight|w)"
KERNEL = r"(kernel|w\d*)"
UP = r"(\w+_)?(ups|upsamples?)(_0)?/"
UPWARD = r"(\w+_)?up(?!_?proj)(sampl|scal|conv|_?\d)?\w*/(\d+/)?([^/]+/)?weight"
CONV = r"\w*conv\w*/"
IN_CONV = CONV + "[^/]+/"
ANY_CONV = CONV + "([^/]+/)?" + KERNEL
TRANSPOSED_WEIGHT = r"\w*(conv_?tr?|transp(osed?)?(_?conv\w*)?|deconv\w*)(_?\d+|_[a-z]+)?/([^/]+/)?weight"
IN_TRANSPOSED = r"\w*(deconv|transpose)\w*/(.*/)?(?!\w*conv[a-z]*_0/)\w*conv\w*/(kernel|w)"
TRANSPOSED = r"\w*conv\w*_transpose\w*/w|conv0d_transpose(_0)?/kernel"
IN_STACK = r"((\w+_)?(layers|blocks|stages)(?!/\d)|\w*scan\w*|stacked|\w*layer_stack\w*)/(.*/)?"
IN_ATTENTION = r"(\w*(attn|(?<!fl)atten|mha|msa)\w*|(\w+_)?att)/(.*/)?"
ATTENTION = (
    r"attn|(?<!fl)atten|(^|[/_])att/|multi_?head|(^|/)(query|key|value|[qkvo])/(kernel|weight|w|linear)"
)
BLOCK = (
    ATTENTION + r"|mlp|(^|[/_])ffn?([/_]|$)|block|layers|layer_?\d|(^|/)(layer|h)/|stage|mixer|expert|moe|"
    "cell|rnn|lstm|gru|ssm|mamba|conv|lora"
)
SCANNED = r"decoder/((\w+_)?layers|scanned_blocks)/(?!\d)(.*/)?"
SCANNED_ATTENTION = SCANNED + r"\w*attention\w*/"
SCANNED_DENSE = SCANNED + r"\w*(mlp|experts?)\w*/(wi\w*|wo)/kernel"
T5X = r"(en|de)coder/(en|de)coder/(\w*attention/(query|key|value|out)|mlp/w[io](_\d)?)/kernel"
LEVANTER = r"(layers|blocks)/(stacked|blocks/\d+)/(.*/)?"
QUERY = (
    r"(dense_)?(query|key|value|w?[qkv]|to_[qkv])(_(proj|dense|projector))?/(kernel|w)|"
    r"(\w+_)?[qkv]_projection/(kernel|weights)"
)
POST = r"((out|\w*output|o_proj|post)/(kernel|w|weight)|w?o)"
FREQUENCIES = r"\w*(gaussian_matrix|freqs?|frequenc(y|ies))|\w*(fourier|gaussian|rff)\w*/(w|b|kernel|matrix)"
GATE = r"(\w*gate|gating)(_\d+)?"
EXPERT_GATE = rf"\w*moe\w*/(gate|gating|w_?g(ate)?|switch)(_\d+)?(/dense(_\d+)?)?(/{WEIGHT})?"
MOMENT = "(mean|log_?(std|var|sigma|scale))(_?(net|layer|linear|dense|fc))?"
OF_POLICY = "(policy|value|actions?|q|advantage)"
SEVEN = r"\w*(linear|proj|fc|dense)\w*"
LAYER = "(mlp|ffn?|attn|attention)"
GATE_AND_UP = r"(\w*gate_?(and_?)?up\w*|\w*up_?gate\w*)"
GATED = r"(_?([xhi]|in|input|hidden|recurrent))?(_?(linear|layer|dense|cell))?(_?\d+)?"
"""What may follow the name of a recurrent layer."""
RECURRENT = r"\w*cell\w*/dense_h/kernel|w_?h?h|recurrent_kernel|h0h/(kernel|w)"
OF_TORCH = r"(_l0(_reverse)?)?"  # the number of a layer, and the direction
ADAPTIVE = (
    r"\w*((?<![a-z])ada_?(ln|lin|norm|rms|in|proj|params|mod|scale)|adaptive_?norm|adaln|modulation|scale_shift|"
    r"(?<![a-z])mod(?=/))\w*/([^/]+/)?"
)
MODULATION = rf"({ADAPTIVE}|\w*norm(_?\d+)?/(lin|linear|proj|dense|fc)(_\d+)?/)"
QKV = r"\w*(qkv|query_key_value|c_attn)\w*"
ROOT = "^((params|model)/)*"
GENERIC = ROOT + r"([^/]+/)?(dense|linear|fc)_?\d*/"
# the projection of an embedding is not an embedding
NOT_A_LAYER = (
    r"(?!\w*(proj|project|projection|mapping\w*|emb_layers|dense|linear|fc|mlp|ffn?|attn|attention|transform)"
    r"(_?\d+)?(/|$))"
)
EMBEDDING = (
    r"(\w*(embed|positional|codebook|posemb)\w*|\w*emb(s|_\w+)?(_0)?|wte|wpe|pe|pos_enc\w*|"
    r"rel_pos\w*|relative_\w+|vocab\w*|lookup\w*|word_vectors)"
)
TABLE = (
    r"(?!\w*(linear|dense|fc|mlp|mix|conv|rnn|lstm|gru))"
    r"(\w+_)?(tok|tokens?|pos|positions?|segments?|latents?|prompts?|tables?)"
)

IN_LAYER = r"\w*(attn|attention|mlp|ffn?|ffw|feed_?forward)\w*/"
LAST_CONV = r"(\w+_)?(conv_?out|out(put)?_?conv|(final|last)_?conv|conv_?(final|last|output))\w*"
TO_IMAGE = r"(\w+_)?(to_?(rgb|img|image)|(img|image)_?out)\w*"
BLOCK_OF_CONVOLUTIONS = r"(^|/)\w*(block|resnet|layer|stage|attention)s?(_?\d+)?/"
MATRIX_NAME = (
    r"(\w+_)?(kernel|weight|w|proj|projection|linear|dense|fc|matrix)(_?\d+)?|w\d+|(\w+_)?w(kv|[iqkvogud])(_?\d+)?|w_\w+|wqkv|"
    r"[qkvo]|query|key|value|(to_)?(in|out|up|down|gate|[qkv])(_?\d+)?|(up|down|gate|in|out)_\w+|c_(attn|proj|fc)|mlp\w*|kernel_(mu|mean)"
)
"""Names that mean a matrix."""

LINEAR = r"\w*(proj|projection|linear|dense|fc|mlp|transition|gate|act|activations|scalar)(_?\d+)?"
"""Modules whose `weights` are a matrix, and not a table."""
