"""Align a causal language model from demonstrations alone. The algorithms, in the order of the data.

Import what you need from the modules, e.g. `from apprentice.ppo import SelfRewardingPPO`; this package loads nothing itself.
"""
