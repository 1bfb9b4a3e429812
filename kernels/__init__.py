"""The Triton form of the update rule. Installed as `automagic_bnb.kernels`; importing it does not import Triton."""
