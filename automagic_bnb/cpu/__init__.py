"""The step on the CPU, compiled by Numba: the same rule as `automagic_bnb.reference`, one pass over each parameter."""
