# SPDX-License-Identifier: Apache-2.0
"""Experimental: attention by kernels, where `attention_implementation` asks for one."""
