# SPDX-License-Identifier: Apache-2.0
"""Searched behind `tunix_gemma4.recipes`."""
