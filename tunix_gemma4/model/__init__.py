# SPDX-License-Identifier: Apache-2.0
"""The Gemma 4 model: text decoder, vision tower, caches and masks."""
