# SPDX-License-Identifier: Apache-2.0
"""Supervised training on Tunix."""
