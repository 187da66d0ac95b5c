"""An interpreter of PTX, the GPU's portable machine code, with which the compiled kernels run on a CPU."""

from . import arith as arith
from . import convert as convert
from . import matrix as matrix
from . import move as move
from . import sync as sync
