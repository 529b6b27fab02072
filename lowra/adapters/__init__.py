"""What adapters are: balanced factors, grids and packed forms, and the kinds that train.

LoRAQuant (Mirzaei et al., arXiv 2510.26690) and what we put beside it. An adapter adds
`scaling * B A x` to the output of a site, with B [n, r] and A [r, k]. What compresses works on two
tensors of *directions*: row i of A' [r, k] and row i of B' transposed [r, n] make direction i.
"""
