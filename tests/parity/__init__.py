# SPDX-License-Identifier: Apache-2.0
"""Comparisons with transformers and peft. A package, so that its tests share `oracle`."""
