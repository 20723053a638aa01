"""Array annotations with shapes, such as ``Float[Array, "T H"]``.

At run time they are plain ``typing.Annotated`` and cost nothing; ``tests/moe_ref/test_shapes.py`` puts jaxtyping in
this module's place and so checks every shape and dtype of every public function.
"""

from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Int
from typing import Annotated as UInt8
from typing import Any

Array = Any  # an array of any library that array-api-compat knows: numpy.ndarray, torch.Tensor

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
