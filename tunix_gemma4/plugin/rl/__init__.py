# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning on Tunix."""
