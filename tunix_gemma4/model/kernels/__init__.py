# SPDX-License-Identifier: Apache-2.0
"""Attention on TPU and GPU by kernels in the place of XLA."""
