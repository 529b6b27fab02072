"""Parts of W: several pieces of rows and columns, the last tail included, against the reference, bit for bit."""
import emulated, torch, ctypes
from emulated import *
import exact_make as X
from lowra.backends.cpu import pieces
from lowra.backends.reference import linear as reference
