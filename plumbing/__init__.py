"""What keeps a run going: its loop, ranks, optimiser steps, checkpoints, files, metrics, flags, devices.

The contract: nothing here can change an objective, and nothing here imports from the rest of the project.
Who reads the algorithms may skip this folder.
"""
