"""Mixed precision: what each layer group costs in accuracy when it is quantized, and the best use of a budget of bits.

See README.md of this room.
"""
