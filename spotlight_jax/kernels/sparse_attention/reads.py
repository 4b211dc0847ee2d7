"""What reading selected cache rows gives beside attention over them."""

import flax.struct
from jaxtyping import Array, Float


@flax.struct.dataclass
class Reads:
    """Attention of each query head over the rows it read, and sums over those rows but position 0, in float32.

    x is a row's logit less the mean logit that was given, y its value less the mean value that was given.
    """

    out: Float[Array, "batch q_heads head_dim"]  # softmax-weighted mean of the values
    log_sum: Float[Array, "batch q_heads"]  # log of the sum of exponentials of the logits
    highest: Float[Array, "batch q_heads"]  # logit
    count: Float[Array, "batch q_heads"]
    logits: Float[Array, "batch q_heads"]  # sum of x
    squares: Float[Array, "batch q_heads"]  # sum of x^2
    values: Float[Array, "batch q_heads head_dim"]  # sum of y
    products: Float[Array, "batch q_heads head_dim"]  # sum of x y
