"""Runtimes as verification asks them, each in a child process that needs numpy and the runtime, and no torch.

A wrong file ends the process of some runtimes, and an older version of a runtime may live in another environment.
"""
