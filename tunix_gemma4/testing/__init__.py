# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints, and the comparison of a checkpoint with transformers."""
