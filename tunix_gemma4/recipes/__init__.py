# SPDX-License-Identifier: Apache-2.0
"""Whole runs, each readable from top to bottom."""
